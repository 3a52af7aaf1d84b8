"""Routers over a drawer of adapters, as small as it can be: every way answers and reaches the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent
HELD_OUT = ("third",)


@pytest.fixture
def drawer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on three tasks of letters, with adapters of two of them."""
    monkeypatch.syspath_prepend(str(ROOT.parent / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    for package in ("peft", "nevergrad", "sklearn"):
        pytest.importorskip(package)
    import small

    import adapters
    import library_routers as drawer

    monkeypatch.setattr(small, "LETTERS", {"first": "abcdefgh", "second": "ijklmnop", "third": "qrstuvwx"})
    suite = small.encoder_suite(tmp_path / "suite")
    for script in (drawer, adapters):
        monkeypatch.setattr(script, "SUITE", suite)
    monkeypatch.setattr(adapters, "HELD_OUT", HELD_OUT)
    small_sizes = {"CLUSTERS": 1, "FEW": 4, "BUDGET": 2, "LOOKED_AT": 8}
    for name, value in {"ADAPTERS": tmp_path / "adapters", "HELD_OUT": HELD_OUT, **small_sizes}.items():
        monkeypatch.setattr(drawer, name, value)
    monkeypatch.setattr(drawer, "MIXED", {"steps": 2, "batch": 4})
    monkeypatch.setattr(drawer, "JOINT", {"steps": 2, "batch": 4, "learning_rate": 1e-3})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return drawer


def run(script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    out = folder / "library_routers.json"
    given = ["--cache", str(folder / "cache"), "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", ["library_routers.py", *given])
    script.main()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_way_answers_and_reaches_the_page(drawer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapters

    adapters.main(tmp_path / "cache", drawer.ADAPTERS, 1)
    for path in sorted(drawer.ADAPTERS.iterdir()):
        trained = next((tmp_path / "cache" / "experts").glob(f"{path.name}-lora-*")) / adapters.WEIGHTS
        whole = load_file(trained)
        for name, half in load_file(path / adapters.WEIGHTS).items():
            assert half.dtype == torch.float16 and torch.equal(half, whole[name].half())
        assert str(tmp_path) not in (path / adapters.CONFIG).read_text()
    result = run(drawer, tmp_path, monkeypatch)
    assert result["tasks"] == ["first", "second", "third"] and set(result["ways"]) == set(drawer.WAYS)
    for name, way in result["ways"].items():
        held = way["accuracy"][2:]
        assert held == [None] if name == "expert of the task" else all(0 <= each <= 1 for each in held)
        if "gates" in way:
            assert np.allclose(np.sum(way["gates"], 1), 1, atol=2e-3) or name == "lorahub", name
    assert result["ways"]["base"]["parameters"] == 1
    assert result["ways"]["nearest_example"]["entropy"] == 0
    assert result["ways"]["uniform"]["entropy"] == pytest.approx(1, abs=1e-3)

    import library_routers_page as drawer_page

    page = tmp_path / "routers.md"
    page.write_text("above\n<!-- drawer -->\nstale\n<!-- end -->\nbelow")
    drawer_page.render(tmp_path, page)
    text = page.read_text()
    assert "stale" not in text and text.startswith("above") and text.endswith("below")
    assert all(f"| {name} |" in text for name in drawer.WAYS)
    ElementTree.parse(tmp_path / "routers" / "gates.svg")

    monkeypatch.setattr(drawer.Drawer, "measure", lambda *_: pytest.fail("what is finished was measured again"))
    assert run(drawer, tmp_path, monkeypatch)["ways"] == result["ways"]


def test_what_routes_to_the_right_expert(drawer: Any, tmp_path: Path) -> None:
    from coterie.evaluation.combine import Experts, Way, combined

    reader = drawer.SUITE.reader(drawer.SUITE.base(tmp_path, "cpu", True), "cpu")
    tasks = drawer.SUITE.tasks()
    experts = Experts(reader, {n: p for n, p in drawer.SUITE.committed.items() if n not in HELD_OUT})
    made = drawer.Drawer(reader, tasks, experts, tmp_path)
    with combined(Way("uniform", {}, "base"), experts, tmp_path / "models") as make:
        model = make()[0]
        with model.coterie.route({"first": 3.0, "second": 1.0}):
            seen = made.look(made.same(model), 2, fewer=False)
        with model.coterie.route({"first": 1.0, "second": 1.0}):
            assert made.look(made.same(model), 2, fewer=False)["right"] == [0.5, 0.5]
    assert np.allclose(seen["gates"], [[0.75, 0.25]] * 3)
    assert seen["right"] == [1.0, 0.0]
    assert seen["entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2), abs=1e-5)
