"""Experts go out as PEFT adapters, and come in from them."""

from __future__ import annotations

import json
import sys

import peft
import pytest
import torch
from safetensors.torch import save_file

import coterie
from matching import relative_error
from zoo import base_model, inputs, load_dense, make_adapter, merged, outputs, save


def randomised(model, seed=0):
    """Every parameter that is trained away from its start."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=gen))
    return model


def wrapped(arch, base, method="smear", experts=3, **parameters):
    if arch == "llama" and method == "smear":
        parameters["pool"] = "segment"
    config = coterie.MixtureConfig(method=method, experts=experts, parameters={"rank": 3, **parameters})
    return randomised(coterie.wrap(base, config)).eval()


def alone(mixture, name, batch):
    with mixture.coterie.route(name):
        return outputs(mixture, batch)


@pytest.mark.parametrize(
    ("arch", "method", "options"),
    [
        ("bert", "smear", {"alpha": 12.0}),
        pytest.param("roberta", "switch", {}, marks=pytest.mark.slow),
        ("gpt2", "switch", {"alpha": 1.5}),
        ("llama", "smear", {}),
        ("t5", "ensemble", {}),
        pytest.param("vit", "smear", {"alpha": 6.0}, marks=pytest.mark.slow),
    ],
)
def test_an_expert_is_a_plain_adapter(arch, method, options, tmp_path):
    save(base_model(arch), tmp_path / "base")
    mixture = wrapped(arch, base_model(arch), method, **options)
    mixture.save_pretrained(tmp_path / "mixture")
    batch = inputs(arch)
    seen = []
    for name in ("expert 0", "expert 2"):
        out = tmp_path / name
        coterie.extract_expert(tmp_path / "mixture", name, out, adapter=True, base=str(tmp_path / "base"))
        adapted = peft.PeftModel.from_pretrained(load_dense(tmp_path / "base", arch), str(out)).eval()
        wanted = alone(mixture, name, batch)
        assert relative_error(outputs(adapted, batch), wanted) < 1e-5
        seen.append(wanted)
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == pytest.approx(options.get("alpha", 3.0) / 3)
    assert relative_error(*seen) > 1e-3


def test_extracting_from_the_command_line_and_back(tmp_path, monkeypatch):
    """An adapter that goes out of a mixture comes back into one as what it was."""
    save(base_model("bert"), tmp_path / "base")
    mixture = wrapped("bert", base_model("bert"))
    mixture.save_pretrained(tmp_path / "mixture")
    monkeypatch.chdir(tmp_path)
    from coterie.cli import main

    for i in (0, 1):
        line = f"coterie extract-expert mixture expert_{i} -o a{i} --adapter --base base".split()
        sys.argv = [word.replace("_", " ") if word.startswith("expert_") else word for word in line]
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
    with pytest.warns(UserWarning, match="classifier"):
        again = coterie.wrap(
            load_dense(tmp_path / "base", "bert"), coterie.MixtureConfig(experts={"x": "a0", "y": "a1"})
        ).eval()
    again.classifier.load_state_dict(mixture.classifier.state_dict())
    assert set(again.coterie.layers) == set(mixture.coterie.layers)
    for name, was in (("x", "expert 0"), ("y", "expert 1")):
        assert relative_error(alone(again, name, inputs("bert")), alone(mixture, was, inputs("bert"))) < 1e-5


def test_the_record_of_a_training_names_the_base(tmp_path):
    save(base_model("bert"), tmp_path / "base")
    wrapped("bert", base_model("bert")).save_pretrained(tmp_path / "mixture")
    with pytest.raises(coterie.CoterieError, match="does not say what its base is"):
        coterie.extract_expert(tmp_path / "mixture", "expert 0", tmp_path / "out", adapter=True)
    record = {"base": {"id": str(tmp_path / "base"), "revision": None}}
    (tmp_path / "mixture/mixture.json").write_text(json.dumps(record))
    coterie.extract_expert(tmp_path / "mixture", "expert 0", tmp_path / "out", adapter=True)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("adapter", [True, False])
def test_bottlenecks_are_refused_with_a_reason(adapter, tmp_path):
    save(base_model("bert"), tmp_path / "base")
    wrapped("bert", base_model("bert"), expert="bottleneck").save_pretrained(tmp_path / "mixture")
    with pytest.raises(coterie.CoterieError, match="bottleneck adapter behind the layer, with a non-linearity"):
        coterie.extract_expert(
            tmp_path / "mixture", "expert 0", tmp_path / "out", adapter=adapter, **({"base": "base"} if adapter else {})
        )
    assert not (tmp_path / "out").exists()


def test_what_was_trained_beside_an_expert_is_saved_or_refused(tmp_path):
    save(base_model("bert"), tmp_path / "base")
    for also, fine in ((["*LayerNorm*"], True), (["*query.bias"], False)):
        config = coterie.MixtureConfig(experts=2, parameters={"rank": 2}, also_train=also)
        mixture = randomised(coterie.wrap(base_model("bert"), config)).eval()
        mixture.save_pretrained(tmp_path / also[0][1:6])
        given = (tmp_path / also[0][1:6], "expert 1", tmp_path / f"out{fine}", False, True, str(tmp_path / "base"))
        if fine:
            coterie.extract_expert(*given)
            adapted = peft.PeftModel.from_pretrained(load_dense(tmp_path / "base", "bert"), str(given[2])).eval()
            wanted = alone(mixture, "expert 1", inputs("bert"))
            assert relative_error(outputs(adapted, inputs("bert")), wanted) < 1e-5
        else:
            with pytest.raises(coterie.CoterieError, match="trained beside its experts"):
                coterie.extract_expert(*given)


@pytest.mark.parametrize("method", ["smear", "switch", "tag"])
def test_experts_start_from_adapters(method, tmp_path):
    """Of unlike ranks, scales and layers: each alone is its adapter; what they lack is fresh and can learn."""
    save(base_model("bert"), tmp_path / "base")
    one = make_adapter(tmp_path / "base", tmp_path / "one", 1, rank=4, arch="bert")
    two = make_adapter(tmp_path / "base", tmp_path / "two", 2, rank=2, targets=["key"], arch="bert", lora_alpha=3)
    model = base_model("bert")
    config = coterie.MixtureConfig(method=method, experts={"one": str(one), "two": str(two)}, parameters={"alpha": 2.0})
    mixture = coterie.wrap(model, config)
    assert mixture.coterie.spec.parameters["rank"] == 4
    assert {path.rpartition(".")[2] for path in mixture.coterie.layers} == {"query", "value", "key"}
    batch = inputs("bert")
    for name, place in (("one", one), ("two", two)):
        wanted = outputs(merged(tmp_path / "base", place, "bert"), batch)
        assert relative_error(alone(mixture.eval(), name, batch), wanted) < 1e-5
    mixture.train()(**batch, labels=torch.tensor([0, 1]), task_ids=torch.tensor([0, 1])).loss.backward()
    bank = mixture.get_submodule("bert.encoder.layer.0.attention.self.key").bank
    assert bank.up.grad is not None
    assert (bank.down[bank.rows(1)] != 0).any(1).all()  # rows beyond the adapter's rank are not dead


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    save(base_model("bert"), tmp_path / "base")
    adapter = str(make_adapter(tmp_path / "base", tmp_path / "one", 1, rank=4, arch="bert"))
    model = base_model("bert")
    for keys, wanted in (
        ({"parameters": {"rank": 2}}, "rank is 2 and expert 'a' has rank 4"),
        ({"parameters": {"expert": "bottleneck"}}, "adapters are low-rank pairs"),
        ({"modules": {"include": ["*query"]}}, "expert 'a' adapts .*value', which gets no experts"),
        ({"experts": {"a": str(tmp_path / "base")}}, "is no PEFT adapter"),
    ):
        with pytest.raises(coterie.CoterieError, match=wanted):
            coterie.wrap(model, coterie.MixtureConfig(**{"experts": {"a": adapter, "b": adapter}, **keys}))


def test_an_xlora_directory_of_peft_is_refused_by_name(tmp_path):
    base = base_model("llama")
    save(base, tmp_path / "base")
    (tmp_path / "xlora").mkdir()
    config = {"peft_type": "XLORA", "adapters": {"0": "a"}, "base_model_name_or_path": "base"}
    (tmp_path / "xlora" / "adapter_config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, tmp_path / "xlora" / "adapter_model.safetensors")
    with pytest.raises(coterie.CoterieError, match=r"X-LoRA.*name the adapters"):
        coterie.build(
            method="arrow", base=tmp_path / "base", experts={"x": tmp_path / "xlora"}, out=str(tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()
