"""With every direction kept and one decision possible, a mixture is its expert."""

from __future__ import annotations

import pytest
import torch

from matching import build, relative_error, smile
from zoo import (
    ALL,
    WITH_ADAPTERS,
    base_model,
    fine_tune,
    inputs,
    linear_names,
    load_dense,
    make_adapter,
    merged,
    outputs,
    save,
)


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("copies", [1, 3])
def test_full_rank_reproduces_the_expert(arch, copies):
    base = base_model(arch)
    tuned = fine_tune(base, 1)
    batch = inputs(arch)
    mixture = smile(base, {f"e{i}": tuned for i in range(copies)}, rank="full", gate_rank=4, top_k=1)
    wanted = outputs(tuned, batch)
    assert relative_error(outputs(mixture, batch), wanted) <= 1e-5
    assert relative_error(outputs(base, batch), wanted) > 0.01


@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])
def test_top_k_of_copies_reproduces_the_expert(arch):
    base = base_model(arch)
    tuned = fine_tune(base, 1)
    batch = inputs(arch)
    mixture = smile(base, {f"e{i}": tuned for i in range(3)}, rank="full", gate_rank=4, top_k=2)
    assert relative_error(outputs(mixture, batch), outputs(tuned, batch)) <= 1e-5


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_dense_experts_reproduce_the_expert(arch):
    base = base_model(arch)
    tuned = fine_tune(base, 1)
    batch = inputs(arch)
    mixture = smile(base, {"only": tuned}, rank="dense", gate_rank=4, top_k=1)
    assert relative_error(outputs(mixture, batch), outputs(tuned, batch)) <= 1e-5


@pytest.mark.parametrize("arch", ALL)
def test_the_average_of_one_is_the_expert(arch, tmp_path):
    """With ``others: average`` and one expert, every parameter counts, linear or not: nothing is dropped."""
    base = base_model(arch)
    tuned = fine_tune(base, 1, norms=True, everything=True)
    with torch.no_grad():
        for name in linear_names(base):  # also those that cannot be mixture layers
            layer = tuned.get_submodule(name)
            if torch.equal(layer.weight, base.get_submodule(name).weight):
                layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    batch = inputs(arch)
    wanted = outputs(tuned, batch)
    base_dir, tuned_dir = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    recipe = dict(parameters={"rank": "full", "gate_rank": 4}, others="average")
    built = build(tmp_path / "out", base_dir, {"only": tuned_dir}, **recipe)
    assert relative_error(outputs(built, batch), wanted) <= 1e-5
    live = smile(base, {"only": tuned}, rank="full", others="average")
    assert relative_error(outputs(live, batch), wanted) <= 1e-5


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("llama", {"targets": "all-linear"}),
        ("vit", {"targets": ["q_proj", "projection"]}),
        ("gpt2", {"targets": ["c_attn", "c_proj", "wpe"]}),
        ("bert", {"targets": ["query", "dense", "word_embeddings"], "bias": "all", "modules_to_save": ["classifier"]}),
    ],
    ids=lambda v: v if isinstance(v, str) else "+".join(v),
)
def test_the_average_of_one_adapter_is_what_peft_computes(arch, options, tmp_path):
    """Convolutions, embeddings and whole modules that an adapter changes are not dropped either."""
    base_dir = save(base_model(arch), tmp_path / "base")
    adapter = make_adapter(base_dir, tmp_path / "adapter", 1, arch=arch, **options)
    recipe = dict(parameters={"rank": "full", "gate_rank": 4}, others="average")
    mixture = build(tmp_path / "out", base_dir, {"only": adapter}, **recipe)
    batch = inputs(arch)
    assert relative_error(outputs(mixture, batch), outputs(merged(base_dir, adapter, arch), batch)) <= 1e-5


FAST = ["bert", "vit", "gpt2", "llama"]


@pytest.mark.parametrize("arch", [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in WITH_ADAPTERS])
def test_an_adapter_at_full_rank_is_what_peft_computes(arch, tmp_path):
    base_dir = save(base_model(arch), tmp_path / "base")
    adapter = make_adapter(base_dir, tmp_path / "adapter", 1, arch=arch)
    mixture = build(tmp_path / "out", base_dir, {"only": adapter}, parameters={"rank": "full", "gate_rank": 4})
    batch = inputs(arch)
    assert relative_error(outputs(mixture, batch), outputs(merged(base_dir, adapter, arch), batch)) <= 1e-5


def test_full_rank_from_directories(tmp_path):
    base = base_model("qwen2")
    base_dir, tuned_dir = save(base, tmp_path / "base"), save(fine_tune(base, 1), tmp_path / "tuned")
    mixture = build(tmp_path / "out", base_dir, {"only": tuned_dir}, parameters={"rank": "full"})
    batch = inputs("qwen2")
    assert relative_error(outputs(mixture, batch), outputs(load_dense(tuned_dir, "qwen2"), batch)) <= 1e-5
    assert torch.isfinite(outputs(mixture, batch)).all()
