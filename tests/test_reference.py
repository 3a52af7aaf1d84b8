"""The independent reference and the zoo are themselves right: checked against plain torch and against PEFT."""

from __future__ import annotations

import pytest
import torch

from reference import Reference, from_adapter, from_model, to_double
from zoo import (
    ALL,
    ARCHS,
    WITH_ADAPTERS,
    base_model,
    body_linears,
    fine_tune,
    inputs,
    linear_names,
    make_adapter,
    merged,
    outputs,
    save,
)


def double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("arch", ALL)
def test_one_full_rank_expert_is_the_fine_tuned_model(arch):
    base = base_model(arch)
    tuned = fine_tune(base, 1)
    batch = inputs(arch)
    reference = Reference(base, [from_model(base, tuned, ARCHS[arch].heads)], body_linears(arch, base), rank="full")
    got = reference.run(lambda m: outputs(m, double(batch)))
    wanted = outputs(to_double(tuned), double(batch))
    assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max()  # some norms compute in float32
    assert (wanted - outputs(to_double(base), double(batch))).abs().max() > 0.05
    assert set(reference.decisions) == set(body_linears(arch, base))


@pytest.mark.parametrize("arch", WITH_ADAPTERS)
def test_an_adapters_delta_is_what_peft_merges(arch, tmp_path):
    base = base_model(arch)
    save(base, tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", 1, arch=arch)
    expert = from_adapter(base, adapter, ARCHS[arch].heads)
    _compare_with_peft(base, expert, merged(tmp_path / "base", adapter, arch), arch)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"query": 2, "layer.1.attention.self.value": 7}, "alpha_pattern": {"value": 3}},
        {"use_rslora": True},
        {"modules_to_save": ["classifier"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_dora": True},
        {"targets": ["query", "classifier"]},
        {"targets": ["query", "word_embeddings"]},
    ],
    ids=lambda o: next(iter(o)),
)
def test_adapter_options(options, tmp_path):
    base = base_model("bert")
    save(base, tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", 1, arch="bert", **options)
    expert = from_adapter(base, adapter, ARCHS["bert"].heads)
    _compare_with_peft(base, expert, merged(tmp_path / "base", adapter, "bert"), "bert")


def _compare_with_peft(base, expert, wanted, arch):
    merged_expert = from_model(base, wanted, ARCHS[arch].heads)
    for kind in ("weights", "biases", "others", "heads"):
        ours, theirs = getattr(expert, kind), getattr(merged_expert, kind)
        assert set(ours) <= set(theirs)
        for name, value in theirs.items():
            delta = ours.get(name, torch.zeros_like(value))
            if name.removesuffix(".weight") in linear_names(base) and kind == "others":
                continue
            assert (value - delta).abs().max() < 1e-6, (kind, name)
    assert expert.weights


def test_top_k_over_all_candidates_is_the_softmax():
    base = base_model("bert")
    experts = [from_model(base, fine_tune(base, s), ("classifier",)) for s in (1, 2, 3)]
    layers = body_linears("bert", base)
    reference = Reference(base, experts, layers, rank=4, gate_rank=4, top_k=3)
    reference.run(lambda m: outputs(m, inputs("bert")))
    for decision in reference.decisions.values():
        torch.testing.assert_close(decision.gates, torch.softmax(decision.scores, -1))
        assert torch.isinf(decision.margin).all()


def test_forced_decisions_are_obeyed():
    base = base_model("bert")
    experts = [from_model(base, fine_tune(base, s), ("classifier",)) for s in (1, 2)]
    layers = body_linears("bert", base)
    batch = inputs("bert")
    reference = Reference(base, experts, layers, rank="full", head=1)
    forced = {n: torch.tensor([0.0, 1.0]).expand(batch["input_ids"].numel(), 2) for n in layers}
    forced["bert.pooler.dense"] = torch.tensor([0.0, 1.0]).expand(len(batch["input_ids"]), 2)
    got = reference.run(lambda m: outputs(m, batch), forced)
    wanted = outputs(to_double(fine_tune(base, 2)), batch)
    assert (got - wanted).abs().max() < 1e-6
