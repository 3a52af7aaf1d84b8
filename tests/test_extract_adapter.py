"""`coterie extract`: PEFT loads the adapter, and base + adapter is base + the best low-rank delta."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import coterie
from coterie.cli import main
from zoo import base_model, fine_tune, inputs, load_dense, outputs, save


def sources(folder: Path, arch: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A base and a fine-tune of it, in memory and in `folder`."""
    base = base_model(arch)
    tuned = fine_tune(base, 1, **options)  # type: ignore[arg-type]
    save(base, folder / "base")
    save(tuned, folder / "tuned")
    return base, tuned


def adapted(folder: Path, arch: str, adapter: str = "adapter") -> nn.Module:
    """The base with the adapter, as PEFT loads it."""
    return peft.PeftModel.from_pretrained(load_dense(folder / "base", arch), str(folder / adapter)).eval()


def best(delta: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank, in float64."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_base_plus_the_truncated_delta(tmp_path: Path, arch: str) -> None:
    base, tuned = sources(tmp_path, arch, heads=False)
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=5, jobs=2)
    merged = adapted(tmp_path, arch).merge_and_unload()
    states = [dict(m.state_dict()) for m in (base, tuned, merged)]
    seen = 0
    for layer in report.layers:
        w, t, got = (state[f"{layer.path}.weight"].double() for state in states)
        want = best(t - w, 5)
        torch.testing.assert_close(got - w, want, rtol=0, atol=3e-6)
        missed = float((t - w - want).norm() / (t - w).norm())
        assert layer.rank == 5
        assert layer.residual == pytest.approx(missed, abs=1e-6)
        assert layer.norm == pytest.approx(float((t - w).norm() / w.norm()), rel=1e-6)
        seen += 1
    assert seen == len(report.layers) > 7
    for name, value in states[0].items():
        if not any(name == f"{layer.path}.weight" for layer in report.layers):
            assert torch.equal(value, states[2][name]), name


@pytest.mark.parametrize("arch", ["bert", "qwen2", "gpt2", "vit", "t5", "qwen3_moe", "roberta"])
def test_saving_the_rest_gives_the_fine_tune_back(tmp_path: Path, arch: str) -> None:
    _, tuned = sources(tmp_path, arch, everything=True)
    report = coterie.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64, rest="save", head="save"
    )
    assert report.warnings == [] and all(rest.saved for rest in report.rest.values())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["bias"] == "all") == ("bias of a linear layer" in report.kinds(saved=True))  # PEFT saves them again
    batch, model = inputs(arch), adapted(tmp_path, arch)
    for each in (model, model.merge_and_unload()):
        torch.testing.assert_close(outputs(each, batch), outputs(tuned, batch), rtol=1e-4, atol=2e-5)


def test_what_is_left_out_is_counted_and_measured(tmp_path: Path) -> None:
    base, tuned = sources(tmp_path, "bert", everything=True)
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=4)
    old, new = base.state_dict(), tuned.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    layers = {f"{layer.path}.weight" for layer in report.layers if layer.rank}
    assert sum(rest.tensors for rest in report.rest.values()) == len(changed - layers)
    assert not any(rest.saved for rest in report.rest.values())
    norms = [n for n in changed if "LayerNorm" in n]
    moved = sum(float((new[n] - old[n]).double().square().sum()) for n in norms)
    stood = sum(float(old[n].double().square().sum()) for n in norms)
    tensors, change = report.kinds(saved=False)["normalisation or vector"]
    assert tensors == len(norms) and change == pytest.approx((moved / stood) ** 0.5, rel=1e-6)
    assert any("classifier" in w and "head" in w for w in report.warnings)
    assert any("bias" in w for w in report.warnings)  # these were moved by more than the weights
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        f"base_model.model.{name.removesuffix('.weight')}.{side}.weight"
        for name in layers
        for side in ("lora_A", "lora_B")
    }
    written = json.loads((tmp_path / "adapter" / "extract.json").read_text())
    assert written["report"]["layers"] == report.to_dict()["layers"]
    assert set(written["tensors_read"]["base"]) == set(load_file(tmp_path / "base" / "model.safetensors"))


