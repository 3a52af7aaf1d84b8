"""Every way of combining the same experts, on the same rows: what each keeps of their skill, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import CoterieError
from . import own, suites, tables
from .cells import Cells
from .combine import find, known, ways
from .comparer import Comparer, Comparison
from .reader import Reader
from .suite import Suite, Task
from .train import Job, jobs, quiet, train_shown

TINY_TASKS = 3
TINY_ROWS = {"train": 48, "validation": 24, "test": 32}


def compare(
    suite: str | Path | Suite,
    methods: Sequence[str] | str,
    out: str | Path,
    *,
    experts: str | None = None,
    seeds: int = 1,
    rows: int | None = None,
    validation_rows: int | None = 200,
    tiny: bool = False,
    cache: str | Path,
    device: str = "cpu",
    grids: dict[str, list[dict[str, Any]]] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train or load a suite's experts, combine them in every way, and write one directory about what came out.

    Experts are trained in processes of their own: a script calls this under `if __name__ == "__main__":`. Everything
    finished (an expert, a model's scores on a task) is kept in the cache by content: a comparison that is
    stopped goes on where it was, and one that is run again computes nothing anew.

    Args:
        suite: a name (`text8`, or `text8:control` for a group of its tasks), a YAML file (see `own`), or a suite.
        methods: names of mixtures and merges, or "all".
        out: directory for `results.json`, `.csv`, `.md` and `report.html`; what has these names is replaced.
        experts: "full" or "lora" (all from one seed), "lora-seeds" (a seed each), or "committed", those that the suite
            brings along. Default: the suite's own, if it trains none; else "full".
        seeds: sets of experts to train; their spread is reported.
        rows: test rows of each task, at most; default: the suite's own number.
        validation_rows: the same of the rows that parameters are chosen on; None for all.
        tiny: a few rows and steps, to see that all of it runs.
        cache: directory of trained experts and finished cells.
        device: torch device.
        grids: parameters to choose from on validation rows, by method; default: `combine.GRIDS`, and scales.
        console: where to show progress; default: standard output.

    Returns:
        What `results.json` holds.

    Raises:
        CoterieError: an unknown suite, method or kind of experts; a task with one class or no rows; data, base or
            experts that cannot be read; a base or an expert whose answers are no numbers; `out` or `cache` is a file or
            cannot be written in.
    """
    quiet()
    console, cache, out = console or Console(), Path(cache), Path(out)
    names = _names(methods)
    check_directory(out, "--out")
    check_directory(cache, "--cache")
    suite = suite if isinstance(suite, Suite) else find_suite(suite)
    if seeds < 1:
        raise CoterieError(f"{seeds} sets of experts", "--seeds", "give 1 or more")
    kind = kind_of(suite, experts, seeds)
    tasks = suite.tasks(**TINY_ROWS)[:TINY_TASKS] if tiny else suite.tasks(test=suite.test_rows)
    if tiny and grids is None:
        grids = {name: [way.parameters for way in ways(name, len(tasks))[:2]] for name in names}
    check(tasks)
    cache.mkdir(parents=True, exist_ok=True)
    reader = suite.reader(suite.base(cache, device, tiny), device)
    sets = expert_sets(suite, tasks, reader, kind, seeds, tiny, cache, device, console)

    def warn(text: str) -> None:
        console.print(f"! {text}", style="yellow", soft_wrap=True)

    comparisons: list[Comparison] = []
    results: dict[str, Any] = {}
    with console.status("comparing") as status:
        cells = Cells(cache / "cells", warn)
        comparer = Comparer(
            reader, tasks, cells, rows, validation_rows, say=lambda text: status.update(f"comparing: {text}")
        )
        for number, directories in enumerate(sets):
            seed = None if kind == "committed" else number
            comparisons.append(comparer.compare(TITLES[kind], directories, names, grids, seed))
            if tiny:
                comparisons[-1].notes.insert(
                    0, f"tiny: a few rows and steps of {len(tasks)} tasks; it only shows that all runs"
                )
            results = tables.write(out, suite.name, comparisons)
    for comparison in comparisons:
        console.print(tables.brief(comparison).rich())
        for note in comparison.notes:
            console.print(note, markup=False, soft_wrap=True)
    if len(comparisons) > 1:
        console.print(tables.summary_sheet(comparisons).rich())
    return results


