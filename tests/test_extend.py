"""Experts added to a mixture and taken out of it, against a build of the same experts from scratch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import coterie
from coterie.cli import app
from zoo import base_model, fine_tune, inputs, make_adapter, outputs, save


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, two fine-tunes with heads of their own, and adapters of unequal ranks and targets."""
    root = tmp_path_factory.mktemp("sources")
    base = base_model("bert")
    save(base, root / "base")
    save(fine_tune(base, 1), root / "tuned")
    save(fine_tune(base, 2, everything=True), root / "changed")
    make_adapter(root / "base", root / "wide", 3, 6, ("query", "output.dense"), arch="bert")
    make_adapter(root / "base", root / "narrow", 4, 2, ("query",), arch="bert")
    make_adapter(root / "base", root / "saved", 5, 3, arch="bert", task_type="SEQ_CLS")
    return {path.name: str(path) for path in root.iterdir()}


METHODS: dict[str, dict[str, Any]] = {
    "smile": {"rank": 8, "gate_rank": 4},
    "smile full": {"rank": "full", "gate_rank": 4},
    "smile gates": {"rank": 2, "gate_rank": 6},
    "smile dense": {"rank": "dense", "gate_rank": 4},
    "arrow": {},
    "spectr": {},
    "uniform": {},
    "arrow_factors": {},
}
ADAPTERS = ["wide", "narrow", "saved"]


def build(sources: dict[str, str], method: str, names: list[str], out: Path, **more: Any) -> Path:
    light = more.pop("light", False)
    experts = {name: {"source": sources[name], "weight": 0.5 if name == "tuned" else 1.0} for name in names}
    recipe = {"method": method.split()[0], "base": sources["base"], "experts": experts, "parameters": METHODS[method]}
    coterie.build({**recipe, **more}, out=out, light=light)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def alike(got: Path, want: Path, exact: bool = True) -> None:
    """Tensors bit for bit, structure, and the report but for rounding and what the build cost."""
    a, b = tensors(got), tensors(want)
    assert list(a) == list(b)
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name].abs(), b[name].abs(), rtol=1e-4, atol=1e-6)
    assert (got / "config.json").read_bytes() == (want / "config.json").read_bytes()
    mine, theirs = (json.loads((folder / "mixture.json").read_text()) for folder in (got, want))
    assert mine["recipe"] == {**theirs["recipe"], "architecture": "BertForSequenceClassification"}
    for key in ("kinds", "base", "tensors_read"):
        assert mine[key] == theirs[key]
    for key in ("others", "left_out", "heads", "dense_layers", "experts", "mixture_parameters"):
        assert mine["report"][key] == theirs["report"][key], key
    for x, y in zip(mine["report"]["layers"], theirs["report"]["layers"], strict=True):
        for key in x:
            if key == "overlap":
                assert (x[key] is None) == (y[key] is None)
                assert (x[key] or 0) == pytest.approx(y[key] or 0, rel=1e-5, abs=1e-6)
            elif key == "norms":
                assert [n or 0 for n in x[key]] == pytest.approx([n or 0 for n in y[key]])
            else:
                assert x[key] == y[key], key


@pytest.mark.parametrize("method", METHODS)
def test_adding_equals_a_build_of_all(method: str, sources: dict[str, str], tmp_path: Path) -> None:
    first = ["wide"] if method == "arrow_factors" else ["tuned", "wide", "changed"]
    whole = build(sources, method, [*first, "saved", "narrow"], tmp_path / "whole")
    part = build(sources, method, first, tmp_path / "part")
    more = {name: {"source": sources[name], "weight": 1.0} for name in ("saved", "narrow")}
    coterie.add_experts(part, more, tmp_path / "got")
    # factors hold no direction of a layer's only expert
    alike(tmp_path / "got", whole, exact=method not in ("arrow_factors", "smile dense"))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("smile gates", "smile dense")])
def test_removing_equals_a_build_of_the_rest(method: str, sources: dict[str, str], tmp_path: Path) -> None:
    """`narrow` clamps SMILE's gate rank while it is there."""
    names = ["wide", "narrow", "saved"] if method == "arrow_factors" else ["tuned", "narrow", "wide", "changed"]
    whole = build(sources, method, names, tmp_path / "whole")
    rest = build(sources, method, [n for n in names if n != "narrow"], tmp_path / "rest")
    coterie.remove_experts(whole, ["narrow"], tmp_path / "got")
    alike(tmp_path / "got", rest, exact=method != "arrow_factors")


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, None) for method in ("phatgoose", "average_activation", "retriever", "nearest_example", "logo")),
        ("phatgoose", "bfloat16"),
        ("retriever", "bfloat16"),
    ],
)
def test_what_routers_hold_of_the_experts_goes_along(method: str, dtype: str | None, tmp_path: Path) -> None:
    """Added to, and taken from, a mixture whose sources are gone, but for what is added."""
    sys.path.insert(0, str(Path(__file__).parent / "methods"))
    import routed

    made = routed.fill(tmp_path, "bert")
    for kind in ("task", "examples"):
        made.library.embed(routed.encoder, kind)
    for number, name in enumerate(routed.NAMES):
        noise = torch.Generator().manual_seed(number)
        for kind in ("gate", "activation"):
            layers = made.library[name].layers.items()
            made.library.put(name, kind, {p: torch.randn(layer.shape[1], generator=noise) for p, layer in layers})
    sources = {name: f"{made.library.path}#{name}" for name in routed.NAMES}

    def build(names: list[str], out: Path) -> Path:
        recipe = {"method": method, "base": str(made.base), "experts": {n: sources[n] for n in names}}
        coterie.build(recipe | ({"dtype": dtype} if dtype else {}), out=out)
        return out

    first, second, third = routed.NAMES
    wanted, fewer = build([first, second, third], tmp_path / "whole"), build([first, third], tmp_path / "fewer")
    two, one = build([first, second], tmp_path / "two"), build([first], tmp_path / "one")
    made.library.remove(first)
    made.library.remove(second)
    coterie.add_experts(two, {third: sources[third]}, tmp_path / "added")
    coterie.remove_experts(wanted, [second], tmp_path / "removed")
    coterie.add_experts(one, {third: sources[third]}, tmp_path / "grown")
    for got, want in (("added", wanted), ("removed", fewer), ("grown", fewer)):
        a, b = tensors(tmp_path / got), tensors(want)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert (tmp_path / got / "config.json").read_bytes() == (want / "config.json").read_bytes()