@pytest.mark.parametrize("wanted", [0.6, 0.25, 0.02])
def test_the_least_rank_that_leaves_a_residual(tmp_path: Path, wanted: float) -> None:
    base, tuned = sources(tmp_path, "llama", modules=["q_proj", "down_proj"], heads=False)
    with torch.no_grad():  # ranks that differ from layer to layer
        layer = tuned.get_submodule("model.layers.1.self_attn.q_proj")
        layer.weight.add_(torch.outer(torch.randn(32), torch.randn(32)))
    save(tuned, tmp_path / "tuned")
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", residual=wanted)
    old, new = base.state_dict(), tuned.state_dict()
    ranks = set()
    for layer in report.layers:
        s = torch.linalg.svdvals((new[f"{layer.path}.weight"] - old[f"{layer.path}.weight"]).double()).square()
        left = (s.flip(0).cumsum(0).flip(0) / s.sum().clamp_min(1e-30)).sqrt()  # of keeping none, one, ...
        assert layer.rank == (int((left > wanted).sum()) if s.sum() else 0)
        assert layer.residual <= wanted + 1e-5
        ranks.add(layer.rank)
    assert {0} < ranks and len(ranks) > 2
    merged = adapted(tmp_path, "llama").merge_and_unload().state_dict()
    for layer in report.layers:
        name = f"{layer.path}.weight"
        want = old[name] + best(new[name] - old[name], layer.rank)
        torch.testing.assert_close(merged[name].double(), want, rtol=0, atol=5e-6)


def test_untouched_layers_stay_untouched(tmp_path: Path) -> None:
    _, tuned = sources(tmp_path, "llama", modules=["layers.1.self_attn.q_proj", "down_proj"], heads=False)
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=32)
    assert sorted(layer.path for layer in report.layers if layer.rank) == [
        "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    model = adapted(tmp_path, "llama")
    lora = {n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert len(lora) == 3
    torch.testing.assert_close(outputs(model, inputs("llama")), outputs(tuned, inputs("llama")), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "model.layers.1.self_attn.q_proj"]


def test_an_output_head_that_is_named_is_adapted(tmp_path: Path) -> None:
    base = base_model("llama")
    tuned = fine_tune(base, 1)
    with torch.no_grad():
        tuned.lm_head.weight.add_(torch.randn(100, 2) @ torch.randn(2, 32))
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    left = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "left", rank=2)
    assert left.rest["lm_head"].kind == "head" and any("lm_head" in w for w in left.warnings)
    named = coterie.extract(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2, include=["*"], head="save"
    )
    assert named.rest["lm_head"].saved
    only = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "only", rank=2, include=["*lm_head*"])
    assert [layer.path for layer in only.layers] == ["lm_head"] and only.layers[0].residual < 1e-5
    got = adapted(tmp_path, "llama", "only").merge_and_unload().lm_head.weight
    torch.testing.assert_close(got, tuned.lm_head.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_half_precision(tmp_path: Path, dtype: str | None) -> None:
    base = base_model("llama").bfloat16()
    tuned = fine_tune(base.float(), 1, heads=False).bfloat16()
    save(base.bfloat16(), tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=8, dtype=dtype)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype or "bfloat16")}
    for layer in report.layers:
        down, up = (tensors[f"base_model.model.{layer.path}.lora_{side}.weight"].double() for side in "AB")
        name = f"{layer.path}.weight"
        delta = tuned.state_dict()[name].double() - base.state_dict()[name].double()
        assert layer.residual == pytest.approx(float((delta - up @ down).norm() / delta.norm()), rel=1e-4)
        ideal = float((delta - best(delta, 8)).norm() / delta.norm())
        assert ideal * (1 - 1e-7) <= layer.residual <= ideal * 1.001


def test_a_residual_that_the_dtype_cannot_hold_is_told(tmp_path: Path) -> None:
    sources(tmp_path, "llama", heads=False)
    for dtype, told in (("bfloat16", True), ("float32", False)):
        out = tmp_path / dtype
        report = coterie.extract(tmp_path / "base", tmp_path / "tuned", out, residual=1e-3, dtype=dtype)
        assert any("residual above 0.001" in warning for warning in report.warnings) == told