TITLES = {
    "full": "full fine-tunes",
    "lora": "LoRA adapters, all from one seed",
    "lora-seeds": "LoRA adapters, a seed each",
    "committed": "experts that the suite brings along",
}


def find_suite(source: str | Path) -> Suite:
    """The suite of a name, or of a YAML file."""
    if str(source).endswith((".yaml", ".yml")) or Path(source).is_file():
        return own.read(Path(source))
    return suites.find(str(source))


def expert_sets(
    suite: Suite,
    tasks: tuple[Task, ...],
    reader: Reader,
    kind: str,
    seeds: int,
    tiny: bool,
    cache: Path,
    device: str,
    console: Console,
) -> list[dict[str, Path]]:
    """Directories of each set of experts by task, trained where the cache lacks them."""
    if kind == "committed":
        return [{task.name: suite.committed[task.name] for task in tasks}]
    recipe = suite.recipes[kind.removesuffix("-seeds")]
    if tiny:
        recipe = replace(recipe, steps=4, batch=8)
    trainings: list[list[Job]] = []
    for number in range(seeds):
        seed = recipe.seed + number * (len(tasks) if kind.endswith("-seeds") else 1)
        trainings.append(jobs(suite, tasks, replace(recipe, seed=seed), reader, not kind.endswith("-seeds")))
    train_shown([job for each in trainings for job in each], cache, device, console, 1 if tiny else None)
    return [{job.task.name: job.directory(cache) for job in each} for each in trainings]


def check(tasks: Sequence[Task], splits: Sequence[str] = ("validation", "test")) -> None:
    """Refuse tasks that cannot tell anything.

    Args:
        tasks: of a suite.
        splits: those that are needed.

    Raises:
        CoterieError: a task without rows in a split that is needed, or a classification with fewer than two classes.
    """
    for task in tasks:
        for split in splits:
            if not len(getattr(task, split)):
                raise CoterieError(f"task {task.name!r} has no {split} rows", "suite", "give some")
        if task.metric in ("accuracy", "f1") and len(task.labels) < 2:
            raise CoterieError(
                f"task {task.name!r} has {len(task.labels)} class", "suite", "a classification needs two or more"
            )


def _names(methods: Sequence[str] | str) -> list[str]:
    given = [name.strip() for name in methods.split(",")] if isinstance(methods, str) else list(methods)
    names = known() if given == ["all"] else [name for name in dict.fromkeys(given) if name]
    if not names:
        raise CoterieError("names no method", "--methods", f"name some, or all: {', '.join(known())}")
    for name in names:
        find(name)
    return ["average", *(name for name in names if name != "average")]


def check_directory(directory: Path, option: str) -> None:
    """Refuse a place where no directory can be made or written in, before any work."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise CoterieError(f"{there} is no directory", option, "choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CoterieError(f"{there} cannot be written in", option, "choose another")


def kind_of(suite: Suite, experts: str | None, seeds: int = 1) -> str:
    """The kind of experts that is asked for, or the suite's own.

    Raises:
        CoterieError: the suite has none of that kind, or given experts are to have further seeds.
    """
    kind = experts or ("full" if suite.recipes else "committed")
    kinds = [*suite.recipes, *(f"{name}-seeds" for name in suite.recipes if name == "lora")]
    kinds += ["committed"] if suite.committed else []
    if not kinds:
        raise CoterieError(f"{suite.name} names no experts", "suite", "name one for each task under experts:")
    if kind not in kinds:
        raise CoterieError(f"{suite.name} has no experts of kind {kind!r}", "--experts", f"known: {', '.join(kinds)}")
    if kind == "committed" and seeds > 1:
        raise CoterieError("experts that are given have no further seeds", "--seeds", "leave it out, or train experts")
    return kind
