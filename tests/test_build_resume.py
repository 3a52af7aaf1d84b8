"""A build that is killed anywhere goes on with `resume`, and writes byte for byte what it would have written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import coterie
from builds import SHARD, contents, write_sources
from coterie.building import steps
from coterie.building.directory import whole_directory
from coterie.building.journal import JOURNAL
from matching import python

# Builds in forked children that are killed, then resumes. A kill comes before the n-th time that the child opens,
# renames or removes something beside its output (every such moment may be drawn, the last renames included), or after
# a while from outside. Says per point: shards found finished, and steps made after them. `module`, `run` and `step` are
# of a build, or of a merge.
KILLS = """
import importlib, json, os, pathlib, random, signal, sys, time

recipe, folder, shard, seed, operations, delays, module, run, step = sys.argv[1:]
recipe, folder, shard = json.loads(recipe), pathlib.Path(folder), int(shard)
draw, b = random.Random(int(seed)), importlib.import_module(module)

def build(out, **keys):
    getattr(b, run)(recipe, out=folder / out, jobs=draw.choice([1, 2, 3]), max_shard_bytes=shard, **keys)

def forked(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    return pid

seen, limit = 0, None
def count(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder)):
        seen += 1
        if seen == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
build("whole")
total, start = seen, time.monotonic()
build("again")
seconds = time.monotonic() - start
make = getattr(b, step)
for index in range(int(operations) + int(delays)):
    out, seen, made, limit = f"out{index}", 0, [], None
    if index < int(operations):
        limit = draw.randint(1, total)
        pid = forked(lambda: build(out))
    else:
        pid = forked(lambda: build(out))
        time.sleep(draw.uniform(0.4, 1) * seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    left = [p for p in folder.glob(f".{out}.partial-*/journal.jsonl")]
    found = sum(len(p.read_text().splitlines()) - 1 for p in left)
    setattr(b, step, lambda *args: made.append(args[2]) or make(*args))
    limit, seen = None, 0
    if not (folder / out).exists():
        build(out, resume=True)
    print(json.dumps({"killed": killed, "found": found, "made": len(made), "left": len(left)}))
"""


def test_killed_at_twenty_random_points(tmp_path):
    recipe = write_sources(tmp_path / "sources", num_hidden_layers=1)
    (tmp_path / "out").mkdir()
    folder = tmp_path / "out"
    run = ("coterie.building.build", "build", "make")
    told = python(KILLS, json.dumps(recipe), folder, SHARD, 7, 14, 6, *run)
    points = [json.loads(line) for line in told.splitlines()]
    assert len(points) == 20
    wanted = contents(folder / "whole")
    total = max(point["made"] for point in points)
    assert contents(folder / "again") == wanted
    for index, point in enumerate(points):
        assert point["killed"] or index >= 14  # a delay may outlast the build
        assert contents(folder / f"out{index}") == wanted, point
        assert point["left"] <= 1
        if point["found"] > 2:
            assert point["made"] < total
    assert sum(point["found"] > 0 for point in points) >= 10
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".") and ".new-" not in p.name]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wanted(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    coterie.build(recipe, out=out, max_shard_bytes=SHARD)
    return contents(out)


def interrupt(recipe, out: Path, after: int, **keys) -> list[Path]:
    """A build that is interrupted, as by Ctrl-C, before step `after`; the folders that it left."""
    make, made = steps.make, []

    def counted(*args):
        made.append(args)
        if len(made) > after:
            raise KeyboardInterrupt
        return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.building.build.make", counted)
        with pytest.raises(KeyboardInterrupt):
            coterie.build(recipe, out=out, jobs=1, **{"max_shard_bytes": SHARD, **keys})
    return list(out.parent.glob(f".{out.name}.partial-*"))


def fits(monkeypatch) -> list[str]:
    """The layers that are fitted from now on."""
    fit, found = steps._Making._fit, []

    def counted(self, path, *args):
        found.append(path)
        return fit(self, path, *args)

    monkeypatch.setattr(steps._Making, "_fit", counted)
    return found


@pytest.mark.parametrize("light", [False, True])
def test_an_interrupted_build_goes_on_without_repeating(tmp_path, recipe, monkeypatch, light):
    coterie.build(recipe, out=tmp_path / "whole", max_shard_bytes=SHARD, light=light)
    (left,) = interrupt(recipe, tmp_path / "out", 9, light=light)
    finished = {step[0][1] for line in _journal(left)[1:] for step in line["steps"]}
    assert len(finished) >= 5
    fitted = fits(monkeypatch)
    coterie.build(recipe, out=tmp_path / "out", resume=True, max_shard_bytes=SHARD, light=light)
    assert fitted and not finished & set(fitted)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_without_resume_what_was_left_is_removed(tmp_path, recipe, wanted, monkeypatch):
    assert len(interrupt(recipe, tmp_path / "out", 9)) == 1
    fitted = fits(monkeypatch)
    coterie.build(recipe, out=tmp_path / "out", max_shard_bytes=SHARD)
    assert len(fitted) == len(coterie.plan(recipe).layers)
    assert contents(tmp_path / "out") == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_to_go_on_with_is_a_new_build(tmp_path, recipe, wanted):
    assert interrupt(recipe, tmp_path / "out", 0) == []
    coterie.build(recipe, out=tmp_path / "out", resume=True, max_shard_bytes=SHARD)
    assert contents(tmp_path / "out") == wanted


def test_damage_drops_the_shard_and_what_follows(tmp_path, recipe, wanted):
    def flip(folder: Path) -> None:
        shard = folder / "shard-2.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)

    def shorten(folder: Path) -> None:
        os.truncate(folder / "shard-1.safetensors", 100)

    def lose(folder: Path) -> None:
        (folder / "shard-0.safetensors").unlink()

    def tear(folder: Path) -> None:
        journal = folder / JOURNAL
        os.truncate(journal, journal.stat().st_size - 40)

    def litter(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        (folder / "1_Pooling").mkdir()
        (folder / "stray").write_text("")

    for damage in (flip, shorten, lose, tear, litter):
        out = tmp_path / damage.__name__
        (left,) = interrupt(recipe, out, 9)
        damage(left)
        coterie.build(recipe, out=out, resume=True, max_shard_bytes=SHARD)
        assert contents(out) == wanted, damage


def test_what_changed_is_named_and_what_was_left_stays(tmp_path, recipe):
    folder = tmp_path / "sources"
    shutil.copytree(Path(recipe["base"]).parent, folder)
    recipe = json.loads(json.dumps(recipe).replace(recipe["base"].removesuffix("/base"), str(folder)))
    out = tmp_path / "out"
    assert len(interrupt(recipe, out, 9)) == 1

    def refused(match: str, given=recipe, **keys) -> None:
        with pytest.raises(coterie.CoterieError, match=match):
            coterie.build(given, out=out, resume=True, **{"max_shard_bytes": SHARD, **keys})
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1

    refused(r"recipe: parameters: rank \(was 6, is 5\)", {**recipe, "parameters": {"rank": 5, "gate_rank": 4}})
    refused("light", light=True)
    refused("max_shard_bytes", max_shard_bytes=SHARD + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.__version__", "0.0.7")
        refused("versions: coterie")
    file = folder / "tuned" / "model.safetensors"
    before = file.stat()
    os.utime(file, ns=(0, 0))
    refused(r"sources: expert tuned: model\.safetensors")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    coterie.build(recipe, out=out, resume=True, max_shard_bytes=SHARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "sources"]


def test_builds_at_the_same_time_keep_apart(tmp_path, recipe, wanted, monkeypatch):
    """A second build, and one that would resume, begin and end while the first is at work."""
    out = tmp_path / "out"
    make, nested = steps.make, []

    def late(*args):
        if not nested:
            nested.append("begun")
            coterie.build(recipe, out=out, jobs=1, resume=True, max_shard_bytes=SHARD)
        return make(*args)

    monkeypatch.setattr("coterie.building.build.make", late)
    with pytest.raises(coterie.CoterieError, match="exists already"):
        coterie.build(recipe, out=out, jobs=1, max_shard_bytes=SHARD)
    assert contents(out) == wanted
    nested.clear()
    monkeypatch.setattr("coterie.building.build.make", make)
    with pytest.raises(KeyboardInterrupt), whole_directory(out, True) as mine:
        (mine / "work").write_text("mine")
        coterie.build(recipe, out=out, force=True, resume=True, max_shard_bytes=SHARD)
        assert (mine / "work").read_text() == "mine"
        raise KeyboardInterrupt
    assert contents(out) == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
