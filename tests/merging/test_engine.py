"""The engine of merges: exact to the output's rounding, the same however it runs, and what its report says is true."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

import coterie
from coterie.building.directory import whole_directory
from coterie.building.journal import JOURNAL
from coterie.merging import merge_states, registry, steps
from coterie.merging.merge import plan
from coterie.merging.registry import merge_method
from coterie.merging.statistics import Statistics
from matching import python
from test_build_resume import KILLS
from zoo import base_model, fine_tune, make_adapter, merged, save

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes, one of everything; and an adapter."""
    root = tmp_path_factory.mktemp("sources")
    base = base_model("llama")
    save(base, root / "base", max_shard_size="20KB")
    for seed, name in enumerate(NAMES):
        save(fine_tune(base, seed, everything=name == "b"), root / name, max_shard_size="30KB")
    make_adapter(root / "base", root / "adapter", 3, arch="llama")
    return root


def recipe(root: Path, method: str = "task_arithmetic", names: tuple[str, ...] = NAMES, **keys: Any) -> dict[str, Any]:
    experts = {name: str(root / name) for name in names}
    return {"method": method, "base": str(root / "base"), "experts": experts, **keys}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, Any]:
    """Every file byte by byte; of `merge.json` everything but what the merge cost."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    account = json.loads(found["merge.json"])
    for cost in ("seconds", "peak_memory"):
        del account["report"][cost]
    return {**found, "merge.json": json.dumps(account)}


def cast(root: Path, to: Path, dtype: torch.dtype) -> None:
    """The sources in another dtype."""
    for name in ("base", *NAMES):
        (to / name).mkdir(parents=True)
        config = json.loads((root / name / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        (to / name / "config.json").write_text(json.dumps(config))
        save_file({n: t.to(dtype) for n, t in tensors(root / name).items()}, to / name / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_linear_merges_are_exact_to_the_rounding_of_the_output(sources, tmp_path, dtype, method):
    cast(sources, tmp_path, dtype)
    parameters = {"scale": 0.5} if method == "task_arithmetic" else {}
    coterie.merge(recipe(tmp_path, method, parameters=parameters), out=tmp_path / "out")
    out, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    experts = [tensors(tmp_path / name) for name in NAMES]
    assert set(out) == set(base)
    for name, own in base.items():
        deltas = sum(e[name].double() - own.double() for e in experts)
        wanted = own.double() + (deltas / 3 if method == "average" else 0.5 * deltas)
        assert out[name].dtype == dtype
        # float32 on the way may move a value over the middle between two of the output's by its own rounding at most
        near = (wanted - wanted.abs() * 2e-6 - 1e-9).to(dtype), (wanted + wanted.abs() * 2e-6 + 1e-9).to(dtype)
        assert ((near[0] <= out[name]) & (out[name] <= near[1])).all()
        assert out[name].equal(wanted.to(dtype)) or (out[name] != wanted.to(dtype)).float().mean() < 1e-3


def test_weights_and_parameters_by_pattern(sources, tmp_path):
    given = recipe(sources, parameters={"scale": [{"filter": "*mlp*", "value": 0.0}, {"value": 0.5}]})
    given["experts"]["a"] = {"source": str(sources / "a"), "weight": [{"filter": "*q_proj*", "value": 3.0}]}
    given["experts"]["b"] = {"source": str(sources / "b"), "weight": -1}
    coterie.merge(given, out=tmp_path / "out")
    out, base = tensors(tmp_path / "out"), tensors(sources / "base")
    a, b, c = (tensors(sources / name) for name in NAMES)
    for name, own in base.items():
        weight, scale = 3.0 if "q_proj" in name else 1.0, 0.0 if "mlp" in name else 0.5
        wanted = own + scale * (weight * (a[name] - own) - (b[name] - own) + (c[name] - own))
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=1e-6)


def test_without_a_base(sources, tmp_path):
    given = recipe(sources, "average")
    del given["base"]
    given["experts"]["a"] = {"source": str(sources / "a"), "weight": 2.0}
    report = coterie.merge(given, out=tmp_path / "out")
    assert report.lines[0].moved is None
    a, b, c = (tensors(sources / name) for name in NAMES)
    for name, value in tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, (2 * a[name] + b[name] + c[name]) / 4, rtol=0, atol=1e-6)


def test_an_adapter_is_its_delta(sources, tmp_path):
    report = coterie.merge(recipe(sources, names=("a", "adapter"), parameters={"scale": 0.5}), out=tmp_path / "out")
    out, base, a = tensors(tmp_path / "out"), tensors(sources / "base"), tensors(sources / "a")
    whole = merged(sources / "base", sources / "adapter", "llama").state_dict()
    assert set(out) == set(base) and len(report.lines) == len(base)
    for name, own in base.items():
        wanted = own + 0.5 * (a[name] - own + whole[name] - own)
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=1e-6)


def test_narrower_experts_bring_no_rounding(sources, tmp_path, monkeypatch):
    """An expert in bfloat16 of a float32 base: what it never changed is no delta; and what was read is hashed whole."""
    monkeypatch.setattr("coterie.merging.stack.BLOCK", 100)
    cast(sources, tmp_path, torch.bfloat16)
    given = recipe(sources, names=("a",), parameters={"scale": 1.0})
    given["experts"]["a"] = str(tmp_path / "a")
    coterie.merge(given, out=tmp_path / "out")
    out, base, a = tensors(tmp_path / "out"), tensors(sources / "base"), tensors(tmp_path / "a")
    kept = [name for name in base if out[name].equal(base[name])]
    assert "model.embed_tokens.weight" in kept
    changed = [name for name in base if name not in kept]
    assert changed
    for name in changed:
        torch.testing.assert_close(out[name], a[name].float(), rtol=0, atol=1e-6)
    read = json.loads((tmp_path / "out" / "merge.json").read_text())["tensors_read"]["expert a"]
    assert read == {n: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in a.items()}


# --- the same however it runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "dare", "tsv_m"])
def test_jobs_and_blocks_do_not_show(sources, tmp_path, method):
    for jobs in (1, 3):
        coterie.merge(recipe(sources, method), out=tmp_path / str(jobs), jobs=jobs, max_shard_bytes=9000)
    one, three = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert one == three


def test_the_seed_shows(sources, tmp_path):
    for seed in (0, 1):
        coterie.merge(recipe(sources, "dare", seed=seed), out=tmp_path / str(seed))
    zero, one = tensors(tmp_path / "0"), tensors(tmp_path / "1")
    assert any(not zero[name].equal(one[name]) for name in zero)


def test_an_interrupted_merge_goes_on(sources, tmp_path, monkeypatch):
    given = recipe(sources, "ties")
    coterie.merge(given, out=tmp_path / "whole", max_shard_bytes=9000)
    import coterie.merging.merge as engine

    made: list[str] = []
    whole = engine.make_step

    def broken(opened: Any, sums: Any, step: str) -> Any:
        made.append(step)
        if len(made) == 14:
            raise KeyboardInterrupt
        return whole(opened, sums, step)

    monkeypatch.setattr(engine, "make_step", broken)
    with pytest.raises(KeyboardInterrupt):
        coterie.merge(given, out=tmp_path / "out", max_shard_bytes=9000, jobs=1)
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.glob(".out.partial-*"))
    assert len(left) == 1 and len((left[0] / JOURNAL).read_text().splitlines()) > 1
    before = len(made)
    coterie.merge(given, out=tmp_path / "out", max_shard_bytes=9000, jobs=1, resume=True)
    assert 0 < len(made) - before < len(tensors(sources / "base"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["ties", "squeeze"])
def test_killed_at_random_points(sources, tmp_path, method):
    """A merge that surveys all deltas first, in many shards; and one of adapters, in the one file that PEFT reads."""
    adapters = method == "squeeze"
    if adapters:
        make_adapter(sources / "base", tmp_path / "other", 5, arch="llama")
    given = recipe(sources, method, ("adapter",) if adapters else NAMES)
    given["experts"] |= {"other": str(tmp_path / "other")} if adapters else {}
    (tmp_path / "out").mkdir()
    run = ("coterie.merging.merge", "merge", "make_step")
    told = python(KILLS, json.dumps(given), tmp_path / "out", 9000, 3, 6, 2, *run)
    points = [json.loads(line) for line in told.splitlines()]
    wanted = contents(tmp_path / "out" / "whole")
    assert len(points) == 8 and sum(point["killed"] for point in points) >= 6
    for index, point in enumerate(points):
        assert contents(tmp_path / "out" / f"out{index}") == wanted, point
        if point["found"] > 2:
            assert point["made"] < len(tensors(sources / "base"))
    assert adapters or sum(point["found"] > 0 for point in points) >= 2
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".") and ".new-" not in p.name]


def test_another_recipe_does_not_go_on(sources, tmp_path):
    identity = {"recipe": {"method": "ties"}}
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "out", identity=identity) as folder:
        (folder / JOURNAL).write_text(json.dumps(identity) + "\n" + json.dumps({"shard": {}}) + "\n")
        raise KeyboardInterrupt
    with pytest.raises(coterie.CoterieError, match="cannot be gone on with"):
        coterie.merge(recipe(sources), out=tmp_path / "out", resume=True)


def test_blocks_are_the_whole_tensor(sources, tmp_path, monkeypatch):
    """Elementwise merges of small blocks are those of whole tensors, and so is what the report sums up."""
    whole = coterie.merge(recipe(sources), out=tmp_path / "whole")
    monkeypatch.setattr(steps, "BLOCK", 100)
    monkeypatch.setattr("coterie.merging.stack.BLOCK", 100)
    blocks = coterie.merge(recipe(sources), out=tmp_path / "blocks")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    assert all(one[name].equal(other[name]) for name in one)
    assert blocks.total.conflict == pytest.approx(whole.total.conflict, rel=1e-5)
    assert blocks.total.cosines == pytest.approx(whole.total.cosines, rel=1e-5)


def test_hashes_are_of_what_was_read(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "BLOCK", 100)
    for method in ("task_arithmetic", "ties_per_tensor"):
        coterie.merge(recipe(sources, method, norm_budget=0.5), out=tmp_path / method)
        read = json.loads((tmp_path / method / "merge.json").read_text())["tensors_read"]
        assert set(read) == {"base", "expert a", "expert b", "expert c"}
        for source, hashes in read.items():
            held = tensors(sources / source.removeprefix("expert "))
            assert hashes == {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in held.items()}


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_says_what_naive_numbers_say(sources, tmp_path):
    given = recipe(sources, parameters={"scale": 0.4})
    given["experts"]["a"] = {"source": str(sources / "a"), "weight": 2.0}
    report = coterie.merge(given, out=tmp_path / "out", report="full")
    out, base = tensors(tmp_path / "out"), tensors(sources / "base")
    experts = [tensors(sources / name) for name in NAMES]
    for line in report.lines:
        own = base[line.name].double().numpy().ravel()
        deltas = np.stack([e[line.name].double().numpy().ravel() - own for e in experts])
        moved = out[line.name].double().numpy().ravel() - own
        weighted = deltas * np.array([[2.0], [1.0], [1.0]])
        norms = np.linalg.norm(deltas, axis=1)
        assert line.moved == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(own), rel=1e-4, abs=1e-7)
        assert line.experts == pytest.approx(norms, rel=1e-4, abs=1e-6)
        assert line.distances == pytest.approx(np.linalg.norm(moved - deltas, axis=1), rel=1e-3, abs=1e-4)
        if norms.all():
            assert line.reach == pytest.approx(np.linalg.norm(moved) / norms.mean(), rel=1e-4)
            assert line.cosines == pytest.approx(deltas @ moved / norms / np.linalg.norm(moved), rel=1e-3, abs=1e-4)
        against = np.sign(weighted) != np.sign(weighted.sum(0))
        if np.abs(weighted).sum():
            assert line.conflict == pytest.approx((np.abs(weighted) * against).sum() / np.abs(weighted).sum(), abs=1e-5)
    q = next(line for line in report.lines if "q_proj" in line.name)
    bases = [np.linalg.svd((e[q.name].double() - base[q.name].double()).numpy())[2][:16] for e in experts]
    pairs = [np.square(bases[i] @ bases[j].T).sum() / 16 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert q.overlap == pytest.approx(np.mean(pairs), abs=1e-4)
    assert q.chance == 16 / base[q.name].shape[1]
    assert next(line for line in report.lines if "norm" in line.name).overlap is None
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["report"]["total"]["moved"] > 0


def test_experts_that_pull_apart_are_told(sources, tmp_path):
    given = recipe(sources, names=("a", "b"), parameters={"scale": 1.0})
    base, a = tensors(sources / "base"), tensors(sources / "a")
    opposite = {name: 2 * own - a[name] for name, own in base.items()}
    (tmp_path / "b").mkdir()
    save_file(opposite, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text((sources / "a" / "config.json").read_text())
    given["experts"]["b"] = str(tmp_path / "b")
    report = coterie.merge(given, out=tmp_path / "out")
    assert any("opposite directions: 50%" in warning for warning in report.warnings)


def test_what_has_no_effect_is_told(sources, tmp_path):
    scale = [{"filter": "*self_attn*", "value": 0.1}, {"filter": "*atention*", "value": 0.2}]
    experts = {"a": {"source": str(sources / "a"), "weight": [{"filter": "*head_*", "value": 0.5}]}}
    keys = recipe(sources, parameters={"scale": scale}, others={"*norn*": "base"}, head="a") | {"experts": experts}
    told = coterie.merge(keys, out=tmp_path / "out").warnings
    for key, glob in (("scale", "*atention*"), ("weight of 'a'", "*head_*"), ("others", "*norn*")):
        assert f"{key}: no name matches {glob!r}" in told
    assert any(warning.startswith("head: this model has no task head") for warning in told)
    alone = coterie.merge(recipe(sources, "consensus", ("a",)), out=tmp_path / "alone")
    assert alone.warnings == ["nothing of the experts' changes is left in the merge: this is the base"]


@pytest.mark.parametrize("path", ["plain", "skeleton"])
def test_tokenizers_and_templates_that_differ_are_told(sources, tmp_path, path):
    for name in ("base", "a"):
        shutil.copytree(sources / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(name)
        # How it padded when it was called last does not differ in what texts become; its model does.
        tokenizer = {"padding": {"length": name}, "model": {"type": "BPE" if path == "plain" else name}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    experts = {"a": str(tmp_path / "a")} | ({} if path == "plain" else {"x": str(sources / "adapter")})
    keys = {"method": "average", "experts": experts}
    told = coterie.merge(keys | {"base": str(tmp_path / "base")}, out=tmp_path / "out").warnings
    assert "chat_template.jinja of expert 'a' differs from the base's; the merge takes the base's" in told
    assert any("tokenizer.json of expert 'a'" in warning for warning in told) == (path == "skeleton")
    assert not any("mixture" in warning for warning in told)
    if path == "plain":
        told = coterie.merge(method="average", experts={"c": str(tmp_path / "base"), **experts}, out=tmp_path / "two")
        assert any("from the first expert's; the merge takes the first expert's" in each for each in told.warnings)


def test_large_values_are_no_overflow(tmp_path):
    """Their squares are more than float32 holds, and the report says what float64 does."""
    for name, factor in (("base", 1.0), ("a", 1.5), ("b", 1.25)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["Any"]}))
        save_file({"w": torch.full((4, 4), 1e20 * factor)}, tmp_path / name / "model.safetensors")
    experts = {name: str(tmp_path / name) for name in ("a", "b")}
    keys = {"base": str(tmp_path / "base"), "experts": experts, "norm_budget": 10.0}
    report = coterie.merge(method="task_arithmetic", parameters={"scale": 1.0}, out=tmp_path / "out", **keys)
    torch.testing.assert_close(tensors(tmp_path / "out")["w"], torch.full((4, 4), 1.75e20), rtol=1e-6, atol=0)
    assert report.lines[0].moved == pytest.approx(0.75) and report.lines[0].experts == pytest.approx([2e20, 1e20])
    with pytest.raises(coterie.CoterieError, match="overflows"):
        coterie.merge(method="task_arithmetic", parameters={"scale": 5e18}, out=tmp_path / "over", **keys)
    save_file({"w": torch.full((4, 4), 3e38)}, tmp_path / "base" / "model.safetensors")
    save_file({"w": torch.full((4, 4), 3.3e38)}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(coterie.CoterieError, match="overflows float32"):
        keys["experts"] = {"a": str(tmp_path / "a")}
        coterie.merge(method="task_arithmetic", parameters={"scale": 2.0}, out=tmp_path / "over", **keys)


def test_norm_budget(sources, tmp_path):
    free = coterie.merge(recipe(sources, parameters={"scale": 1.0}), out=tmp_path / "free")
    report = coterie.merge(recipe(sources, parameters={"scale": 1.0}, norm_budget=0.5), out=tmp_path / "out")
    base, out, far = (tensors(f) for f in (sources / "base", tmp_path / "out", tmp_path / "free"))
    assert max(line.reach or 0 for line in free.lines) > 1
    for line in report.lines:
        assert (line.reach or 0) <= 0.5 + 1e-5
        own = base[line.name]
        torch.testing.assert_close(out[line.name], own + line.capped * (far[line.name] - own), rtol=0, atol=1e-6)


# --- what a method is given ---------------------------------------------------------------------------------------


@pytest.fixture
def probing(monkeypatch):
    """A merge of each kind that says what it was given."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(registry, "_MERGES", dict(registry._MERGES))
    for acts_on in ("elements", "tensor", "matrix"):

        @merge_method(f"probe_{acts_on}", cite="-", acts_on=acts_on)
        def probe(
            deltas: Tensor,
            base: Tensor,
            weights: Tensor,
            generator: torch.Generator,
            *,
            scale: Annotated[float, Field(description="of the first")] = 1.0,
        ) -> Tensor:
            """The first delta."""
            seen.append((str(tuple(weights.tolist())), tuple(deltas.shape)))
            assert deltas.dtype == base.dtype == torch.float32 and base.shape == deltas.shape[1:]
            assert generator.initial_seed() >= 0
            return scale * deltas[0]

    return seen


