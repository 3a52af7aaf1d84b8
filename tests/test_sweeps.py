"""The sweeps, as small as they can be: every point is measured and reaches the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent
METHODS = ("average", "task_arithmetic", "smile", "retriever")


@pytest.mark.slow
def test_every_point_is_measured_and_reaches_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT.parent / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    for package in ("peft", "sklearn"):
        pytest.importorskip(package)
    import small

    import sweeps
    import sweeps_page

    suite = small.encoder_suite(tmp_path / "suite")
    tasks = suite.tasks()
    suite = replace(suite, tasks=lambda test: tuple(replace(task, test=task.test.head(test)) for task in tasks))
    axes = {"rank": (1, 2), "gate_rank": (1,), "top_k": (1, 2)}
    for name, value in {
        "TEXT8": suite, "TEXT20": suite, "COUNTS": (1, 2), "METHODS": METHODS, "AXES": {"full": axes, "lora": axes},
        "CENTRE": {kind: {"rank": 2, "gate_rank": 1, "top_k": 1} for kind in ("full", "lora")},
        "GRIDS": {"task_arithmetic": [{"scale": 0.3}, {"scale": 1.0}]},
    }.items():  # fmt: skip
        monkeypatch.setattr(sweeps, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)

    def run(*words: str) -> Any:
        given = ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "sweeps.json"), "--rows", "16"]
        monkeypatch.setattr(sys, "argv", ["sweeps.py", *given, "--validation-rows", "8", *words])
        sweeps.main()
        return json.loads((tmp_path / "sweeps.json").read_text())

    result = run()
    for kind in ("full", "lora"):
        points = result[kind]["points"]
        assert {axis: [point["value"] for point in each] for axis, each in points.items()} == {
            axis: list(values) for axis, values in axes.items()
        }
        assert points["rank"][1]["skill"] == points["gate_rank"][0]["skill"] == points["top_k"][0]["skill"]
        assert points["rank"][0]["ratio"] < points["rank"][1]["ratio"]
    assert "rank 1, oracle routing" in result["full"]["ladder"]
    decay = result["decay"]["points"]
    assert [point["count"] for point in decay] == [1, 2]
    assert set(decay[1]["methods"]) == {"base", *METHODS, sweeps.VOTED}
    assert decay[0]["methods"]["smile"]["routing"] == 1

    page = tmp_path / "sweeps.md"
    page.write_text(
        "above\n<!-- parameters -->\nstale\n<!-- end -->\nmiddle\n<!-- decay -->\nstale\n<!-- end -->\nlast"
    )
    sweeps_page.render(tmp_path, page)
    text = page.read_text()
    assert "stale" not in text and all(word in text for word in ("above", "middle", "last", "2 experts"))
    for picture in ("parameters", "decay"):
        ElementTree.parse(tmp_path / "sweeps" / f"{picture}.svg")

    from coterie.evaluation.anchors import AnchorReader

    monkeypatch.setattr(AnchorReader, "scores", lambda *_: pytest.fail("what is finished was scored again"))
    again = run("--only", "decay")
    assert again["decay"]["points"] == decay
    assert again["full"] == result["full"]
