"""The gates are measured as they say, printed, and their script fails where one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import encoder_suite

pytest.importorskip("sklearn")

from coterie.errors import CoterieError
from coterie.evaluation import gates
from coterie.evaluation.ladder import load


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    suite = encoder_suite(tmp_path / "suite")
    tasks = suite.tasks()
    fixed = replace(suite, tasks=lambda **sizes: tasks)
    monkeypatch.setattr(gates, "find_suite", lambda name: fixed)
    reader = suite.reader(suite.base(tmp_path, "cpu", False), "cpu")
    found = gates.measure(reader, tasks, suite.committed)
    assert found.expert == [1.0, 1.0]  # right by construction
    assert found.base == [reader.scores(reader.model, task, task.test).mean() for task in tasks]
    experts = gates.Experts(reader, suite.committed)
    total = {n: sum(experts.state(t.name)[n] - w for t in tasks) for n, w in experts.base.items()}
    merged = load(reader.base_model(), {n: w + found.scale * total[n] for n, w in experts.base.items()})
    assert found.merged == pytest.approx([reader.scores(merged, task, task.test).mean() for task in tasks], abs=0.026)
    unseen = [replace(task, train=task.train.head(1)) for task in tasks]
    assert gates.task_probe(reader, tasks, 1) == 1  # of one test row: it learns from all training rows in any case
    assert gates.task_probe(reader, unseen) < gates.task_probe(reader, tasks) == found.probe
    gap = np.subtract(found.merged, found.base).sum() / np.subtract(found.expert, found.base).sum()
    assert found.recovered == pytest.approx(gap)

    def run(**changed: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(gates, "measure", lambda *_: replace(found, **changed))
            gates.main("small", tmp_path / "cache", experts="committed")
        return capsys.readouterr().out

    good = {"base": [0.5, 0.5], "recovered": 0.5, "kept": 0.99, "probe": 0.99}
    assert run(**good).count("pass  ") == 4
    for bad in ({"base": [0.5, 0.9]}, {"recovered": 0.76}, {"kept": 0.96}, {"probe": 0.97}):
        with pytest.raises(SystemExit, match="1"):
            run(**good | bad)
        assert capsys.readouterr().out.count("FAIL  ") == 1

    # A suite that trains no experts is measured by those that it brings along; a kind that it lacks is said.
    monkeypatch.setattr(gates, "measure", lambda *_: replace(found, **good))
    monkeypatch.setattr(gates, "find_suite", lambda name: replace(fixed, recipes={}))
    gates.main("small", tmp_path / "cache")
    assert capsys.readouterr().out.count("pass  ") == 4
    with pytest.raises(CoterieError, match="small has no experts of kind 'comitted'; known: committed"):
        gates.main("small", tmp_path / "cache", experts="comitted")
