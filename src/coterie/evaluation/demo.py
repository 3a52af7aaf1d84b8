"""The main job on real material: eight experts of one sentence encoder, combined in every way, in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import text8
from .anchors import Reader
from .cells import Cells
from .compare import Comparer, Comparison, Result
from .experts import COMMITTED, FULL, LORA, jobs
from .extract import PROVENANCE
from .picture import svg
from .suite import Task, weights_sha256
from .train import Recipe, quiet, train_shown

Grid = tuple[dict[str, int], ...]
ADAPTER_GRID: Grid = ({"rank": 16, "gate_rank": 4}, {"rank": 16, "gate_rank": 8}, {"rank": 16, "gate_rank": 16})
FULL_GRID: Grid = tuple({"rank": rank, "gate_rank": gate} for rank in (16, 32) for gate in (4, 16, 32) if gate <= rank)


@dataclass(frozen=True)
class Settings:
    """How large the demo is.

    Args:
        test_rows, validation_rows: rows of each task that are used.
        full, lora: how experts are trained.
        adapters: directory of the rank-16 adapters, one for each task.
        full_grid, adapter_grid: SMILE's parameters to choose from, for full fine-tunes and for adapters.
    """

    test_rows: int = 1000
    validation_rows: int = 250
    full: Recipe = FULL
    lora: Recipe = LORA
    adapters: Path = COMMITTED
    full_grid: Grid = FULL_GRID
    adapter_grid: Grid = ADAPTER_GRID


def run(
    out: Path,
    full: bool,
    cache: Path,
    device: str = "cpu",
    console: Console | None = None,
    tasks: tuple[Task, ...] | None = None,
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
        tasks: the suite; default: text8.
        settings: how large.

    Returns:
        What `results.json` holds.

    Raises:
        CoterieError: a package that carries the data is missing.
    """
    quiet()
    console = console or Console()
    tasks = tasks or text8.load()
    cache.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    reader = Reader(text8.base_dir(), device)
    fingerprint = weights_sha256(reader.base)
    console.print(
        f"Base: all-MiniLM-L6-v2, read as CLIP is: a class is the embedding of its label. {len(tasks)} tasks, "
        f"{settings.test_rows:,} test rows each."
    )
    sets: list[tuple[str, dict[str, Path], Grid, str]] = []
    if full:
        trainings = {
            "full fine-tunes": jobs(tasks, settings.full, fingerprint),
            "LoRA adapters, all from one seed": jobs(tasks, settings.lora, fingerprint),
            "LoRA adapters, a seed each": jobs(tasks, settings.lora, fingerprint, one_seed=False),
        }
        train_shown([job for each in trainings.values() for job in each], cache, device, console)
        for number, (title, each) in enumerate(trainings.items()):
            experts = {job.task.name: job.directory(cache) for job in each}
            grid = settings.full_grid if number == 0 else settings.adapter_grid
            sets.append((title, experts, grid, "mixture" if number == 0 else f"mixture-lora-{number}"))
    else:
        experts = {task.name: settings.adapters / task.name for task in tasks}
        for task in tasks:
            provenance = json.loads((experts[task.name] / PROVENANCE).read_text())
            if provenance["training"]["task_sha256"] != task.key:
                console.print(
                    f"! {task.name}: an installed package holds other data than the expert was trained on, so its rows "
                    "may be split otherwise; install the versions that coterie[demo] names",
                    style="yellow",
                )
        sets.append(("rank-16 adapters of full fine-tunes", experts, settings.adapter_grid, "mixture"))

    comparisons = []
    with _saying(console) as say:
        comparer = Comparer(reader, tasks, Cells(cache / "cells"), settings.test_rows, settings.validation_rows, say)
        for title, experts, grid, name in sets:
            comparisons.append(comparer.compare(title, experts, grid, out / name))
    for comparison in comparisons:
        console.print(results_table(comparison))
        console.print(ladder_table(comparison))
        for warning in comparison.warnings:
            console.print(f"! {warning}", style="yellow")
    results = {"suite": "text8", "comparisons": [asdict(comparison) for comparison in comparisons]}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text("\n".join(markdown(comparison) for comparison in comparisons))
    (out / "results.csv").write_text(comma_separated(comparisons))
    tables = [table(comparison) for comparison in comparisons for table in (results_table, ladder_table)]
    (out / "results.svg").write_text(svg(list(tables), "coterie demo"))
    console.print(f"\nThe mixture is in {out / 'mixture'}, the tables are in {out}. To use it:\n")
    console.print(
        f"    import coterie, transformers\n"
        f"    model = coterie.load({str(out / 'mixture')!r})\n"
        f"    tokenizer = transformers.AutoTokenizer.from_pretrained({str(out / 'mixture')!r})",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return results


@contextmanager
def _saying(console: Console) -> Iterator[Any]:
    with console.status("comparing") as status:
        yield lambda text: status.update(f"comparing: {text}")


def results_table(comparison: Comparison) -> Table:
    """Accuracy of every method on every task, and what it keeps of the experts' skill."""
    results = comparison.results
    table = _table(f"{comparison.experts}: accuracy, %", [each.method for each in results])
    for i, task in enumerate(comparison.tasks):
        table.add_row(task, *(_percent(each.accuracy[i]) for each in results), end_section=task == comparison.tasks[-1])
    for name, intervals in (
        ("normalised", [each.normalised for each in results]),
        ("recovered gap", [each.recovered_gap for each in results]),
    ):
        table.add_row(name, *(_percent(each.value) for each in intervals), style="bold")
        table.add_row("  95% interval", *(f"{_percent(each.low)} to {_percent(each.high)}" for each in intervals))
    table.add_row("parameters", *(f"{each.ratio:.2f}x" for each in results))
    chosen = (f"{each.method}: {_chosen(each)}" for each in results if each.chosen)
    table.caption = f"chosen on validation rows: {'; '.join(chosen)}"
    return table


def ladder_table(comparison: Comparison) -> Table:
    """From the expert to the mixture, one thing taken away at a time; and how often the routing is right."""
    rungs = {**comparison.ladder, "token-layers routed to the expert": comparison.routing}
    table = _table(f"{comparison.experts}: from expert to mixture, %", list(rungs))
    for i, task in enumerate(comparison.tasks):
        table.add_row(task, *(_percent(each[i]) for each in rungs.values()), end_section=task == comparison.tasks[-1])
    table.add_row("mean", *(_percent(sum(each) / len(each)) for each in rungs.values()), style="bold")
    table.caption = (
        f"chance of the expert: {_percent(1 / len(comparison.tasks))}; overlap of the experts' gate subspaces: "
        f"{comparison.overlap[0]:.3f} (chance {comparison.overlap[1]:.3f})"
    )
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _chosen(result: Result) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.chosen.items())


def markdown(comparison: Comparison) -> str:
    """Both tables as Markdown."""
    return "\n\n".join(
        f"## {table.title}\n\n{_markdown_rows(table)}\n\n{table.caption}\n"
        for table in (results_table(comparison), ladder_table(comparison))
    )


def _markdown_rows(table: Table) -> str:
    lines = [[str(column.header) for column in table.columns], ["---"] + ["---:"] * (len(table.columns) - 1)]
    lines += [list(row) for row in zip(*(map(str, column.cells) for column in table.columns), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comma_separated(comparisons: list[Comparison]) -> str:
    """One line for each set of experts, method and task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["experts", "method", "task", "rows", "accuracy", "parameter_ratio"])
    for comparison in comparisons:
        for each in comparison.results:
            for task, rows, accuracy in zip(comparison.tasks, comparison.rows, each.accuracy, strict=True):
                writer.writerow([comparison.experts, each.method, task, rows, accuracy, each.ratio])
    return text.getvalue()
