"""Renders docs/routers.md from what library_routers.py wrote to benchmarks/results/library_routers.json.

What stands between `<!-- drawer -->` and `<!-- end -->` is replaced.

    python benchmarks/library_routers_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from page import ROOT, filled, shown, table
from pictures import _save

Result = dict[str, Any]


def percent(values: list[float | None]) -> str:
    """The mean in percent; a dash where some task has no answer."""
    known = [value for value in values if value is not None]
    return f"{100 * mean(known):.1f}" if known and len(known) == len(values) else "–"


def summary(result: Result) -> str:
    """A line for each way, the best on the experts' own tasks first."""
    own = len(result["tasks"]) - result["held_out"]
    ranked = sorted(result["ways"].items(), key=lambda item: -mean(item[1]["accuracy"][:own]))
    rows = [
        [
            name, way["asks"] or "nothing", percent(way["accuracy"][:own]), percent(way["accuracy"][own:]),
            f"{100 * mean(way['right']):.0f}" if way.get("right") else "–",
            f"{way['entropy']:.2f}" if "entropy" in way else "–",
            f"{way['ratio']:.2f}", f"{way['memory_mib']:.0f}", f"{way['parameters']:.2f}", f"{way['seconds']:.0f}",
        ]
        for name, way in ranked
    ]  # fmt: skip
    head = ["way", "asks, beside the adapters, for", "own tasks", "held out", "right expert, %", "entropy",
            "time, x base", "memory, MiB", "weights, x base", "seconds to make"]  # fmt: skip
    return table(head, rows)


def by_task(result: Result, tasks: slice) -> str:
    """Accuracy on each task, in percent."""
    rows = [
        [name, *("–" if each is None else f"{100 * each:.0f}" for each in way["accuracy"][tasks])]
        for name, way in result["ways"].items()
    ]
    return table(["way", *result["tasks"][tasks]], rows)


def heat_maps(result: Result, path: Path) -> None:
    """Mean gates of every way that routes: a row for each task, those held out below the line."""
    routed = {name: way for name, way in result["ways"].items() if "gates" in way}
    tasks, columns = result["tasks"], 3
    lines = -(-len(routed) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(10, 2.6 * lines), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, (axes, (name, way)) in enumerate(zip(grid.flat, routed.items(), strict=False)):
        axes.axis("on")
        axes.imshow(way["gates"], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.axhline(len(tasks) - result["held_out"] - 0.5, color="black", lw=0.8)
        axes.set_yticks(range(len(tasks)), tasks if place % columns == 0 else [""] * len(tasks), fontsize=6)
        axes.set_xticks([])
        axes.set_title(name, fontsize=9)
    _save(figure, path)


def section(result: Result, picture: str) -> str:
    own = len(result["tasks"]) - result["held_out"]
    return "\n\n".join(
        (
            f"{own} adapters, {len(result['tasks'])} tasks, {result['rows']} test rows of each; one thread. Command: "
            "`make bench-routers`; figures in `benchmarks/results/library_routers.json`. "
            f"Measured with {shown(result['versions'])}.",
            summary(result),
            "*Right expert*: the share of tokens and layers whose largest gate is that of the expert trained on "
            "the task; of n that are equally large, the n-th part. *Entropy* of a token's gates in a layer: 0 where "
            "one expert answers, 1 where all do alike. *Time*: processor time of a batch of 128 rows of the first "
            "task, over the base's, passes alternating. *Memory*: the peak of anonymous memory that answering that "
            "batch takes beside the model, with the merged copy that the task's expert is run by; sampled, and some "
            "tens apart from run to run. *Weights*: all that the model holds; the encoder by which retrieval reads "
            "texts, here as large as the base, is not among them. *Seconds to make* it from the adapters, by the "
            "clock, with what is gathered, learned or searched for.",
            f"![Which expert answers]({picture})",
            "*Mean gates over tokens and layers: rows are tasks, those that no expert was trained on below the line; "
            "columns the experts, in the order of the rows.*",
            "Accuracy by task, %: the experts' own,",
            by_task(result, slice(0, own)),
            "and those that no expert was trained on:",
            by_task(result, slice(own, None)),
        )
    )


def render(results: Path, page: Path) -> None:
    """Fill the page from the results, and write its picture (in a folder beside it)."""
    result = json.loads((results / "library_routers.json").read_text())
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    heat_maps(result, folder / "gates.svg")
    page.write_text(filled(page.read_text(), "drawer", section(result, f"{folder.name}/gates.svg")))


if __name__ == "__main__":
    render(ROOT / "benchmarks" / "results", ROOT / "docs" / "routers.md")
