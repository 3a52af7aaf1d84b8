"""Renders docs/sweeps.md from what sweeps.py wrote to benchmarks/results/sweeps.json.

What stands between `<!-- parameters -->` or `<!-- decay -->` and `<!-- end -->` is replaced.

    python benchmarks/sweeps_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from page import ROOT, filled, shown, table
from pictures import _new, _save

Result = dict[str, Any]
# Accuracy over eight tasks of CLIP-ViT-B/32, full fine-tunes, as the notebooks of the reference implementation
# (fusion-bench, examples/smile_upscaling) report it; 768 is the full rank of the square layers.
PUBLISHED: dict[str, dict[int, float]] = {
    "rank": {4: 80.3, 8: 84.0, 16: 86.6, 32: 88.2, 64: 88.9, 128: 89.3},
    "gate_rank": {1: 84.7, 2: 86.4, 4: 87.4, 8: 87.7, 16: 88.2, 32: 88.1, 64: 88.5, 128: 88.4, 768: 81.0},
    "top_k": {1: 88.18, 2: 87.77, 4: 87.06, 8: 86.55},
}
PUBLISHED_BASE, PUBLISHED_EXPERTS = 48.2, 90.3
KINDS = {"full": "full fine-tunes of MiniLM", "lora": "LoRA adapters of rank 16", "clip": "CLIP-ViT-B/32, published"}
AXES = {"rank": "rank", "gate_rank": "gate rank", "top_k": "top-k"}
MARKERS = {"full": "o-", "lora": "s-", "clip": "x--"}


def interval(value: Result) -> str:
    """Percent, with its 95% interval."""
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def gap(accuracy: float) -> float:
    """The share of the way from CLIP's base to its experts."""
    return (accuracy - PUBLISHED_BASE) / (PUBLISHED_EXPERTS - PUBLISHED_BASE)


def curves(result: Result) -> dict[str, dict[str, dict[int, float]]]:
    """Kind of experts -> axis -> value -> recovered gap."""
    ours = {
        kind: {
            axis: {point["value"]: point["recovered_gap"]["value"] for point in points}
            for axis, points in result[kind]["points"].items()
        }
        for kind in ("full", "lora")
        if kind in result
    }
    published = {axis: {value: gap(found) for value, found in each.items()} for axis, each in PUBLISHED.items()}
    return {**ours, "clip": published}


def sweep_picture(result: Result, path: Path) -> None:
    """Recovered gap over each parameter, ours beside what is published."""
    figure, panels = plt.subplots(1, len(AXES), figsize=(10, 3.4), layout="constrained", sharey=True)
    for axes, (axis, name) in zip(panels, AXES.items(), strict=True):
        for kind, by_axis in curves(result).items():
            points = by_axis[axis]
            axes.plot(list(points), [100 * value for value in points.values()], MARKERS[kind], label=KINDS[kind], ms=4)
        axes.set(xscale="log", xlabel=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("recovered gap, %")
    panels[0].legend(frameon=False, fontsize=7, loc="lower right")
    _save(figure, path)


def sweep_table(result: Result, axis: str) -> str:
    """A line for each value: ours in full, the published accuracy beside it."""
    published = PUBLISHED[axis]
    found = {
        kind: {point["value"]: point for point in result[kind]["points"][axis]}
        for kind in ("full", "lora")
        if kind in result
    }
    rows = []
    for value in sorted({value for points in found.values() for value in points} | set(published)):
        row = [str(value)]
        for points in found.values():
            point = points.get(value)
            row += (
                [interval(point["recovered_gap"]), f"{100 * point['routing']:.0f}", f"{point['ratio']:.2f}"]
                if point
                else ["", "", ""]
            )
        row += [f"{published[value]:.1f}", f"{100 * gap(published[value]):.1f}"] if value in published else ["", ""]
        rows.append(row)
    head = [AXES[axis]]
    for kind in found:
        head += [f"{KINDS[kind]}: recovered gap, %", "right expert, %", "parameters, x base"]
    return table([*head, f"{KINDS['clip']}: accuracy", "recovered gap, %"], rows)


def sweeps(result: Result, picture: str) -> str:
    parts = [
        "The suite `text8`, one seed; one parameter changed at a time. "
        + "; ".join(
            f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}: around "
            + ", ".join(f"{AXES[axis]} {value}" for axis, value in result[kind]["centre"].items())
            + f", {result[kind]['rows']} test rows a task, measured with {shown(result[kind]['versions'])}"
            for kind in ("full", "lora")
            if kind in result
        )
        + ". Command: `python benchmarks/sweeps.py`; figures in `benchmarks/results/sweeps.json`.",
        f"![Recovered gap over each parameter]({picture})",
        "*Recovered gap*: the share of the way from the base's accuracy to the experts', with 95% paired bootstrap "
        "intervals. *Right expert*: the share of tokens and layers that are routed to the expert of their task.",
    ]
    for axis in AXES:
        parts.append(sweep_table(result, axis))
    for kind in ("full", "lora"):
        if kind in result:
            rungs = {"base": result[kind]["base"], **result[kind]["ladder"]}
            lines = [[rung, f"{100 * mean(skill):.1f}"] for rung, skill in rungs.items()]
            parts += [f"Mean accuracy without a router to err, {KINDS[kind]}:", table(["told the task", "%"], lines)]
    return "\n\n".join(parts)


