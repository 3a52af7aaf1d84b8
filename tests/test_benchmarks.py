"""The benchmark of running a mixture: its cells, its theory, its checks, and its page. No times are asserted."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from coterie.errors import CoterieError
from coterie.mixture import native

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cell's account, in as few rounds as there may be."""
    import running
    import timing

    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return lambda cell: next(running.measured([cell], False))


def test_default_cells_are_about_sixty_and_differ() -> None:
    from cells import default_cells

    cells = default_cells()
    assert 55 <= len(cells) <= 70
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.model for cell in cells} == {"", "vit", "bert", "llama"}


def test_grid_holds_the_default_cells_once() -> None:
    from cells import default_cells, grid

    keys = [cell.key for cell in grid()]
    assert len(keys) == len(set(keys))
    assert {cell.key for cell in default_cells()} < set(keys)


def test_theory_counts_as_stated() -> None:
    from cells import Cell, costs

    cell = Cell(768, 3072, experts=8, rank=32, top_k=1, tokens=1576)
    cost = costs(cell, [(768, 3072, True)])
    assert cost["theory"] == pytest.approx(0.09375)
    assert cost["extra_multiply_adds"] == 1576 * (8 * 16 * 768 + 32 * (768 + 3072))
    one = costs(Cell(768, 3072, tokens=1), [(768, 3072, True)])
    assert one["extra_bytes"] == 4 * (8 * 16 * 768 + 16 * 768 + 32 * 3072)  # gate rows are the expert's first 16
    assert costs(Cell(768, 768, method="task"), [(768, 768, True)])["theory"] == 0
    assert costs(cell, [(768, 3072, True), (768, 3072, False)])["theory"] == pytest.approx(0.09375 / 2)


def test_goals_follow_the_shape() -> None:
    from cells import Cell, goals

    cost = {"theory": 0.1, "bytes_ratio": 1.5}
    ratios = {"coterie": 1.21, "fusion-bench": 1.6}
    found = {goal["goal"]: goal for goal in goals(Cell(768, 3072), cost, ratios, True)}
    assert found["2 x theory"]["limit"] == pytest.approx(1.2)
    assert not found["2 x theory"]["met"]
    assert found["reference's overhead / 2.5"]["met"]
    assert found["not slower than fusion-bench"]["met"]
    assert goals(Cell(384, 1536), cost, ratios, True)[0]["limit"] == pytest.approx(1.3)
    few = goals(Cell(768, 3072, tokens=1), cost, ratios, False)[0]
    assert few["limit"] == pytest.approx(1.95)
    assert not few["counts"]
    assert goals(Cell(model="bert"), cost, ratios, True)[0]["limit"] == 1.35


def test_goals_are_asked_of_the_compiled_kernel_too() -> None:
    from cells import Cell, goals

    cost, ratios = {"theory": 0.1, "bytes_ratio": 1.5}, {"coterie": 1.21, "fusion-bench": 1.3}
    kept = {goal["goal"]: goal for goal in goals(Cell(768, 3072), cost, ratios, True)}
    both = goals(Cell(768, 3072), cost, {**ratios, "compiled": 1.15}, True)
    found = {goal["goal"]: (goal["met"], goal["met_compiled"]) for goal in both}
    assert "compiled" not in kept["2 x theory"] and found["2 x theory"] == (False, True)
    share = next(goal for goal in both if goal["goal"] == "reference's overhead / 2.5")
    assert share["compiled"] == pytest.approx(0.5) and not share["met_compiled"]


def test_a_vote_costs_a_pass_of_the_base() -> None:
    from cells import Cell, costs

    linears = [(768, 768, True), (768, 768, False)]
    once, voted = (costs(Cell(model="bert", method=method), linears)["theory"] for method in ("smile", "vote"))
    assert voted == pytest.approx(1 + once)
    decided = costs(Cell(model="llama", method="vote", tokens=1), linears)["theory"]
    assert decided == pytest.approx(32 * (768 + 768) / (2 * 768 * 768))


@pytest.mark.parametrize(
    ("settings", "neighbour"),
    [
        ({}, None),
        ({"method": "task"}, None),
        ({"backward": True}, None),
        ({"dtype": "bfloat16"}, None),
        ({"method": "arrow", "top_k": 2}, "PEFT Arrow"),
        ({"method": "xlora"}, "PEFT X-LoRA"),
        ({"method": "mixed"}, "PEFT adapter_names"),
    ],
    ids=lambda value: str(value),
)
def test_every_variant_computes_the_same(measure: Any, settings: dict[str, Any], neighbour: str | None) -> None:
    from cells import Cell

    account = measure(Cell(48, 64, experts=3, rank=4, tokens=40, **settings))
    assert {"stacked", "grouped"} < set(account["variants"])
    assert ("merged" in account["variants"]) == (settings.get("method") == "task")
    with contextlib.suppress(CoterieError):  # no C++ compiler
        native.kernel()
        assert settings or "compiled" in account["variants"]
    assert neighbour is None or neighbour in account["variants"]
    assert min(account["agreement"].values()) >= 0.9
    assert sum(account["paths"].values()) == 1


