"""What is written is what was built, and every way of loading it gives the same tensors and the same answers."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import coterie
from coterie.errors import CoterieError
from matching import build, python, relative_error, smile
from zoo import ALL, ARCHS, base_model, fine_tune, inputs, make_adapter, outputs, save

FAST = ["bert", "clip", "t5", "gpt2", "qwen2", "mixtral"]
EVERY = [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in ALL]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory; a name in two shards is an error."""
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            assert name not in found
            found[name] = tensor
    return found


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and bits are equal."""
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def make(arch: str, tmp_path: Path, **options) -> Path:
    """A mixture directory from a fine-tune and, where there are any, an adapter."""
    base = base_model(arch)
    save(base, tmp_path / "base")
    save(fine_tune(base, 1), tmp_path / "tuned")
    sources = {"tuned": tmp_path / "tuned"}
    if ARCHS[arch].targets:
        sources["adapter"] = make_adapter(tmp_path / "base", tmp_path / "adapter", 2, arch=arch)
    parameters = {"rank": 6, "gate_rank": 4, "top_k": 1}
    build(tmp_path / "out", tmp_path / "base", sources, parameters=parameters, load=False, **options)
    return tmp_path / "out"


@pytest.mark.parametrize("arch", EVERY)
def test_round_trip(arch, tmp_path):
    out = make(arch, tmp_path)
    batch = inputs(arch)
    mixture = coterie.load(out).eval()
    assert isinstance(mixture, getattr(transformers, ARCHS[arch].model))
    wanted = outputs(mixture, batch)

    again, info = getattr(transformers, ARCHS[arch].auto).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert torch.equal(outputs(again.eval(), batch), wanted)
    assert_same_tensors(mixture.state_dict(), again.state_dict())

    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(tensors(out), tensors(tmp_path / "again"))
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(outputs(coterie.load(tmp_path / "again").eval(), batch), wanted)


@pytest.mark.parametrize("arch", EVERY)
def test_files_hold_the_parameters_and_no_more(arch, tmp_path):
    out = make(arch, tmp_path)
    mixture = coterie.load(out)
    held = {id(t): t.numel() * t.element_size() for t in [*mixture.parameters(), *mixture.buffers()]}
    parameters = sum(p.numel() * p.element_size() for p in mixture.parameters())
    data = 0
    for shard in out.glob("*.safetensors"):
        header = struct.unpack("<Q", shard.read_bytes()[:8])[0]
        data += shard.stat().st_size - header - 8
    assert data >= 0.99 * parameters
    assert data <= 1.01 * sum(held.values())


def test_file_size_of_a_wider_model(tmp_path):
    base = base_model("bert", hidden_size=192, intermediate_size=384)
    save(base, tmp_path / "base")
    for seed in (1, 2):
        save(fine_tune(base, seed), tmp_path / f"e{seed}")
    sources = {f"e{s}": tmp_path / f"e{s}" for s in (1, 2)}
    mixture = build(tmp_path / "out", tmp_path / "base", sources, parameters={"rank": 8, "gate_rank": 4})
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    parameters = sum(p.numel() * p.element_size() for p in mixture.parameters())
    assert abs(size - parameters) <= 0.01 * parameters + 16384  # the header of a small file counts


@pytest.mark.parametrize("arch", ["llama", "clip"])
def test_sharded_sources_and_sharded_mixtures(arch, tmp_path):
    base = base_model(arch)
    tuned = fine_tune(base, 1)
    for name, model in {"base": base, "tuned": tuned}.items():
        save(model, tmp_path / name)
        save(model, tmp_path / f"{name}-sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "base-sharded").glob("*.safetensors"))) > 2
    one = build(tmp_path / "one", tmp_path / "base", {"e": tmp_path / "tuned"}, parameters={"rank": 6})
    many = build(
        tmp_path / "many", tmp_path / "base-sharded", {"e": tmp_path / "tuned-sharded"}, parameters={"rank": 6}
    )
    assert_same_tensors(one.state_dict(), many.state_dict())
    many.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    assert_same_tensors(one.state_dict(), coterie.load(tmp_path / "again").state_dict())
    assert_same_tensors(tensors(tmp_path / "one"), tensors(tmp_path / "again"))


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_dtype_and_device_map(arch, tmp_path):
    out = make(arch, tmp_path)
    batch = inputs(arch)
    wanted = outputs(coterie.load(out).eval(), batch)
    for route in (coterie.load, getattr(transformers, ARCHS[arch].auto).from_pretrained):
        half = route(out, dtype=torch.bfloat16).eval()
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert relative_error(outputs(half, batch).float(), wanted) < 0.1
        for placement in ("cpu", {"": "cpu"}, "auto"):
            placed = route(out, device_map=placement).eval()
            assert relative_error(outputs(placed, batch).cpu(), wanted) < 1e-5
            assert not any(p.is_meta for p in [*placed.parameters(), *placed.buffers()])
        eager = route(out, attn_implementation="eager").eval()
        assert relative_error(outputs(eager, batch), wanted) < 1e-5


@pytest.mark.parametrize("arch", ["bert", "t5", "gpt2", "clip"])
def test_live_mixtures_save_too(arch, tmp_path):
    """``coterie.smile`` and ``coterie.build`` give one mixture: same tensors, same answers, both can be saved."""
    base = base_model(arch)
    tuned = [fine_tune(base, s) for s in (1, 2)]
    save(base, tmp_path / "base")
    for i, model in enumerate(tuned):
        save(model, tmp_path / f"e{i}")
    sources = {f"e{i}": tmp_path / f"e{i}" for i in range(2)}
    built = build(tmp_path / "out", tmp_path / "base", sources, parameters={"rank": 6, "gate_rank": 4})
    live = smile(base, {f"e{i}": t for i, t in enumerate(tuned)}, rank=6, gate_rank=4)
    batch = inputs(arch)
    assert relative_error(outputs(live, batch), outputs(built, batch)) < 1e-5
    live.save_pretrained(tmp_path / "live")
    assert set(tensors(tmp_path / "live")) == set(tensors(tmp_path / "out"))
    assert torch.equal(outputs(coterie.load(tmp_path / "live").eval(), batch), outputs(live, batch))


def test_a_mixture_directory_holds_what_the_design_says(tmp_path):
    out = make("bert", tmp_path)
    for name in ("config.json", "mixture.json", "README.md"):
        assert (out / name).is_file()
    assert not [f for f in out.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert (out / "README.md").read_text().startswith("---\n")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["model_type"] == "bert"
    for name, tensor in tensors(out).items():
        assert tensor.is_contiguous(), name
    text = (out / "mixture.json").read_text()
    json.loads(text, parse_constant=lambda c: pytest.fail(f"mixture.json holds {c}, which is no JSON"))
    (weights,) = out.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(CoterieError, match=r"truncated or damaged.*build or fetch it again"):
        coterie.load(str(out))


LOAD = """
import json, sys
{imports}
sys.path.insert(0, sys.argv[3])
import zoo
from safetensors.torch import save_file
model = {load}
state = {{n: t.clone() for n, t in model.state_dict().items()}}
state["answer"] = zoo.outputs(model.eval(), zoo.inputs(sys.argv[4]))
save_file(state, sys.argv[2])
"""

ORDERS = {
    "coterie first": ("import coterie\nimport transformers", "transformers.{auto}.from_pretrained(sys.argv[1])"),
    "coterie last": ("import transformers\nimport coterie", "transformers.{auto}.from_pretrained(sys.argv[1])"),
    "class first": (
        "from transformers import {auto}\nimport coterie",
        "{auto}.from_pretrained(sys.argv[1])",
    ),
    "class last": (
        "import coterie\nfrom transformers import {auto}",
        "{auto}.from_pretrained(sys.argv[1])",
    ),
    "modeling first": (
        "import transformers.modeling_utils\nimport transformers.quantizers.auto\nimport coterie\nimport transformers",
        "transformers.{model}.from_pretrained(sys.argv[1])",
    ),
    "coterie only": ("import coterie", "coterie.load(sys.argv[1])"),
    "torch and peft first": (
        "import torch\nimport peft\nimport coterie\nimport transformers",
        "transformers.{auto}.from_pretrained(sys.argv[1])",
    ),
}


ALWAYS = ["coterie first", "coterie last", "class first", "coterie only"]


@pytest.mark.parametrize("order", [o if o in ALWAYS else pytest.param(o, marks=pytest.mark.slow) for o in ORDERS])
def test_import_orders(order, tmp_path):
    arch = "bert"
    out = make(arch, tmp_path)
    names = {"auto": ARCHS[arch].auto, "model": ARCHS[arch].model}
    imports, load = (part.format(**names) for part in ORDERS[order])
    python(LOAD.format(imports=imports, load=load), out, tmp_path / "got.safetensors", Path(__file__).parent, arch)
    got = load_file(tmp_path / "got.safetensors")
    mixture = coterie.load(out).eval()
    assert torch.equal(got.pop("answer"), outputs(mixture, inputs(arch)))
    assert_same_tensors(got, mixture.state_dict())