def test_no_source_of_a_kept_expert_is_read(sources: dict[str, str], tmp_path: Path) -> None:
    for name in ("base", "wide", "narrow", "saved"):
        shutil.copytree(sources[name], tmp_path / name)
    own = {name: str(tmp_path / name) for name in ("base", "wide", "narrow", "saved")}
    build(own, "arrow", ["wide", "narrow"], tmp_path / "m")
    shutil.rmtree(own["wide"])
    shutil.rmtree(own["narrow"])
    report = coterie.add_experts(tmp_path / "m", {"saved": own["saved"]}, tmp_path / "n")
    assert report.experts == ["wide", "narrow", "saved"]
    model, before = coterie.load(str(tmp_path / "n")), coterie.load(str(tmp_path / "m"))
    with model.coterie.route("wide"), before.coterie.route("wide"):
        torch.testing.assert_close(outputs(model, inputs("bert")), outputs(before, inputs("bert")))


def test_a_light_mixture_stays_light_and_its_base_may_move(sources: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(sources["base"], tmp_path / "base")
    build({**sources, "base": str(tmp_path / "base")}, "smile", ["tuned"], tmp_path / "m", light=True)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(coterie.CoterieError, match="no such directory"):
        coterie.add_experts(tmp_path / "m", {"wide": sources["wide"]}, tmp_path / "n")
    coterie.add_experts(tmp_path / "m", {"wide": sources["wide"]}, tmp_path / "n", base=str(tmp_path / "moved"))
    want = build({**sources, "base": str(tmp_path / "moved")}, "smile", ["tuned", "wide"], tmp_path / "w", light=True)
    a, b = tensors(tmp_path / "n"), tensors(want)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_cannot_be_is_refused_and_nothing_is_written(sources: dict[str, str], tmp_path: Path) -> None:
    m = build(sources, "smile", ["tuned", "wide"], tmp_path / "m")
    build(sources, "smile", ["changed", "wide"], tmp_path / "average", others="average")
    coterie.build(
        method="emr", base=sources["base"], experts={n: sources[n] for n in ("tuned", "changed")}, out=tmp_path / "emr"
    )
    save(base_model("bert", seed=9), tmp_path / "other")
    more = {"narrow": sources["narrow"]}
    out = tmp_path / "out"
    for match, run in (
        ("already", lambda: coterie.add_experts(m, {"wide": sources["narrow"]}, out)),
        ("no expert to add", lambda: coterie.add_experts(m, {}, out)),
        ("no expert 'wid'", lambda: coterie.remove_experts(m, ["wid"], out)),
        ("no expert would be left", lambda: coterie.remove_experts(m, ["tuned", "wide"], out)),
        ("fingerprints differ", lambda: coterie.add_experts(m, more, out, base=str(tmp_path / "other"))),
        ("one delta", lambda: coterie.add_experts(tmp_path / "emr", more, out)),
        ("average of all", lambda: coterie.add_experts(tmp_path / "average", more, out)),
        ("not a coterie mixture", lambda: coterie.add_experts(sources["base"], more, out)),
        ("exists already", lambda: coterie.add_experts(m, more, m)),
        ("holds a source", lambda: coterie.add_experts(m, more, m, force=True)),
    ):
        with pytest.raises(coterie.CoterieError, match=match):
            run()
    assert not out.exists()
    clamped = build(sources, "smile gates", ["narrow", "wide"], tmp_path / "clamped")
    with pytest.raises(coterie.CoterieError, match="clamped"):
        coterie.remove_experts(clamped, ["narrow"], out)


def test_on_the_command_line(sources: dict[str, str], tmp_path: Path) -> None:
    m = build(sources, "arrow", ["wide", "saved"], tmp_path / "m")
    run = CliRunner()
    added = run.invoke(app, ["add", str(m), f"a b={sources['narrow']}", "-o", str(tmp_path / "n")])
    assert added.exit_code == 0, added.output
    assert coterie.load(str(tmp_path / "n")).coterie.expert_names == ["wide", "saved", "a b"]
    removed = run.invoke(app, ["remove", str(tmp_path / "n"), "a b", "saved", "-o", str(tmp_path / "o"), "--json"])
    assert removed.exit_code == 0, removed.output
    assert coterie.load(str(tmp_path / "o")).coterie.expert_names == ["wide"]


def test_a_trained_mixture_is_refused(tmp_path):
    base = base_model("bert")
    trained = coterie.wrap(base, coterie.MixtureConfig(method="smear", experts=2, parameters={"rank": 2}))
    trained.save_pretrained(tmp_path / "trained")
    with pytest.raises(coterie.CoterieError, match="was trained"):
        coterie.remove_experts(tmp_path / "trained", ["expert 1"], tmp_path / "out")
