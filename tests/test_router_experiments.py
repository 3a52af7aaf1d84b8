"""The experiments on learned routers, as small as they can be: every method runs, goes on, and reaches the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on few random pictures and a base that has seen next to nothing."""
    import domains

    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (240, 28, 28), dtype=np.uint8), rng.integers(0, 10, 240), "random pictures"
    monkeypatch.setattr(domains, "pictures", lambda: drawn)
    monkeypatch.setattr(domains, "PRETRAINING", {"steps": 1, "batch": 4, "learning_rate": 1e-3})
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(domains, "SHAPE", domains.SHAPE | small)
    monkeypatch.setattr(domains, "BATCH", 8)
    domains.experiment.cache_clear()
    yield domains
    domains.experiment.cache_clear()


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script on a few texts."""
    import tasks
    from coterie.evaluation.suite import Split, Task
    from coterie.evaluation.suites import text8

    split = Split(("what a film", "one two three", "x = 1", "rome"), np.array([0, 1, 0, 1]))
    few = tuple(Task(f"task {n}", ("yes", "no"), split, split, split) for n in range(3))
    monkeypatch.setattr(text8, "load", lambda *_: few)
    monkeypatch.setattr(tasks, "BATCH", 4)
    tasks.experiment.cache_clear()
    yield tasks
    tasks.experiment.cache_clear()


def run(script: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    import routers

    out = tmp_path / f"{name}.json"
    words = ["--steps", "2", "--jobs", "1", "--cache", str(tmp_path / "cache"), "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    routers.main(name, None, script.experiment, 2, script.RATES)
    return json.loads(out.read_text())


def test_every_method_runs_and_reaches_the_page(
    domains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import routers
    import routers_page

    result = run(domains, "domains", tmp_path, monkeypatch, "--seeds", "1", "--rates", "1e-3")
    assert "FAILED" not in capsys.readouterr().out
    contenders = routers.contenders(domains.experiment(tmp_path / "cache", 2))
    assert set(result["methods"]) == set(contenders)
    for name, method in result["methods"].items():
        assert np.shape(method["accuracy"]) == (1, 6)
        for gates in (method["gates"] or {}).values():
            assert np.shape(gates) == (6, contenders[name].experts)
    assert result["methods"]["tag"]["specialisation"] == [pytest.approx(1)]
    wide = result["methods"]
    assert wide["single"]["trainable"] < wide["single_wide"]["trainable"] == wide["lora"]["trainable"]

    page = tmp_path / "docs" / "smear.md"
    page.parent.mkdir()
    page.write_text("above\n<!-- domains -->\nold\n<!-- end -->\nbetween\n<!-- tasks -->\nkept\n<!-- end -->\nbelow")
    (tmp_path / "domains.json").write_text(json.dumps(result))
    routers_page.render(tmp_path, page)
    text = page.read_text()
    assert "old" not in text and "kept" in text and text.startswith("above") and text.endswith("below")
    assert f"| {100 * np.mean(result['base']):.1f} |" in text
    assert f"{result['methods']['smear']['trainable']:,}" in text
    for picture in ("domains", "domains-gates"):
        assert f"(smear/{picture}.svg)" in text
        ElementTree.parse(page.with_suffix("") / f"{picture}.svg")
    routers_page.render(tmp_path, page)
    assert page.read_text() == text


def test_validation_chooses_the_rate_and_a_stopped_grid_goes_on(
    domains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import routers

    asked = []

    def train(_: Any, contender: Any, rate: float, seed: int) -> dict[str, Any]:
        asked.append((contender.method, rate, seed))
        validation, test = {1e-3: (0.2, 0.9), 1e-2: (0.8, 0.1), 1e-1: (0.5, 0.6), 5: (0.9, 0.0)}[rate]
        cost = {"trainable": 1, "step_ms": 1.0, "memory_mib": 1.0, "loss": 1.0, "code": "present"}
        return {"accuracy": [test + seed / 100] * 6, "validation": validation, "gates": {}, **cost}

    monkeypatch.setattr(routers, "train", train)
    run(domains, "domains", tmp_path, monkeypatch, "--methods", "single", "--seeds", "1", "--rates", "1e-3")
    some = ("--methods", "single,tag", "--seeds", "2", "--rates", "1e-3,1e-2,1e-1")
    methods = run(domains, "domains", tmp_path, monkeypatch, *some)["methods"]
    firsts = [("single", 1e-2, 0), ("tag", 1e-2, 0), ("single", 1e-1, 0), ("tag", 1e-3, 0), ("tag", 1e-1, 0)]
    assert sorted(asked[1:-2]) == sorted(firsts) and asked[-2:] == [("single", 1e-2, 1), ("tag", 1e-2, 1)]
    assert set(methods) == {"single", "tag"} and methods["tag"]["rate"] == 1e-2
    assert methods["tag"]["accuracy"] == [[0.1] * 6, [0.11] * 6]

    def tried(name: str, rates: str) -> tuple[float, list[float]]:
        asked.clear()
        words = ("--methods", name, "--seeds", "1", "--rates", rates)
        found = run(domains, "domains", tmp_path, monkeypatch, *words)["methods"][name]["rate"]
        return found, [rate for _, rate, _ in asked]

    assert tried("hash", "5,1e-3,1e-1,1e-2") == (1e-2, [1e-1, 1e-2, 1e-3])  # no further than it gets better
    assert tried("adamix", "5,1e-3,1e-1") == (5, [1e-1, 1e-3, 5])
    assert tried("poly", "1e-3,1e-2") == (1e-2, [1e-2, 1e-3])
    assert tried("single_wide", "1e-2") == (1e-2, [1e-2])


def test_the_texts_run(tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chosen = ("--methods", ",".join(tasks.METHODS), "--seeds", "1", "--rates", "1e-3")
    result = run(tasks, "tasks", tmp_path, monkeypatch, *chosen)
    assert "FAILED" not in capsys.readouterr().out
    assert set(result["methods"]) == set(tasks.METHODS)
    head_is_frozen = result["methods"]["single_wide"]["trainable"]
    assert head_is_frozen == 3 * 3 * tasks.RANK * (384 + 384 + 384 + 1536)


def test_a_failing_method_costs_no_other(
    domains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import routers

    whole = routers.train

    def train(experiment: Any, contender: Any, *rest: Any) -> Any:
        if contender.method == "tag":
            raise ValueError("no such thing")
        return whole(experiment, contender, *rest)

    monkeypatch.setattr(routers, "train", train)
    words = ("--methods", "tag,single", "--seeds", "1", "--rates", "1e-3,1e-2")
    result = run(domains, "domains", tmp_path, monkeypatch, *words)
    assert capsys.readouterr().out.count("tag, rate 0.01, seed 0: FAILED: ValueError: no such thing") == 1
    assert set(result["methods"]) == {"single"}


def test_pictures_are_read_and_shifted(tmp_path: Path) -> None:
    import gzip

    import domains

    values = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3, *(byte for size in values.shape for byte in size.to_bytes(4, "big"))])
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + values.tobytes()))
    assert (domains.read_idx(tmp_path / "x.gz") == values).all()
    images = np.random.default_rng(0).random((3, 28, 28))
    shifted = [shift(images) for shift in domains.SHIFTS.values()]
    assert all(each.shape == images.shape and each.min() >= 0 and each.max() <= 1 for each in shifted)
    assert all(np.abs(a - b).mean() > 0.1 for i, a in enumerate([images, *shifted]) for b in shifted[i:])


def test_specialisation_counts_information() -> None:
    import routers

    own = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    alike = [[0.2, 0.3, 0.5]] * 3
    assert routers.specialisation({"layer": own}) == pytest.approx(1)
    assert routers.specialisation({"layer": alike}) == pytest.approx(0)
    assert routers.specialisation({"a": own, "b": alike}) == pytest.approx(0.5)
    pairs = [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]
    assert routers.specialisation({"layer": pairs}) == pytest.approx(0.5)


def test_padding_has_no_say_in_the_mean_gates() -> None:
    import routers

    gates = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    mask = torch.tensor([[1, 0], [1, 1]])
    assert routers.over_tokens(gates, mask).tolist() == [[1, 0], [0.5, 0.5]]
    assert routers.over_tokens(gates[:, :1], mask).tolist() == [[1, 0], [1, 0]]
