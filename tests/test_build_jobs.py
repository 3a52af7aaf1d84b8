"""The number of jobs changes the time of a build, and nothing of what it writes."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import coterie
from builds import SHARD, contents, write_sources
from coterie.building import engines, steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("arch", ["bert", "gpt2", "mixtral", "clip"])
def test_any_number_of_jobs_writes_the_same(tmp_path, arch):
    recipe = write_sources(tmp_path, arch)
    coterie.build(recipe, out=tmp_path / "1", jobs=1, max_shard_bytes=SHARD)
    wanted = contents(tmp_path / "1")
    assert sum(name.endswith(".safetensors") for name in wanted) > 5
    for jobs in (2, 7, None):
        coterie.build(recipe, out=tmp_path / f"{jobs}", jobs=jobs, max_shard_bytes=SHARD)
        assert contents(tmp_path / f"{jobs}") == wanted


def test_the_callers_threads_change_nothing_and_stay(tmp_path):
    """Wide enough that BLAS would share the work among its threads, and round otherwise."""
    recipe = write_sources(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    before = torch.get_num_threads()
    try:
        for threads, jobs in ((1, 1), (2, 1), (2, 2)):
            torch.set_num_threads(threads)
            coterie.build(recipe, out=tmp_path / f"{threads}{jobs}", jobs=jobs)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "11") == contents(tmp_path / "21") == contents(tmp_path / "22")


def test_every_fit_has_one_thread_and_few_run_ahead(tmp_path, recipe, monkeypatch):
    """Three jobs: three layers in work at a time, and no more than one more finished and not written."""
    fit, add = steps._Making._fit, coterie.building.build.ShardWriter.note
    lock, begun, written, most, ahead, threads, together = threading.Lock(), [0], [0], [0], [0], set(), [0]
    meet = threading.Barrier(3)

    def counted(self, *args):
        with lock:
            begun[0] += 1
            together[0] += 1
            most[0], ahead[0] = max(most[0], together[0]), max(ahead[0], begun[0] - written[0])
        threads.add(torch.get_num_threads())
        if begun[0] <= 3:
            meet.wait(30)
        try:
            return fit(self, *args)
        finally:
            with lock:
                together[0] -= 1

    def noted(self, step):
        written[0] += 1
        add(self, step)

    monkeypatch.setattr(steps._Making, "_fit", counted)
    monkeypatch.setattr(coterie.building.build.ShardWriter, "note", noted)
    torch.set_num_threads(2)
    try:
        coterie.build(recipe, out=tmp_path / "out", jobs=3)
    finally:
        torch.set_num_threads(1)
    assert threads == {1}
    assert most[0] == 3
    assert ahead[0] <= 5  # three in work, one finished, one being written


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_fault_in_the_middle_is_the_same_fault(tmp_path, jobs):
    recipe = write_sources(tmp_path)
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.output.dense.weight"):
        tensors[name][3, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(coterie.CoterieError, match=r"layer\.0\.output\.dense\.weight' holds 1 NaN"):
        coterie.build(recipe, out=tmp_path / "out", jobs=jobs, max_shard_bytes=SHARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_planned_memory_follows_the_jobs(recipe, monkeypatch):
    one = coterie.plan(recipe, jobs=1)
    assert coterie.plan(recipe, jobs=3).memory == 3 * one.memory == coterie.plan(recipe, jobs=3).to_dict()["memory"]
    monkeypatch.setattr(engines.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(engines, "_free_memory", lambda: None)
    assert coterie.plan(recipe).jobs == 6
    monkeypatch.setattr(engines, "_free_memory", lambda: 4 * 2 * one.memory)
    assert coterie.plan(recipe).jobs == 4
    monkeypatch.setattr(engines, "_free_memory", lambda: 0)
    assert coterie.plan(recipe).jobs == 1


@pytest.mark.parametrize("bad", [{"jobs": 0}, {"jobs": -1}, {"engine": "spark"}])
def test_what_cannot_be_is_refused(tmp_path, recipe, bad):
    with pytest.raises(coterie.CoterieError, match=r"jobs|engine"):
        coterie.build(recipe, out=tmp_path / "out", **bad)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_sizes_the_shards(tmp_path):
    from typer.testing import CliRunner

    from coterie.cli import app

    recipe, file = write_sources(tmp_path), tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    coterie.build(recipe, out=tmp_path / "python", max_shard_bytes=SHARD)
    options = ["build", str(file), "-o", str(tmp_path / "cli"), "--max-shard-gb", str(SHARD / 1e9)]
    assert CliRunner().invoke(app, options).exit_code == 0
    assert contents(tmp_path / "cli") == contents(tmp_path / "python")
