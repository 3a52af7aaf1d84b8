"""Renders docs/suites.md from what suites.py wrote to benchmarks/results/suites.json.

What stands there between `<!-- gates -->` or `<!-- parts -->`, and in docs/choosing.md between `<!-- suites -->`, and
`<!-- end -->` is replaced.

    python benchmarks/suites_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from coterie.evaluation.combine import EXAMPLES, GATE_ROWS, STATISTICS_ROWS
from coterie.evaluation.tables import parameters, percent
from coterie.evaluation.tables import shown as answered
from page import ROOT, filled, shown, table
from pictures import _save
from suites import PARTS, VOTED
from sweeps_page import interval

Result = dict[str, Any]
# Mean accuracy over eight tasks with full fine-tunes, as the documentation and the notebooks of the reference
# implementation (fusion-bench, modelpool/clip_vit.md and examples/smile_upscaling) report it; SMILE at gate rank 16 and
# rank 32, for Flan-T5 at 8 and 32.
PUBLISHED: dict[str, dict[str, float]] = {
    "CLIP-ViT-B/32": {
        "base": 48.2, "average": 66.5, "task_arithmetic": 68.0, "ties": 72.2, "iso_c": 82.8, "tsv_m": 83.1,
        "smile": 88.2, "expert of the task": 90.3,
    },
    "Flan-T5-base, GLUE": {
        "base": 75.7, "average": 78.9, "task_arithmetic": 78.9, "ties": 79.9, "smile": 85.5, "expert of the task": 86.4,
    },
}  # fmt: skip
ASKS = {
    VOTED: ("SMILE, `pool: model`", "nothing"),
    "smile": ("SMILE, by example, best", "nothing"),
    "average_activation": ("average activation", f"{STATISTICS_ROWS} inputs of each task"),
    "nearest_example": ("nearest example", f"{EXAMPLES} inputs of each task"),
    "retriever": ("retriever", f"{EXAMPLES} inputs of each task"),
    "phatgoose": ("PHATGOOSE", f"{GATE_ROWS:,} labelled rows of each task, 100 steps"),
}
"""What a router is called here, and what it asks for beside the experts."""
KINDS = {"full": "full fine-tunes", "lora": "LoRA adapters, all from one seed"}


def gates(result: Result) -> str:
    """A line for each part that has gates."""
    rows = []
    for name, found in result.items():
        if "gates" not in found:
            continue
        gate, part = found["gates"], found["part"]
        gains = [after - before for before, after in zip(gate["base"], gate["expert"], strict=True)]
        failed = [verdict for verdict, passed in gate["verdicts"].items() if not passed]
        rows.append(
            [name, KINDS[part["experts"]].partition(",")[0], *map(percent, (min(gains), mean(gains))),
             f"{gate['scale']:.2f}", *(percent(gate[key]) for key in ("recovered", "kept", "probe")),
             "all pass" if not failed else f"**fails**: {'; '.join(failed)}"]
        )  # fmt: skip
    head = [
        "part", "experts", "least gain of an expert, points", "mean gain", "best scale of the summed deltas",
        "gap it recovers, %", "rank 32, oracle routing keeps, %", "task named by a linear probe, %", "gates",
    ]  # fmt: skip
    return table(head, rows)


def rows_of(found: Result) -> list[list[str]]:
    """A line for each way: over sets of experts the mean and the standard deviation, of one the 95% interval."""
    several = found["part"]["seeds"] > 1

    def value(each: Result, measure: str) -> str:
        number = each[measure]
        if not number:
            return str(each["note"])
        return f"{percent(number['mean'])} ± {percent(number['spread'])}" if several else interval(number)

    ways = found["summary"] if several else found["comparisons"][0]["results"]
    return [
        [each["method"], each["setting"], each["others"] or "", each["task"],
         value(each, "normalised"), value(each, "recovered_gap"), f"{each['ratio']:.2f}x"]
        for each in ways
    ]  # fmt: skip


def chosen(found: Result) -> dict[str, Result]:
    """Method -> its row with the task not known (the experts' own: known), at what was best on validation rows."""
    rows = {}
    for each in found["summary"]:
        plain = each["others"] in (None, "base") and each["setting"] != "default"
        if plain and (each["task"] == "not known" or each["method"] == "expert of the task"):
            rows[each["method"]] = each
    return rows


def beside_published(found: Result) -> str:
    """The recovered gap of every method beside what others report of other models and tasks."""
    rows = []
    for method, each in chosen(found).items():
        row = [method, f"{percent(each['recovered_gap']['mean'])} ± {percent(each['recovered_gap']['spread'])}"]
        for published in PUBLISHED.values():
            base, experts = published["base"], published["expert of the task"]
            accuracy = published.get(method)
            row += ["", ""] if accuracy is None else [f"{accuracy:.1f}", percent((accuracy - base) / (experts - base))]
        rows.append(row)
    head = ["method", "recovered gap here, %"]
    for name in PUBLISHED:
        head += [f"{name}, published: accuracy", "recovered gap, %"]
    return table(head, rows)


def ladder(found: Result) -> str:
    """Every task of the first set of experts, from base to mixture, and how often the routing is right."""
    first = found["comparisons"][0]
    rungs = {"base": first["results"][0]["skill"], **first["ladder"]}
    rows = []
    for i, (task, metric) in enumerate(zip(first["tasks"], first["metrics"], strict=True)):
        values = [answered(each[i], metric) for each in rungs.values()]
        name = task if metric == "accuracy" else f"{task} ({metric.replace('_', ' ')})"
        rows.append([name, f"{first['rows'][i]:,}", *values, *(percent(s[i]) for s in first["routing"].values())])
    if set(first["metrics"]) == {"accuracy"}:
        means = [percent(mean(each)) for each in (*rungs.values(), *first["routing"].values())]
        rows.append(["**mean**", "", *means])
    head = [
        "task",
        "test rows",
        *rungs,
        *(f"{name}: token-layers to the task's expert, %" for name in first["routing"]),
    ]
    return table(head, rows)


def overview(result: Result) -> str:
    """Recovered gap of every part, by merges and by routers, each at its best on validation rows."""
    merges = {"average": "average", "task_arithmetic": "task arithmetic", "ties": "TIES", "tsv_m": "TSV-M"}
    rows = []
    for name, found in result.items():
        first, best = found["comparisons"][0], chosen(found)
        told = next(each for each in first["results"] if each["method"] == "smile" and each["task"] == "known")
        gaps = [best[method]["recovered_gap"]["mean"] if method in best else None for method in (*merges, "smile")]
        own = found.get("routers", {})
        if own.get("smile", {}).get("parameters") == {"rank": 32, "gate_rank": 16, "top_k": 1, "pool": "model"}:
            own = {VOTED: own["smile"], **own}  # what is best is the default
        gaps += [own[method]["recovered_gap"]["value"] if method in own else None for method in ASKS]
        gaps += [told["recovered_gap"]["value"]]
        rows.append([name, *("–" if gap is None else percent(gap) for gap in gaps)])
    names = [title for title, _ in ASKS.values()]
    return table(["part", *merges.values(), "SMILE, by token", *names, "SMILE, told the task"], rows)


def routers(found: Result) -> str:
    """What routers keep that read the experts' data, on the first set of experts."""
    rows = []
    for method, each in found["routers"].items():
        given = {n: v for n, v in each["parameters"].items() if n in ("top_k", "pool", "combine", "gate_rank")}
        rows.append(
            [*ASKS[method], parameters(given), interval(each["normalised"]), interval(each["recovered_gap"]),
             percent(each["routing"])]
        )  # fmt: skip
    head = ["router", "asks for", "at", "normalised, %", "recovered gap, %", "token-layers to the task's expert, %"]
    return table(head, rows)


def part(name: str, found: Result) -> str:
    given = found["part"]
    seeds = f"{given['seeds']} sets of experts, mean ± standard deviation over sets" if given["seeds"] > 1 else (
        "one set of experts, 95% paired bootstrap intervals"
    )  # fmt: skip
    overlap = found["comparisons"][0]["overlap"]
    text = (
        f"`{given['suite']}`, {KINDS[given['experts']]}; {seeds}; at most {given['rows']:,} test rows a task, "
        f"{given['validation_rows']} validation rows. Command: `python benchmarks/suites.py --only {name}`. Measured "
        f"with {shown(found['versions'])}."
    )
    head = ["method", "setting", "others", "task", "normalised, %", "recovered gap, %", "size"]
    about = "Every task, the first set of experts" + (
        f" (the experts' gate subspaces overlap by {overlap[0]:.3f}; by chance {overlap[1]:.3f}):" if overlap else ":"
    )
    parts = [text, table(head, rows_of(found)), about, ladder(found)]
    if found.get("routers"):
        about = "Routers on the first set of experts, the task not known, at what is best on validation rows:"
        parts += [about, routers(found)]
    if (given["suite"], given["experts"]) == ("text8", "full"):
        parts += ["Beside what is published of other models and tasks:", beside_published(found)]
    return "\n\n".join(parts)


def picture(result: Result, path: Path) -> None:
    """Normalised skill of every method that is not told the task, a panel for each part."""
    figure, panels = plt.subplots(
        -(-len(result) // 2),
        2,
        figsize=(10, 1.9 * -(-len(result) // 2)),
        layout="constrained",
        sharex=True,
        squeeze=False,
    )
    for axes in panels.flat[len(result) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels.flat, result.items(), strict=False):
        several, left_out = found["part"]["seeds"] > 1, ("best single expert", "expert of the task")
        best = {method: each["normalised"] for method, each in chosen(found).items() if method not in left_out}
        for at, (method, value) in enumerate(sorted(best.items(), key=lambda item: item[1]["mean"])):
            spread = 100 * value["spread"] if several else 0
            colour = "#1b6ca8" if method == "smile" else "grey"
            axes.errorbar(100 * value["mean"], at, xerr=spread, fmt="o", color=colour, ms=5, capsize=3)
        axes.set_yticks(range(len(best)), sorted(best, key=lambda method: best[method]["mean"]), fontsize=7)
        axes.set_title(f"{name}, {len(found['comparisons'][0]['tasks'])} tasks", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.axvline(100, color="grey", lw=0.8)
    figure.supxlabel("normalised skill, % of the experts'", fontsize=9)
    _save(figure, path)


def render(results: Path, page: Path) -> None:
    """Fill the page from the results, and write its picture (in a folder beside it)."""
    found = json.loads((results / "suites.json").read_text())
    result = {name: found[name] for name in PARTS if name in found}
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    picture(result, folder / "methods.svg")
    parts = "\n\n".join(f"## {name}\n\n{part(name, each)}" for name, each in result.items())
    page.write_text(filled(filled(page.read_text(), "gates", gates(result)), "parts", parts))
    choosing = page.with_name("choosing.md")
    choosing.write_text(filled(choosing.read_text(), "suites", overview(result)))


if __name__ == "__main__":
    render(ROOT / "benchmarks" / "results", ROOT / "docs" / "suites.md")
