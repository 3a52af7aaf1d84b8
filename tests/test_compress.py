"""ComPEFT: the paper's formula in float64, a code of the size that theory gives, and an expert like any other."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import coterie
from coterie.cli import main
from coterie.errors import CoterieError
from coterie.sources import compressed
from coterie.sources.checkpoint import Checkpoint
from coterie.sources.compressed import bound, decode, encode
from coterie.sources.locate import locate
from zoo import base_model, fine_tune, inputs, load_dense, make_adapter, outputs, save


def formula(base: Tensor, tuned: Tensor, density: float, scale: float) -> Tensor:
    """base + alpha * std(tau) * sign(tau) where |tau| is among the k largest, in float64."""
    tau = (tuned.double() - base.double()).flatten()
    k = max(1, round(density * len(tau)))
    kept = torch.zeros_like(tau)
    top = tau.abs().argsort(descending=True, stable=True)[:k]
    kept[top] = tau[top].sign()
    return base.double() + (scale * tau.std(correction=0) * kept).view(base.shape)


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(locate(str(folder)))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@given(st.integers(0, 400), st.integers(0, 2**20))
@example(0, 0)
@example(1, 5)
def test_the_code_gives_back_what_it_took(count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    positions = np.sort(draw.choice(10 ** draw.integers(3, 8), count, replace=False).astype(np.int64))
    negative = draw.random(count) < 0.5
    bits = encode(positions, negative)
    found, signs = decode(bits)
    assert np.array_equal(found, positions) and np.array_equal(signs, negative)
    assert bits.signs.nbytes == -(-count // 8)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5])
def test_the_code_is_as_short_as_golombs(density: float) -> None:
    """The paper's b + 1 / (1 - (1 - p)^(2^b)) bits for a position; within 5% of what any code needs."""
    n = 400_000
    positions = np.flatnonzero(np.random.default_rng(0).random(n) < density)
    bits = encode(positions, np.zeros(len(positions), bool))
    golomb = min(b + 1 / (1 - (1 - density) ** (2**b)) for b in range(12))
    assert 8 * (bits.low.nbytes + bits.high.nbytes) / len(positions) == pytest.approx(golomb, rel=0.01)
    assert 8 * bits.bytes < 1.05 * bound(n, len(positions))
    p = len(positions) / n
    needed = n * (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) + len(positions)
    assert bound(n, len(positions)) == pytest.approx(needed)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "mixtral"])
