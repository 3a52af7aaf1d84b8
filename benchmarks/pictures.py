"""The pictures of the speed page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cells import NEIGHBOURS, REFERENCE

Account = dict[str, Any]
# The same file from the same figures: no date, fixed identifiers, text as text.
plt.rcParams |= {"svg.hashsalt": "coterie", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
COLOUR = {"coterie": "#1b6ca8", REFERENCE: "#c0504d", "stacked": "#6aa84f", "grouped": "#8e63b5", "other": "#c0504d"}
NAME = {"vit": "ViT", "bert": "BERT", "llama": "Llama"}


def _new(width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    plt.close(figure)


def _ratio(account: Account, name: str) -> float | None:
    figures = account["variants"].get(name)
    return figures["ratio"] if figures else None


def overhead(accounts: list[Account], path: Path) -> None:
    """Measured overhead against theory, with the lines of the goals."""
    figure, axes = _new()
    accounts = [a for a in accounts if a["cell"]["dtype"] == "float32"]
    theory = [100 * a["cost"]["theory"] for a in accounts]
    ends = [min(theory) * 0.8, max(theory) * 1.25]
    for times, style in ((1, "-"), (2, "--"), (3, ":")):
        axes.plot(ends, [times * end for end in ends], style, color="grey", lw=1, label=f"{times} x theory")
    for name, marker in ((REFERENCE, "x"), ("coterie", "o")):
        points = [(t, 100 * (r - 1)) for t, a in zip(theory, accounts, strict=True) if (r := _ratio(a, name)) and r > 1]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=COLOUR[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="theory: extra multiply-adds, %", ylabel="measured overhead, %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())
    axes.legend(frameon=False)
    _save(figure, path)


def few(accounts: list[Account], path: Path) -> None:
    """Ratio to dense against the ratio of bytes."""
    figure, axes = _new()
    bytes_ratio = [a["cost"]["bytes_ratio"] for a in accounts]
    ends = [1.0, max(bytes_ratio) * 1.05]
    axes.plot(ends, ends, "-", color="grey", lw=1, label="ratio of bytes")
    goal = sorted({*ends, 1.6 / 1.3} if ends[1] > 1.6 / 1.3 else {*ends})
    axes.plot(goal, [max(1.6, 1.3 * x) for x in goal], "--", color="grey", lw=1, label="goal")
    for name, marker in ((REFERENCE, "x"), ("coterie", "o")):
        points = [(x, r) for x, a in zip(bytes_ratio, accounts, strict=True) if (r := _ratio(a, name))]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=COLOUR[name], label=name)
    axes.set(xlabel="bytes that must be read / dense", ylabel="time / dense")
    axes.legend(frameon=False)
    _save(figure, path)


def paths(accounts: list[Account], path: Path) -> None:
    """Each path's ratio to dense against the number of tokens."""
    figure, axes = _new()
    accounts = sorted(accounts, key=lambda a: a["cell"]["tokens"])
    tokens = [a["cell"]["tokens"] for a in accounts]
    axes.plot(tokens, [1 + a["cost"]["theory"] for a in accounts], ":", color="grey", label="theory")
    for name in ("stacked", "grouped", REFERENCE):
        points = [(t, r) for t, a in zip(tokens, accounts, strict=True) if (r := _ratio(a, name))]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", color=COLOUR[name], label=name)
    chosen = [a["variants"]["coterie"]["ratio"] for a in accounts]
    axes.plot(tokens, chosen, "o", mfc="none", ms=9, color=COLOUR["coterie"], label="coterie's choice")
    axes.set(xscale="log", xlabel="tokens", ylabel="time / dense")
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    _save(figure, path)


def _bars(accounts: list[Account], labels: list[str], others: list[str], path: Path, goals: bool) -> None:
    figure, axes = _new(height=1.2 + 0.42 * len(accounts))
    where = range(len(accounts))
    for offset, name, colour in ((-0.19, "coterie", "coterie"), (0.19, "neighbour", "other")):
        values = [_ratio(a, name if name == "coterie" else o) or 0.0 for a, o in zip(accounts, others, strict=True)]
        shown = "coterie" if name == "coterie" else (REFERENCE if set(others) == {REFERENCE} else name)
        bars = axes.barh([i + offset for i in where], values, 0.36, color=COLOUR[colour], label=shown)
        axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=2, fontsize=7)
    theory = [1 + a["cost"]["theory"] for a in accounts]
    axes.plot(theory, list(where), "|", color="black", ms=14, label="theory")
    if goals:
        limits = [(a["goals"][0]["limit"], i) for i, a in enumerate(accounts) if a["goals"]]
        axes.plot(*zip(*limits, strict=True), "d", color="orange", ms=5, label="goal")
    axes.axvline(1, color="grey", lw=1)
    axes.set_yticks(list(where), labels)
    axes.invert_yaxis()
    axes.set_xlabel("time / dense")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def models(accounts: list[Account], path: Path) -> None:
    """Whole models, coterie beside the reference."""
    labels = [
        f"{NAME[c['model']]}, E = {c['experts']}, {c['dtype']}, {c['threads']} thread{'s' * (c['threads'] > 1)}"
        for c in (a["cell"] for a in accounts)
    ]
    _bars(accounts, labels, [REFERENCE] * len(accounts), path, goals=True)


def neighbours(accounts: list[Account], path: Path) -> None:
    """The same mathematics beside PEFT."""
    cells = [a["cell"] for a in accounts]
    names = [NEIGHBOURS[c["method"]] for c in cells]
    subjects = [NAME.get(c["model"], f"{c['d_in']} → {c['d_out']}") for c in cells]
    labels = [
        f"{name}: {subject}, E = {c['experts']}, {c['tokens']:,} tokens"
        for name, subject, c in zip(names, subjects, cells, strict=True)
    ]
    _bars(accounts, labels, names, path, goals=False)


DRAW = {"overhead": overhead, "few": few, "paths": paths, "models": models, "neighbours": neighbours}
CAPTION = {
    "overhead": "Layers, 512 tokens and more, float32: measured overhead against theory",
    "few": "Layers, up to 32 tokens: time against the bytes that must be read",
    "paths": "The compute paths against the number of tokens: 768 → 3072, E = 8, rank 32, float32, one thread",
    "models": "Whole models: time as a ratio to the dense base",
    "neighbours": "The same mathematics in coterie and in PEFT: time as a ratio to the dense base",
}