def decay_picture(result: Result, path: Path) -> None:
    """Normalised accuracy over the number of experts."""
    figure, axes = _new()
    points = result["decay"]["points"]
    counts = [point["count"] for point in points]
    for name in points[0]["methods"]:
        values = [100 * point["methods"][name]["normalised"]["value"] for point in points]
        style = {"linestyle": "--", "color": "black"} if name == "base" else {}
        axes.plot(counts, values, marker="o", ms=4, label=name, **style)
    axes.set(xlabel="experts", ylabel="normalised accuracy, %", xticks=counts)
    figure.legend(frameon=False, fontsize=7, ncols=5, loc="outside lower center")
    _save(figure, path)


def decay(result: Result, picture: str) -> str:
    about, points = result["decay"], result["decay"]["points"]
    names = sorted(points[-1]["methods"], key=lambda name: -points[-1]["methods"][name]["normalised"]["value"])
    accuracy = [[name, *(interval(point["methods"][name]["normalised"]) for point in points)] for name in names]
    routed = [
        [name, *(f"{100 * point['methods'][name]['routing']:.0f}" for point in points)]
        for name in names
        if points[0]["methods"][name]["routing"] is not None
    ]
    counts = [f"{point['count']} experts" for point in points]
    return "\n\n".join(
        (
            f"The first tasks of `text20`, LoRA adapters of rank 16, {about['rows']} test rows a task, one seed. What "
            "a method has to choose (scales, SMILE's gate rank, how mean activations are pooled) is chosen on "
            f"{about['validation_rows']} validation rows a task, for each number of experts anew. "
            f"Command: `python benchmarks/sweeps.py --only decay`. Measured with {shown(about['versions'])}.",
            f"![Normalised accuracy over the number of experts]({picture})",
            "Normalised accuracy, %, with 95% paired bootstrap intervals:",
            table(["method", *counts], accuracy),
            "Tokens and layers that are routed to the expert of their task, %:",
            table(["method", *counts], routed),
        )
    )


def render(results: Path, page: Path) -> None:
    """Fill the page from the results, and write its pictures (in a folder beside it)."""
    result = json.loads((results / "sweeps.json").read_text())
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    text = page.read_text()
    if "full" in result or "lora" in result:
        sweep_picture(result, folder / "parameters.svg")
        text = filled(text, "parameters", sweeps(result, f"{folder.name}/parameters.svg"))
    if "decay" in result:
        decay_picture(result, folder / "decay.svg")
        text = filled(text, "decay", decay(result, f"{folder.name}/decay.svg"))
    page.write_text(text)


if __name__ == "__main__":
    render(ROOT / "benchmarks" / "results", ROOT / "docs" / "sweeps.md")