def gpt_oss() -> nn.Module:
    """Experts that are kept as (in, out), with biases beside them."""
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(config).eval()


def routed(folder: Path, arch: str, changed: str) -> tuple[nn.Module, nn.Module]:
    """A base, and a fine-tune of its routed experts (of the tensors whose names hold `changed`); on disk too."""
    base = gpt_oss() if arch == "gpt_oss" else base_model(arch)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".experts." in name and changed in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save(base, folder / "base"), save(tuned, folder / "tuned")
    return base, tuned


@pytest.mark.parametrize("changed", ["proj", "1.mlp.experts.down_proj"], ids=["all", "one"])
@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_routed_experts_in_one_parameter(tmp_path: Path, arch: str, changed: str) -> None:
    """Each has factors of its own, which PEFT reads, and which a merge and a build read again."""
    base, tuned = routed(tmp_path, arch, changed)
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=5, jobs=2)
    model = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    batch = {"input_ids": torch.arange(1, 15).view(2, 7)}
    before = outputs(model, batch)
    whole = model.merge_and_unload()
    torch.testing.assert_close(outputs(whole, batch), before, rtol=1e-4, atol=2e-5)
    old, new, got = base.state_dict(), tuned.state_dict(), whole.state_dict()
    layers = {layer.path: layer for layer in report.layers if layer.rank}
    assert set(layers) == {n for n in old if not old[n].equal(new[n]) and old[n].ndim == 3}
    for name in old:
        delta, wanted = (new[name] - old[name]).double(), torch.zeros_like(old[name]).double()
        if name in layers:
            wanted = torch.stack([best(matrix, 5) for matrix in delta])
            assert layers[name].residual == pytest.approx(float((delta - wanted).norm() / delta.norm()), rel=1e-5)
        torch.testing.assert_close(got[name].double() - old[name], wanted, rtol=0, atol=3e-6)
    keys = {"base": tmp_path / "base", "experts": {"x": tmp_path / "adapter"}}
    coterie.merge(method="task_arithmetic", parameters={"scale": 1.0}, out=tmp_path / "merged", **keys)
    again = type(base).from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name in old:
        torch.testing.assert_close(again[name], got[name], rtol=0, atol=3e-6)
    with pytest.raises(coterie.CoterieError, match="holds the factors of many experts"):
        coterie.merge(method="squeeze", out=tmp_path / "factors", **keys)


def test_routed_experts_reach_a_residual_or_stay_out(tmp_path: Path) -> None:
    base, tuned = routed(tmp_path, "mixtral", "down_proj")
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", residual=0.4)
    old, new = base.state_dict(), tuned.state_dict()
    for layer in (layer for layer in report.layers if layer.rank):
        delta = (new[layer.path] - old[layer.path]).double()
        left = [float((d - best(d, layer.rank)).norm() / d.norm()) for d in delta]
        less = [float((d - best(d, layer.rank - 1)).norm() / d.norm()) for d in delta]
        assert max(left) <= 0.4 < max(less) and layer.residual <= 0.4
    with pytest.raises(coterie.CoterieError, match="changes no linear layer"):
        coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "none", rank=2, exclude=["*experts*"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = load_file(file)
    name = next(n for n in held if n.endswith("lora_A.weight"))
    for damaged, said in (({name: held[name][1:]}, "shape"), ({}, "no pair of factors for each expert")):
        save_file({n: t.contiguous() for n, t in held.items() if n != name} | damaged, file)
        with pytest.raises(coterie.CoterieError, match=said):
            coterie.merge(
                method="average", base=tmp_path / "base", experts={"x": tmp_path / "adapter"}, out=tmp_path / "merged"
            )


def test_what_differs_beside_the_weights_is_told_in_an_adapters_words(tmp_path: Path) -> None:
    sources(tmp_path, "llama", heads=False)
    for name in ("base", "tuned"):
        (tmp_path / name / "chat_template.jinja").write_text(name)
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    assert "chat_template.jinja of expert 'fine-tune' differs from the base's; the adapter takes the base's" in (
        report.warnings
    )


def test_what_peft_refuses_to_adapt_is_saved_or_told(tmp_path: Path) -> None:
    """Mamba's kernels read the weight of out_proj themselves; what else is inside its mixer is saved all the same."""
    _, tuned = sources(tmp_path, "mamba")
    told = "2 layers out_proj are not adapted: PEFT refuses to in models of this type"
    assert told in coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "left", rank=64).warnings
    adapted(tmp_path, "mamba", "left")
    coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64, rest="save")
    batch = inputs("mamba")
    got = outputs(adapted(tmp_path, "mamba"), batch)
    torch.testing.assert_close(got, outputs(tuned, batch), rtol=1e-4, atol=2e-5)