def test_equals_the_papers_formula(tmp_path: Path, arch: str) -> None:
    base = base_model(arch)
    tuned = fine_tune(base, 1, everything=True)
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned", max_shard_size="20KB")
    report = coterie.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "small", density=0.15, scale=1.5)
    old = load_file(tmp_path / "base" / "model.safetensors")
    new = {name: t for f in (tmp_path / "tuned").glob("*.safetensors") for name, t in load_file(f).items()}
    found = read(tmp_path / "small")
    assert set(found) == set(new)
    missed = energy = 0.0
    for name, value in new.items():
        line = next(t for t in report.tensors if t.name == name)
        if name.startswith("classifier"):  # a head is no small change of the base's
            assert line.kept is None and torch.equal(found[name], value)
            continue
        if torch.equal(value, old[name]):
            assert line.kept == 0 and torch.equal(found[name], value)
            continue
        want = formula(old[name], value, 0.15, 1.5)
        torch.testing.assert_close(found[name].double(), want, rtol=1e-6, atol=1e-7)
        assert line.kept == max(1, round(0.15 * value.numel()))
        missed += float((value.double() - want).square().sum())
        energy += float((value.double() - old[name].double()).square().sum())
    assert report.residual == pytest.approx((missed / energy) ** 0.5, rel=1e-4)
    written = load_file(tmp_path / "small" / "compressed.safetensors")
    assert report.bytes_after == sum(t.numel() * t.element_size() for t in written.values())
    assert report.bytes_before == sum(t.numel() * t.element_size() for t in new.values())
    assert report.bytes_after < report.bytes_before / 12 and report.bound < report.bytes_after


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with eight weights of 8 x 8."""
    folder = tmp_path_factory.mktemp("square")
    save(base_model("llama", hidden_size=8, head_dim=2, num_key_value_heads=4), folder / "base")
    return folder


def compressed_deltas(folder: Path, density: float, scale: float, **deltas: Tensor) -> dict[str, Tensor]:
    """What is left of deltas (8, 8), each that of one weight of a fine-tune; all other tensors are the base's."""
    config, held = folder / "base" / "config.json", load_file(folder / "base" / "model.safetensors")
    weights = dict(zip(deltas, (name for name, t in held.items() if t.shape == (8, 8)), strict=False))
    tuned = held | {weights[of]: held[weights[of]] + delta for of, delta in deltas.items()}
    (folder / "tuned").mkdir(exist_ok=True)
    shutil.copyfile(config, folder / "tuned" / "config.json")
    save_file(tuned, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {"density": density, "scale": scale, "jobs": 1, "force": True}
    coterie.compress(folder / "base", folder / "tuned", folder / "small", **options)
    found = read(folder / "small")
    assert all(found[name].equal(held[name]) for name in set(held) - set(weights.values()))
    return {of: found[name] - held[name] for of, name in weights.items()}


@given(st.integers(0, 2**20), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_properties(square: Path, seed: int, density: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    delta = (torch.randperm(64, generator=draw) + 1) / 16 * torch.randn(64, generator=draw).sign()  # no two alike
    delta, order = delta.view(8, 8), torch.randperm(64, generator=draw)
    forms = {
        "delta": delta,
        "same": delta,
        "scaled": -4 * delta,
        "permuted": delta.flatten()[order].view(8, 8),
        "zero": torch.zeros(8, 8),
    }
    found = compressed_deltas(square, density, 1.0, **forms)
    near: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}  # the base is added and taken off in float32
    assert int((found["delta"] != 0).sum()) == max(1, round(density * 64))
    torch.testing.assert_close(found["same"], found["delta"], **near)
    torch.testing.assert_close(found["scaled"], -4 * found["delta"], **near)
    torch.testing.assert_close(found["permuted"], found["delta"].flatten()[order].view(8, 8), **near)
    assert not found["zero"].any()
    alone = compressed_deltas(square, density, 2.5, delta=delta)  # one tensor changed; the paper's alpha
    torch.testing.assert_close(alone["delta"], 2.5 * found["delta"], **near)


def test_all_of_one_magnitude_and_half_precision(tmp_path: Path) -> None:
    base = base_model("llama").bfloat16()
    tuned = fine_tune(base.float(), 1, everything=True).bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        tuned.get_parameter(name).copy_(base.get_parameter(name) + 0.25)  # one magnitude: nothing to choose by
        sparse = tuned.get_parameter("model.layers.1.mlp.up_proj.weight")
        sparse.copy_(base.get_parameter("model.layers.1.mlp.up_proj.weight"))
        sparse[0, :3] += 1.0  # fewer changes than would be kept
    save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = coterie.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "small", density=0.25)
    lines = {line.name: line for line in report.tensors}
    old, new = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "tuned"))
    found = read(tmp_path / "small")
    assert lines["model.layers.1.mlp.up_proj.weight"].kept == 3
    assert all(line.kept in (None, 0, 3) or line.kept == round(0.25 * line.numel) for line in lines.values())
    for key in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        tau = (new[key].float() - old[key].float()).flatten()
        delta = (found[key] - old[key].float()).flatten()
        kept = delta != 0
        assert int(kept.sum()) == lines[key].kept  # though many magnitudes are equal
        assert tau[kept].abs().min() >= tau[~kept].abs().max()
        size = float(tau.double().std(correction=0))
        torch.testing.assert_close(delta[kept], tau[kept].sign() * size, rtol=1e-4, atol=1e-6)


def test_build_merge_and_extract_read_it(tmp_path: Path) -> None:
    base = base_model("bert")
    models = [fine_tune(base, seed) for seed in (1, 2)]
    save(base, tmp_path / "base")
    for name, model in zip("ab", models, strict=True):
        save(model, tmp_path / name)
        coterie.compress(tmp_path / "base", tmp_path / name, tmp_path / f"small {name}", density=0.3)
        dense = base_model("bert")
        dense.load_state_dict(read(tmp_path / f"small {name}"))
        save(dense, tmp_path / f"dense {name}")
    for command in (build, merge):
        small, dense = (command(tmp_path, form) for form in ("small", "dense"))
        torch.testing.assert_close(small, dense, rtol=1e-5, atol=1e-6)
    report = coterie.extract(tmp_path / "base", tmp_path / "small a", tmp_path / "adapter", rank=2)
    assert any(layer.rank == 2 for layer in report.layers)


