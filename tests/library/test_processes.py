"""Several processes on one library, and processes that are killed: nothing is lost, and it always opens."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from drawer import library

import coterie
from coterie.library import store

FORK = multiprocessing.get_context("fork")


def adds(path: Path, sources: list[Path], names: list[str]) -> None:
    shelf = coterie.library.open(path)
    for i, name in enumerate(names):
        shelf.add(name, sources[i % len(sources)])


def finished(process) -> int:
    process.start()
    process.join(60)
    return process.exitcode


def test_what_two_processes_add_at_a_time_is_all_there(drawer, tmp_path):
    shelf = library(drawer, tmp_path / "library")
    sources = [drawer.task, drawer.general, drawer.same]
    wanted = [[f"{who} {i}" for i in range(8)] for who in ("one", "two", "three")]
    processes = [FORK.Process(target=adds, args=(shelf.path, sources, names)) for names in wanted]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(shelf) == sorted(name for names in wanted for name in names)
    assert not shelf.verify() and [p.name for p in shelf.path.glob("experts/.*")] == []


def contends(path: Path, source: Path, who: str) -> None:
    """Add and remove one name that others do too; only the library's own errors may come of it."""
    shelf = coterie.library.open(path)
    for _ in range(10):
        for change in (lambda: shelf.add("shared", source, description=who), lambda: shelf.remove("shared")):
            try:
                change()
            except coterie.CoterieError as error:
                if not error.what.startswith(("holds an expert", "holds no expert")):
                    raise


def test_two_processes_that_want_one_name(drawer, tmp_path):
    shelf = library(drawer, tmp_path / "library", "general")
    sources = [drawer.task, drawer.same]
    processes = [FORK.Process(target=contends, args=(shelf.path, s, s.name)) for s in sources]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert set(shelf) - {"shared"} == {"general"} and not shelf.verify()


STEPS = [(Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (shutil, "copyfile"), (shutil, "rmtree"),
         (os, "replace"), (os, "fsync"), (store, "hash_of")]  # fmt: skip


def killed_at(step: int, path: Path, source: Path, change: str) -> None:
    """Change the library; die before the step-th thing that is done to files."""
    shelf, left = coterie.library.open(path), [step]

    def counted(function):
        def call(*args, **keys):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **keys)

        return call

    for owner, name in STEPS:
        setattr(owner, name, counted(getattr(owner, name)))
    shelf.add("new", source) if change == "add" else shelf.remove("task")


@pytest.mark.parametrize("change", ["add", "remove"])
def test_killed_before_each_step(change, drawer, tmp_path):
    """At every point either the old library is there or the new one, and what was meant can be done again."""
    shelf = library(drawer, tmp_path / "library", "task", "general")
    wanted = ["task", "general", "new"] if change == "add" else ["general"]
    seen = set()
    for step in range(100):
        code = finished(FORK.Process(target=killed_at, args=(step, shelf.path, drawer.same, change)))
        found = coterie.library.open(shelf.path)
        assert list(found) in (["task", "general"], wanted)
        assert all(fault.expert is None for fault in found.verify())  # at most, a folder that belongs to nobody
        seen.add(tuple(found))
        if list(found) != wanted:
            found.add("new", drawer.same) if change == "add" else found.remove("task")
        assert list(found) == wanted
        if code == 0:
            break
        assert code == -signal.SIGKILL
        found.remove("new") if change == "add" else shutil.rmtree(found.path / "experts")
        if change == "remove":
            shutil.rmtree(shelf.path)
            shelf = library(drawer, shelf.path, "task", "general")
    assert code == 0 and step > 2 and seen == {("task", "general"), tuple(wanted)}
    found.add("last", drawer.general)
    assert not found.verify() and not list(found.path.glob("experts/.*.partial-*"))


def adds_for_ever(path: Path, source: Path, ready) -> None:
    shelf = coterie.library.open(path)
    ready.set()
    for i in range(10**6):
        shelf.add(f"{os.getpid()} {i}", source)


def test_killed_at_random(drawer, tmp_path):
    shelf = library(drawer, tmp_path / "library", "task")
    draw = random.Random(0)
    for _ in range(10):
        ready = FORK.Event()
        process = FORK.Process(target=adds_for_ever, args=(shelf.path, drawer.same, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(draw.uniform(0.0, 0.2))
        before = set(shelf)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = coterie.library.open(shelf.path)
        assert before <= set(found)
        assert all(fault.expert is None for fault in found.verify())
    found.add("last", drawer.general)
    assert not found.verify() and not list(found.path.glob("experts/.*.partial-*"))
    assert len(list(found.path.glob("experts/*"))) == len(found)