def test_a_wrong_output_is_told(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import neighbours
    from cells import Cell

    def halved(cell: Any, subject: Any, inputs: Any) -> Any:
        model, extra = neighbours.mixed(cell, subject, inputs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data /= 2
        return model, extra

    monkeypatch.setitem(neighbours.PEFT, "mixed", halved)
    account = measure(Cell(48, 64, experts=3, rank=4, tokens=40, method="mixed"))
    assert "PEFT adapter_names" in account["wrong"] and "coterie" not in account["wrong"]
    assert "variants" not in account


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import running
    from cells import Cell, code_version

    cells = [Cell(48, 64, tokens=tokens) for tokens in (1, 2, 3)]
    entry = {"key": cells[1].key, "code": code_version(), "account": {"cell": {}, "kept": True}}
    stale = {"key": cells[2].key, "code": "other", "account": {"cell": {}, "kept": True}}
    journal = tmp_path / "journal.jsonl"
    journal.write_text(f'{json.dumps(entry)}\n{json.dumps(stale)}\n{{"key": "cut o')
    asked = []

    def measured(left: list[Cell], _: bool) -> Any:
        asked.extend(left)
        return ({"cell": cell.to_dict(), "skipped": "a test"} for cell in left)

    monkeypatch.setattr(running, "measured", measured)
    accounts = running.run_full(cells, journal, False)
    assert asked == [cells[0], cells[2]]
    assert accounts[1] == entry["account"]
    assert running.finished(journal).keys() == {cell.key for cell in cells}


def test_the_page_shows_what_was_measured(measure: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import page
    import running
    from cells import Cell

    cells = [Cell(48, 64, experts=3, rank=4, tokens=tokens, method=m) for tokens, m in ((512, "smile"), (40, "xlora"))]
    accounts = [measure(cell) for cell in cells]
    accounts[0]["goals"][0] |= {"limit": 1.0, "measured": 1.5, "met": False}
    running.write([*accounts, {"cell": cells[0].to_dict(), "skipped": "no room"}], tmp_path / "running.json", False)
    building = {"what": "jobs", "ratio": 1.9, "rows": [{"shape": "a", "s": 2}], "part": {"versions": {"torch": "9"}}}
    (tmp_path / "building.json").write_text(json.dumps(building))
    page.render(tmp_path, tmp_path / "docs" / "speed.md")
    text = (tmp_path / "docs" / "speed.md").read_text()
    assert f"{accounts[0]['variants']['coterie']['ratio']:.2f}" in text
    assert "48 → 64 (no room)" in text
    assert "1.50, limit 1.00 (+50%)" in text
    assert "- ratio: 1.9" in text and "| a | 2 |" in text and "Measured with torch 9." in text
    pictures = {path.stem for path in (tmp_path / "docs" / "speed").glob("*.svg")}
    assert pictures == {"overhead", "neighbours"}
    for name in pictures:
        assert f"(speed/{name}.svg)" in text
        ElementTree.parse(tmp_path / "docs" / "speed" / f"{name}.svg")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["startup", "jobs", "disk"])
def test_what_a_build_costs_is_measured(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On next to nothing: that every part still runs against the code that it measures."""
    import building

    out = tmp_path / "building.json"
    words = [part, "--width", "64", "--depth", "1", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["building.py", *words])
    building.main()
    assert set(json.loads(out.read_text())) == {part}


def test_what_is_timed_on_a_gpu_is_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Small and on the CPU: through two copies, each of which takes the path that is named."""
    import gpu
    import timing
    from cells import Cell
    from coterie.mixture.layer import _Mixture
    from subjects import Subject

    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    monkeypatch.setattr(gpu, "copies_of", lambda *_: 2)
    ask, seen = _Mixture._path, []
    monkeypatch.setattr(_Mixture, "_path", lambda layer, *rest: seen.append(ask(layer, *rest)) or seen[-1])
    cell = Cell(48, 32, experts=3, rank=8, tokens=4)
    account = gpu.measure(cell, Subject(cell, 1), torch.device("cpu"))
    assert account["right"] and account["agreement"] == {"stacked, eager": 1.0, "grouped, eager": 1.0}
    assert seen[:4] == ["stacked", "stacked", "grouped", "grouped"]
    assert set(gpu.row(account)) >= {
        "theory",
        "goal",
        "dense, eager, ms",
        "stacked, eager",
        "grouped, eager",
        "met, eager",
    }
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        assert gpu.main() == 2 and "no GPU" in capsys.readouterr().err