def test_counts_of_training_steps_are_no_change(tmp_path: Path) -> None:
    """Fine-tunes with BatchNorm count on; layers that are adapted and a head beside them."""
    config = transformers.LevitConfig(
        image_size=16, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        kernel_size=3, stride=1, patch_size=4, num_labels=3,
    )  # fmt: skip
    base = transformers.LevitForImageClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, tensor in base.state_dict().items():
            tensor.add_(7 if name.endswith("num_batches_tracked") else 0.05 * torch.rand_like(tensor.float()))
    base.save_pretrained(tmp_path / "tuned")
    report = coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64, rest="save")
    names = [n for n, _ in base.named_parameters()] + [n for n, _ in base.named_buffers() if "running" in n]
    accounted = sum(rest.tensors for rest in report.rest.values()) + sum(layer.rank > 0 for layer in report.layers)
    assert accounted == len(names)
    keys = {"base": tmp_path / "base", "experts": {"a": tmp_path / "tuned"}, "others": "average"}
    coterie.build(method="smile", out=tmp_path / "mixture", **keys)


def test_the_adapter_is_an_expert_again(tmp_path: Path) -> None:
    _, tuned = sources(tmp_path, "bert", everything=True)
    coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=64, rest="save", head="save")
    coterie.build(
        base=tmp_path / "base", experts={"a": tmp_path / "adapter"}, method="smile", parameters={"rank": "full"},
        others="average", out=tmp_path / "mixture",
    )  # fmt: skip
    model = coterie.load(str(tmp_path / "mixture"))
    torch.testing.assert_close(outputs(model, inputs("bert")), outputs(tuned, inputs("bert")), rtol=1e-4, atol=2e-5)


def test_any_number_of_jobs_writes_the_same(tmp_path: Path) -> None:
    sources(tmp_path, "bert", everything=True)
    for jobs in (1, 3):
        coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / str(jobs), rank=4, rest="save", jobs=jobs)
    one, three = ((tmp_path / str(jobs) / "adapter_model.safetensors").read_bytes() for jobs in (1, 3))
    assert one == three


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sources(tmp_path, "llama", heads=False)
    shutil.copytree(tmp_path / "base", tmp_path / "same")
    shutil.copytree(tmp_path / "tuned", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    save(base_model("llama", hidden_size=16), tmp_path / "narrow")
    save(base_model("bert"), tmp_path / "other")
    coterie.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    cases = {
        ("tuned", "--rank", "0"): "rank is 0",
        ("tuned",): "either a rank or a residual",
        ("tuned", "--rank", "2", "--residual", "0.5"): "either a rank or a residual",
        ("tuned", "--residual", "1.5"): "residual is 1.5",
        ("tuned", "--rank", "2", "--rest", "keep"): "rest is 'keep'",
        ("tuned", "--rank", "2", "--dtype", "int3"): "dtype",
        ("tuned", "--rank", "2", "--jobs", "0"): "jobs is 0",
        ("tuned", "--rank", "2", "--include", "nothing*"): "no linear layer of LlamaForCausalLM is left",
        ("same", "--rank", "2"): "changes no linear layer",
        ("nan", "--rank", "2"): "NaN",
        ("narrow", "--rank", "2"): "shape",
        ("adapter", "--rank", "2"): "adapter already",
        ("absent", "--rank", "2"): "absent",
        ("other", "--rank", "2"): "is a 'bert' model, and the base (",
    }
    before = sorted(p.name for p in tmp_path.iterdir())
    for (source, *options), said in cases.items():
        arguments = [str(tmp_path / "base"), str(tmp_path / source), "-o", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["coterie", "extract", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and "Traceback" not in err, (source, options, err)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
