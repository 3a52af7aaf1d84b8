"""Renders docs/smear.md from what domains.py, tasks.py and learned.py wrote to benchmarks/results/.

What stands between `<!-- domains -->`, `<!-- tasks -->` or `<!-- learned -->` and `<!-- end -->` is replaced.

    python benchmarks/routers_page.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from page import ROOT, filled, shown, table
from pictures import _new, _save

NAMES = {
    "smear": "SMEAR", "smear_2x": "SMEAR, twice the experts", "tag": "tag", "hash": "hash", "switch": "top-1 (Switch)",
    "st_gumbel": "straight-through Gumbel", "reinforce": "REINFORCE", "dselect_k": "DSelect-k", "soft_moe": "Soft MoE",
    "adamix": "AdaMix", "poly": "Poly (latent skills)", "mhr": "MHR (latent skills, by blocks)",
    "ensemble": "ensemble (soft)",
    "single": "one expert, equal compute", "single_wide": "one expert, equal parameters", "lora": "LoRA, equal rank",
    "rslora": "rsLoRA, equal rank",
}  # fmt: skip
TOLD = ("tag", "poly", "mhr")  # the task of every row, in training and in the test
Result = dict[str, Any]


def name(key: str, method: Result) -> str:
    """What the tables call a method: in italics where its active compute is above that of one expert."""
    told = ", task known" if key in TOLD else ""
    return f"{NAMES[key]}{told}" if method["matched"] else f"*{NAMES[key]}{told}*"


def over_tasks(method: Result) -> list[float]:
    """Mean accuracy over the tasks, for each seed."""
    return [mean(run) for run in method["accuracy"]]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def best_first(result: Result) -> list[tuple[str, Result]]:
    return sorted(result["methods"].items(), key=lambda item: -mean(over_tasks(item[1])))


def accuracy_table(result: Result) -> str:
    rows = [
        [
            name(key, method),
            spread(over_tasks(method)),
            *(spread(list(task)) for task in zip(*method["accuracy"], strict=True)),
        ]
        for key, method in best_first(result)
    ]
    base = result["base"]
    rows.append(["the frozen base", f"{100 * mean(base):.1f}", *(f"{100 * task:.1f}" for task in base)])
    return table(["method", "mean", *result["tasks"]], rows)


def cost_table(result: Result) -> str:
    rows = [
        [
            name(key, method), str(method["experts"]), str(method["rank"]), f"{method['trainable']:,}",
            f"{method['step_ms']:.0f}", f"{method['memory_mib']:.0f}", f"{method['rate']:g}",
            "–" if method["specialisation"] is None else f"{mean(method['specialisation']):.2f}",
        ]
        for key, method in best_first(result)
    ]  # fmt: skip
    head = ["method", "experts", "rank of each", "trained parameters", "ms a step", "memory, MiB", "learning rate",
            "specialisation"]  # fmt: skip
    return table(head, rows)


def accuracy_picture(result: Result, path: Path) -> None:
    """Mean accuracy over the tasks: every seed, and their mean."""
    methods = best_first(result)
    figure, axes = _new(height=1.0 + 0.3 * len(methods))
    for place, (_, method) in enumerate(methods):
        values = [100 * value for value in over_tasks(method)]
        colour = "#1b6ca8" if method["matched"] else "#c0504d"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, ms=4)
        axes.plot([mean(values)], [place], "|", color=colour, ms=14, mew=2)
    axes.set_yticks(range(len(methods)), [name(key, method).strip("*") for key, method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel("accuracy, mean over tasks, % (red: more active compute than one expert)")
    _save(figure, path)


def block(layer: str) -> str:
    """The number of the block that a layer is in."""
    return next(part for part in layer.split(".") if part.isdigit())


def gates_picture(result: Result, path: Path) -> None:
    """Which expert serves which task: a method's last routed layer of every block, first seed."""
    routed = [(key, method) for key, method in result["methods"].items() if method["gates"]]
    if not routed:
        return
    tasks, columns = result["tasks"], 2
    lines = -(-len(routed) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(9, lines * (0.5 + 0.17 * len(tasks))), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (key, method) in zip(grid.flat, routed, strict=False):
        last = {block(layer): gates for layer, gates in method["gates"].items()}
        experts = len(next(iter(last.values()))[0])
        picture = [[gate for gates in last.values() for gate in gates[task]] for task in range(len(tasks))]
        axes.axis("on")
        axes.imshow(picture, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for number in range(1, len(last)):
            axes.axvline(number * experts - 0.5, color="black", lw=0.8)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=7)
        axes.set_xticks([(i + 0.5) * experts - 0.5 for i in range(len(last))], [f"block {b}" for b in last], fontsize=7)
        axes.set_title(name(key, method).strip("*"), fontsize=9)
    _save(figure, path)


def gates_table(result: Result, shown_of: tuple[str, ...] = ("smear", "switch")) -> str:
    """The expert that serves each task most in the last routed layer of every block, with its mean gate."""
    head, columns = ["task"], []
    for key in shown_of:
        gates_of = (result["methods"][key]["gates"] if key in result["methods"] else None) or {}
        for number, gates in {block(layer): gates for layer, gates in gates_of.items()}.items():
            head.append(f"{NAMES[key]}, block {number}")
            columns.append([f"{max(range(len(row)), key=row.__getitem__) + 1} ({max(row):.2f})" for row in gates])
    if not columns:
        return ""
    rows = [[task, *(column[i] for column in columns)] for i, task in enumerate(result["tasks"])]
    return "The expert that serves each task most there, by its number in its layer, and its mean gate:\n\n" + table(
        head, rows
    )


def section(result: Result, experiment: str, folder: Path) -> str:
    """The part of the page that one experiment fills; its pictures are written into the folder."""
    accuracy_picture(result, folder / f"{experiment}.svg")
    gates_picture(result, folder / f"{experiment}-gates.svg")
    settings, seeds = result["settings"], max(len(method["accuracy"]) for method in result["methods"].values())
    about = (
        f"{result['about']}; rows: {shown(result['rows'])}. {settings['steps']} steps of {settings['batch']} rows, "
        f"{seeds} seeds. Command: `python benchmarks/{experiment}.py`; figures in "
        f"`benchmarks/results/{experiment}.json`. Measured with {shown(result['versions'])}."
    )
    gates = (
        f"![Which expert serves which task]({folder.name}/{experiment}-gates.svg)\n\n*Mean gates of the first seed: "
        "rows are tasks, columns the experts of the last routed layer in every block.*"
        if any(method["gates"] for method in result["methods"].values())
        else ""
    )
    return "\n\n".join(
        part
        for part in (
            about,
            f"![Accuracy of every method]({folder.name}/{experiment}.svg)",
            "Accuracy on test rows, %: mean ± standard deviation over seeds.",
            accuracy_table(result),
            "*Specialisation* is the mutual information of task and expert as a share of what it can be: 0 where every "
            "task spreads over the experts alike, 1 where each has its own. A step's time is processor time on one "
            "thread; memory is the anonymous peak of training over what the process held before.",
            cost_table(result),
            gates,
            gates_table(result),
        )
        if part
    )


def costs(result: Result, experiment: str, folder: Path) -> str:
    """What learned routers cost: the parts of `learned.py` that were run."""
    shapes = result["shapes"]
    parts = [
        f"Batches of {shapes['batch']} × {shapes['tokens']} tokens, rank {shapes['rank']}, {result['threads']} thread, "
        "in processor time; ratios are medians of alternating rounds. Command: "
        f"`python benchmarks/{experiment}.py`; figures in `benchmarks/results/{experiment}.json`. "
        f"Measured with {shown(result['versions'])}."
    ]
    if "site" in result:
        keys = [f"{name}, in experts" for name in ("least", "products", "smear", "ensemble")]
        keys.append("site over dense and least")
        rows = [[f"{r['width']}, {r['experts']} experts", *(f"{r[key]:.2f}" for key in keys)] for r in result["site"]]
        parts += [
            "One layer, in units of what a single expert adds to it; least is 1 + N / S:",
            table(["layer", *keys], rows),
        ]
    if "whole" in result:
        rows = [
            [
                f"{r['expert']}, {r['experts']} experts",
                *(f"{r['variants'][name]['ratio']:.2f}" for name in ("base", "smear", "ensemble")),
            ]
            for r in result["whole"]
        ]
        parts += [
            "A whole model of MiniLM's shape, over the same with a single expert:",
            table(["experts", "base", "SMEAR", "ensemble"], rows),
        ]
    if "steps" in result:
        rows = [
            [
                f"`{name}`",
                f"{r['ms']:.0f}",
                f"{r['ratio']:.2f}",
                f"{r['peak_mib']:.0f}",
                f"{r['memory_ratio']:.2f}",
                f"{r['trainable']:,}",
            ]
            for name, r in result["steps"].items()
        ]
        head = ["method, 8 experts", "ms a step", "over single", "peak MiB", "over single", "trained parameters"]
        parts += ["A training step of that model:", table(head, rows)]
    if "xlora" in result:
        names = list(next(iter(result["xlora"].values()))["variants"])
        rows = [
            [what, *(f"{each['variants'][name]['ratio']:.2f}" for name in names)]
            for what, each in result["xlora"].items()
        ]
        parts += [
            "X-LoRA of 8 experts of rank 8 in a small Llama (4 layers of 256), over PEFT's single LoRA:",
            table(["", *names], rows),
        ]
    if "prompt" in result:
        rows = [
            [what, *(f"{each['variants'][name]['ratio']:.2f}" for name in ("pair", "merged"))]
            for what, each in result["prompt"].items()
        ]
        parts += [
            "SMEAR of 8 experts of rank 8 in that Llama, deciding once by a prompt of 32 tokens, over the base: its "
            'merged pair beside the weights, and merged into them (`model.coterie.use_path("merged")`):',
            table(["", "pair", "merged"], rows),
        ]
    return "\n\n".join(parts)


def render(results: Path, page: Path) -> None:
    """Fill the page's parts from the results that exist, and write its pictures (in a folder beside it)."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    text = page.read_text()
    for experiment, write in (("domains", section), ("tasks", section), ("learned", costs)):
        path = results / f"{experiment}.json"
        if path.exists():
            text = filled(text, experiment, write(json.loads(path.read_text()), experiment, folder))
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "smear.md")
    options = parser.parse_args()
    render(options.results, options.page)
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