def test_shapes_that_a_method_sees(sources, tmp_path, probing):
    base = tensors(sources / "base")
    coterie.merge(recipe(sources, "probe_elements"), out=tmp_path / "elements")
    assert {shape for _, shape in probing} == {(3, t.numel()) for t in base.values()}
    probing.clear()
    coterie.merge(recipe(sources, "probe_tensor"), out=tmp_path / "tensor")
    assert {shape for _, shape in probing} == {(3, *t.shape) for t in base.values()}
    probing.clear()
    coterie.merge(
        recipe(sources, "probe_matrix", others="base", modules={"exclude": ["*mlp*"]}), out=tmp_path / "matrix"
    )
    assert {shape for _, shape in probing} == {(3, *t.shape) for n, t in base.items() if "self_attn" in n}
    out, a = tensors(tmp_path / "matrix"), tensors(sources / "a")
    for name, own in base.items():
        torch.testing.assert_close(out[name], a[name] if "self_attn" in name else own, rtol=0, atol=1e-6)


def test_others_override_by_glob(sources, tmp_path, probing):
    given = recipe(sources, "probe_elements", others={"*norm*": "base", "*embed*": "average"})
    report = coterie.merge(given, out=tmp_path / "out")
    methods = {line.name: line.method for line in report.lines}
    assert methods["model.embed_tokens.weight"] == "average"
    assert "model.norm.weight" not in methods and "model.norm.weight" in report.kept
    assert methods["lm_head.weight"] == "probe_elements"