def build(folder: Path, form: str) -> Tensor:
    experts = {name: folder / f"{form} {name}" for name in "ab"}
    coterie.build(method="smile", base=folder / "base", experts=experts, parameters={"rank": 4, "gate_rank": 2},
                  others="average", out=folder / f"mixture {form}")  # fmt: skip
    return outputs(coterie.load(str(folder / f"mixture {form}")), inputs("bert"))


def merge(folder: Path, form: str) -> Tensor:
    experts = {name: str(folder / f"{form} {name}") for name in "ab"}
    recipe = {"method": "task_arithmetic", "base": str(folder / "base"), "experts": experts, "head": "a"}
    coterie.merge(recipe, out=folder / f"merged {form}")
    return outputs(load_dense(folder / f"merged {form}", "bert"), inputs("bert"))


def test_a_head_that_the_base_lacks_is_kept_whole(tmp_path: Path) -> None:
    base = base_model("bert")
    save(base.bert, tmp_path / "base")
    tuned = fine_tune(base, 1)
    save(tuned, tmp_path / "tuned")
    report = coterie.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "small", density=1.0)
    assert {line.name for line in report.tensors if line.kept is None} == {"classifier.weight", "classifier.bias"}
    found = read(tmp_path / "small")
    assert torch.equal(found["classifier.weight"], tuned.classifier.weight)
    assert any(line.kept for line in report.tensors if line.name.startswith("bert."))  # the base's have no prefix


def test_any_number_of_jobs_writes_the_same(tmp_path: Path) -> None:
    save(base_model("bert"), tmp_path / "base"), save(fine_tune(base_model("bert"), 1), tmp_path / "tuned")
    for jobs in (1, 3):
        coterie.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / str(jobs), jobs=jobs)
    one, three = ((tmp_path / str(jobs) / "compressed.safetensors").read_bytes() for jobs in (1, 3))
    assert one == three


def test_threads_side_by_side_decode_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(base_model("bert"), tmp_path / "base"), save(fine_tune(base_model("bert"), 1), tmp_path / "tuned")
    coterie.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "small")
    checkpoint = Checkpoint.open(locate(str(tmp_path / "small")))
    names, decoded = [name for name in checkpoint.tensors if name.endswith("key.weight")][:2], []
    monkeypatch.setattr(compressed, "decode", lambda bits: decoded.append(bits) or decode(bits))
    turns = [threading.Barrier(2) for _ in range(3)]

    def blocks(name: str) -> None:
        for turn in turns:
            turn.wait()
            checkpoint.block(name, 0, 4)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(blocks, names))
    assert len(decoded) == 2


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_model("llama")
    save(base, tmp_path / "base"), save(fine_tune(base, 1), tmp_path / "tuned")
    make_adapter(tmp_path / "base", tmp_path / "adapter", 1, arch="llama")
    cases = {
        ("tuned", "--density", "0"): "density is 0",
        ("tuned", "--density", "1.5"): "density is 1.5",
        ("tuned", "--scale", "-1"): "scale is -1",
        ("tuned", "--jobs", "0"): "jobs is 0",
        ("adapter",): "is an adapter",
        ("absent",): "absent",
    }
    before = sorted(p.name for p in tmp_path.iterdir())
    for (source, *options), said in cases.items():
        arguments = [str(tmp_path / "base"), str(tmp_path / source), "-o", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", ["coterie", "compress", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and "Traceback" not in err, err
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    coterie.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "small")
    facts = json.loads((tmp_path / "small" / "compressed.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"

    def damaged(said: str, **changes: object) -> None:
        other = json.loads(json.dumps(facts))
        other["tensors"][name] |= changes
        (tmp_path / "small" / "compressed.json").write_text(json.dumps(other))
        with pytest.raises(CoterieError, match=said):
            read(tmp_path / "small")

    damaged("damaged", count=10**6)
    damaged("damaged", width=-3)
    damaged("has no tensor", shape=[3, 3])
    damaged("has no tensor", base="nothing")
    damaged("not the one", sha256="0")
    del facts["tensors"][name]["value"]
    damaged("damaged")
    (tmp_path / "small" / "compressed.json").write_text("{}")
    with pytest.raises(CoterieError, match="damaged"):
        read(tmp_path / "small")
    shutil.copytree(tmp_path / "tuned", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors[name][0, 0] = float("inf")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CoterieError, match="NaN or infinite"):
        coterie.compress(tmp_path / "base", tmp_path / "nan", tmp_path / "out")
