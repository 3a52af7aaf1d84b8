"""The main job on real material: eight experts of one sentence encoder, combined in every way, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import coterie

from . import tables
from .cells import Cells, write_whole
from .combine import Experts, Way, recipe
from .compare import TITLES, check_directory, expert_sets
from .comparer import Comparer, Comparison, Result
from .extract import PROVENANCE
from .picture import svg
from .suite import Suite, Task
from .suites.text8 import SUITE
from .tables import Sheet, percent
from .train import quiet

Grid = list[dict[str, Any]]
SCALES: Grid = [{"scale": scale} for scale in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)]
ADAPTER_GRID: Grid = [{"rank": 16, "gate_rank": gate} for gate in (4, 8, 16)]
FULL_GRID: Grid = [{"rank": rank, "gate_rank": gate} for rank in (16, 32) for gate in (4, 16, 32) if gate <= rank]
METHODS = {"average": "average", "task_arithmetic": "task arithmetic", "smile": "SMILE"}
KINDS = {"full": "mixture", "lora": "mixture-lora-1", "lora-seeds": "mixture-lora-2"}
"""What --full trains, and the name of each mixture's directory."""


@dataclass(frozen=True)
class Settings:
    """How large the demo is.

    Args:
        suite: what it runs on.
        test, test_rows, validation_rows: rows that a task is made with, and those of them that are used.
        adapters: directory of the rank-16 adapter of each task.
        full_grid, adapter_grid: SMILE's parameters to choose from, for full fine-tunes and for adapters.
    """

    suite: Suite = SUITE
    test: int = 2000
    test_rows: int = 1000
    validation_rows: int = 250
    adapters: Mapping[str, Path] = field(default_factory=lambda: SUITE.committed)
    full_grid: Grid = field(default_factory=lambda: FULL_GRID)
    adapter_grid: Grid = field(default_factory=lambda: ADAPTER_GRID)


def run(
    out: Path,
    full: bool,
    cache: Path,
    device: str = "cpu",
    console: Console | None = None,
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """Run the demo: print the tables and write them, with the mixture, under `out`.

    Args:
        out: directory for `mixture/` and `results.json`, `.md`, `.csv` and `.svg`; what has these names is replaced.
        full: train the full fine-tunes and two sets of LoRA adapters here, and compare those, in place of the rank-16
            adapters of the full fine-tunes that the package carries.
        cache: where trained experts and finished cells are kept, so that a second run is quick.
        device: torch device.
        console: where to print; default: standard output.
        settings: how large.

    Returns:
        What `results.json` holds.

    Raises:
        CoterieError: a package that carries the data is missing.
    """
    quiet()
    console = console or Console()
    suite = settings.suite
    tasks = suite.tasks(test=settings.test)
    check_directory(out, "--out")
    check_directory(cache, "--cache")
    cache.mkdir(parents=True, exist_ok=True)
    reader = suite.reader(suite.base(cache, device, False), device)
    console.print(
        f"Base: all-MiniLM-L6-v2, read as CLIP is: a class is the embedding of its label. {len(tasks)} tasks, "
        f"{settings.test_rows:,} test rows each."
    )
    sets: list[tuple[str, dict[str, Path], str]] = []
    if full:
        for kind, name in KINDS.items():
            (experts,) = expert_sets(suite, tasks, reader, kind, 1, False, cache, device, console)
            sets.append((TITLES[kind], experts, name))
    else:
        _check_data(tasks, settings.adapters, console)
        sets.append(("rank-16 adapters of full fine-tunes", dict(settings.adapters), "mixture"))

    comparisons = []
    with console.status("comparing") as status:
        cells = Cells(cache / "cells", lambda text: console.print(f"! {text}", style="yellow"))
        rows = (settings.test_rows, settings.validation_rows)
        comparer = Comparer(reader, tasks, cells, *rows, say=lambda text: status.update(f"comparing: {text}"))
        for title, directories, name in sets:
            grid = settings.full_grid if title == TITLES["full"] else settings.adapter_grid
            grids = {"task_arithmetic": SCALES, "smile": grid}
            comparison = comparer.compare(title, directories, list(METHODS), grids, whole=False)
            comparisons.append(comparison)
            status.update(f"building {out / name}")
            way = Way("smile", comparison.result("smile").parameters, "base")
            # It makes `out`, and nothing does before: a demo that is stopped leaves no empty directory.
            coterie.build(recipe(way, Experts(reader, directories)), out=out / name, force=True)
    sheets = [sheet for each in comparisons for sheet in (results_sheet(each), tables.ladder(each, each.experts))]
    for sheet in sheets:
        console.print(sheet.rich())
    for note in dict.fromkeys(note for each in comparisons for note in each.notes):
        console.print(f"! {note}", style="yellow")
    results = tables.write(out, suite.name, comparisons, sheets)
    write_whole(out / "results.svg", svg([sheet.rich() for sheet in sheets], "coterie demo"))
    console.print(f"\nThe mixture is in {out / 'mixture'}, the tables are in {out}. To use it:\n")
    console.print(
        f"    import coterie, transformers\n"
        f"    model = coterie.load({str(out / 'mixture')!r})\n"
        f"    tokenizer = transformers.AutoTokenizer.from_pretrained({str(out / 'mixture')!r})",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return results


def _check_data(tasks: tuple[Task, ...], adapters: Mapping[str, Path], console: Console) -> None:
    """Say so where the adapters were trained on other data than what is installed."""
    for task in tasks:
        provenance = json.loads((adapters[task.name] / PROVENANCE).read_text())
        if provenance["training"]["task_sha256"] != task.key:
            console.print(
                f"! {task.name}: an installed package holds other data than the expert was trained on, so its rows "
                "may be split otherwise; install the versions that coterie[demo] names",
                style="yellow",
            )


def results_sheet(comparison: Comparison) -> Sheet:
    """Accuracy of every method on every task, and what it keeps of the experts' skill."""
    results = comparison.results
    rows = [[task, *(_shown(each, i) for each in results)] for i, task in enumerate(comparison.tasks)]
    count = len(rows)
    for name, intervals in (
        ("normalised", [each.normalised for each in results]),
        ("recovered gap", [each.recovered_gap for each in results]),
    ):
        rows.append([name, *("-" if each is None else percent(each.value) for each in intervals)])
        rows.append(
            ["  95% interval", *("-" if i is None else f"{percent(i.low)} to {percent(i.high)}" for i in intervals)]
        )
    rows.append(["parameters", *(f"{each.ratio:.2f}x" for each in results)])
    chosen = [f"{METHODS[r.method]}: {tables.parameters(r.parameters)}" for r in results if "best" in r.setting]
    return Sheet(
        f"{comparison.experts}: accuracy, %", ["", *(METHODS.get(each.method, each.method) for each in results)], rows,
        f"chosen on validation rows: {'; '.join(chosen)}" if chosen else "", (count, count + 2),
    )  # fmt: skip


def _shown(result: Result, task: int) -> str:
    return percent(result.skill[task] if result.skill else None)