def test_in_memory_is_as_from_disk(sources, tmp_path):
    base, experts = tensors(sources / "base"), [tensors(sources / name) for name in NAMES]
    matrices = {name for name in base if "proj" in name}
    for method in ("ties", "dare", "iso_c", "ties_per_tensor"):
        coterie.merge(recipe(sources, method, seed=3), out=tmp_path / method)
        found = merge_states(method, base, experts, matrices, seed=3)
        for name, tensor in tensors(tmp_path / method).items():
            assert tensor.equal(found[name]), (method, name)


def test_in_memory_states_must_fit():
    base = {"w": torch.zeros(2, 3)}
    good = {"w": torch.ones(2, 3)}

    def refused(said: str, *experts: dict[str, Tensor], method: str = "average", **keys: Any) -> None:
        with pytest.raises(coterie.CoterieError, match=said):
            merge_states(method, base, experts, **keys)

    refused(r"expert 1: tensor 'w' has shape \[3, 2\] and the base's has \[2, 3\]", good, {"w": torch.ones(3, 2)})
    refused("the base lacks its tensor 'v'", {"v": torch.ones(2)})
    refused("no experts")
    refused("1 weights for 2 experts", good, good, weights=[1.0])
    refused("'v' is no matrix", good, matrices={"v"}, method="iso_c")
    refused("needs statistics", good, method="fisher")
    refused("1 statistics for 2", good, good, method="fisher", statistics=[good])
    refused("merges adapters' factors", good, method="lego")


