"""The same build as tasks of a local Ray cluster of two workers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import coterie
from builds import SHARD, contents, write_sources

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wanted(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "out"
    coterie.build(recipe, out=out, max_shard_bytes=SHARD)
    return contents(out)


def test_a_cluster_is_started_where_there_is_none(tmp_path, recipe, wanted, monkeypatch):
    """Sources are given by relative paths, which hold in this process alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(Path(recipe["base"]).parent)
    relative = {**recipe, "base": "base", "experts": {name: name for name in recipe["experts"]}}
    coterie.build(relative, out=tmp_path / "out", engine="ray", jobs=2, max_shard_bytes=SHARD)
    assert not ray.is_initialized()
    shards = {name: content for name, content in wanted.items() if name.endswith(".safetensors")}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.safetensors")} == shards


def test_a_worker_that_dies_in_the_middle_is_survived(tmp_path, recipe, wanted):
    flags = tmp_path / "flags"
    flags.mkdir()

    def setup() -> None:
        """In every worker: the third layer that any of them begins kills its process."""
        from coterie.building import steps

        fit = steps._Making._fit

        def fatal(self, *args):
            for number in range(3):
                try:
                    (flags / str(number)).touch(exist_ok=False)
                    break
                except FileExistsError:
                    continue
            if number == 2 and not (flags / "dead").exists():
                (flags / "dead").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return fit(self, *args)

        steps._Making._fit = fatal

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": setup},
    )
    try:
        coterie.build(recipe, out=tmp_path / "out", engine="ray", max_shard_bytes=SHARD)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert (flags / "dead").exists()
    assert contents(tmp_path / "out") == wanted


@pytest.mark.slow
def test_bad_input_is_the_same_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = write_sources(tmp_path)
    file = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(file)
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    said = []
    for engine in ("local", "ray"):
        with pytest.raises(coterie.CoterieError) as error:
            coterie.build(recipe, out=tmp_path / "out", engine=engine, jobs=2, max_shard_bytes=SHARD)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not ray.is_initialized()


def test_an_address_where_nothing_answers(tmp_path, recipe, monkeypatch):
    """Ray itself waits for minutes before it says so."""

    def nobody(address: str, **_: object) -> None:
        raise ConnectionError(f"nothing at {address}")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(coterie.CoterieError, match=r"nothing at 127\.0\.0\.1:1.*RAY_ADDRESS|RAY_ADDRESS.*nothing at"):
        coterie.build(recipe, out=tmp_path / "out", engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_ray_is_an_extra(tmp_path, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(coterie.CoterieError, match=r"coterie\[ray\]"):
        coterie.build(recipe, out=tmp_path / "out", engine="ray")
    assert list(tmp_path.iterdir()) == []