def test_plan(sources):
    found = plan(recipe(sources, "tsv_m"))
    assert found.tensors == {"merged by tsv_m": 14, "merged by average": 7}
    assert found.bytes_written == sum(t.numel() * 4 for t in tensors(sources / "base").values())
    assert found.to_dict()["method"] == "tsv_m" and found.table() is not None


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_meet_their_tensors(sources, tmp_path, method):
    """From files under the names in memory, to the formulas: sum F W / sum F, and (sum G)^-1 sum G W."""
    given = recipe(sources, method, names=("a", "b"))
    base = tensors(sources / "base")
    if method == "regmean":
        given["parameters"] = {"scale": 1.0} if "scale" in registry.get(method).defaults else {}
    held: list[dict[str, Tensor]] = []
    for name in ("a", "b"):
        if method == "fisher":
            found = {n: torch.rand(t.shape) + 0.1 for n, t in base.items()}
        else:
            inputs = {n: torch.randn(50, t.shape[1]) for n, t in base.items() if "proj" in n}
            found = {n: x.T @ x / 50 for n, x in inputs.items()}
        Statistics("fisher" if method == "fisher" else "gram", found, 50, name).write(tmp_path / f"{name}.safetensors")
        given["experts"][name] = {"source": str(sources / name), "statistics": str(tmp_path / f"{name}.safetensors")}
        held.append(found)
    report = coterie.merge(given, out=tmp_path / "out")
    states = [tensors(sources / name) for name in ("a", "b")]
    in_memory = merge_states(method, base, states, {n for n in base if "proj" in n}, statistics=held)
    assert {line.method for line in report.lines} == ({"fisher"} if method == "fisher" else {"regmean", "average"})
    for name, value in tensors(tmp_path / "out").items():
        assert value.equal(in_memory[name])
        if method == "fisher":
            wanted = sum(f[name] * s[name] for f, s in zip(held, states, strict=True)) / sum(f[name] for f in held)
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)
