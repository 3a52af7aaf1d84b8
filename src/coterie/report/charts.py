"""What the page's figures are made of: figures as plain data, axes, colours, and pieces of plotly's plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..building.report import by_kind
from .subspaces import LayerSpaces

# Okabe and Ito's colours, that the colour-blind can tell apart, the last two darkened to be seen on white.
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#a89a00", "#7a5c3e"]
OTHER = "#9aa0a6"
DASHES = ["solid", "dot", "dash", "longdash"]
# From little to much: one hue, so that order can be read without colours. The page turns it over in the dark.
SCALE = [[0, "#f4f6f8"], [0.25, "#c3d7ea"], [0.5, "#74a9d3"], [0.75, "#2a72b0"], [1, "#0b3566"]]
SPACE_COLOURS = ["#0072b2", "#56b4e9", "#e69f00", OTHER]
MOST_POINTS = 24


@dataclass
class Figure:
    """A figure of the page.

    Attributes:
        key: its name in the page.
        title: what it shows.
        seen: what to see, from the numbers.
        how: what exactly is measured.
        data, layout: as plotly takes them.
        height: in pixels.
        chooser: what changes it: "layer", "task" or nothing.
        views: per choice, what changes (as `Plotly.restyle` takes it).
        choices: of a figure with a chooser of its own, what can be chosen.
    """

    key: str
    title: str
    seen: str
    how: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 360
    chooser: str = ""
    views: list[dict[str, Any]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)


class Layers:
    """The mixture layers as figures order them: by kind, within a kind from shallow to deep.

    Attributes:
        paths: module paths, in the model's order; everything else indexes these.
        kinds: (label, indices) of each kind.
        order: all indices, kind by kind.
        views: (label, group, indices) of every choice of layers: all, a kind, one layer.
    """

    def __init__(self, layers: Sequence[LayerSpaces]):
        self.paths = [layer.path for layer in layers]
        at = {path: i for i, path in enumerate(self.paths)}
        groups = by_kind(layers)
        patterns = [pattern.split(".") for pattern, _ in groups]
        shared = 0
        while len(patterns) > 1 and all(len(p) > shared + 1 and p[shared] == patterns[0][shared] for p in patterns):
            shared += 1
        self.kinds: list[tuple[str, list[int]]] = []
        for (pattern, shape), members in groups.items():
            label = ".".join(part for part in pattern.split(".")[shared:] if part != "*")
            if label in [known for known, _ in self.kinds]:
                label = f"{label} ({shape.replace(' ', '')})"
            self.kinds.append((label, [at[member.path] for member in members]))
        self.order = [i for _, members in self.kinds for i in members]
        self.views = [("all layers", "", list(range(len(self.paths))))]
        self.views += [(f"{label} (mean of {len(m)})", "kinds", m) for label, m in self.kinds if len(m) > 1]
        self.views += [(self.paths[i], label, [i]) for label, members in self.kinds for i in members]

    def axis(self, letter: str = "y") -> dict[str, Any]:
        """An axis of layers: one tick for each kind, at its middle."""
        axis: dict[str, Any] = {
            "type": "category",
            "tickmode": "array",
            "tickvals": [self.paths[members[len(members) // 2]] for _, members in self.kinds],
            "ticktext": [shortened(label) for label, _ in self.kinds],
            "automargin": True,
            "ticks": "",
            "showgrid": False,
        }
        return axis | {"autorange": "reversed"} if letter == "y" else axis | {"tickangle": -60}

    def separators(self, both: bool = False) -> list[dict[str, Any]]:
        """Lines between the kinds."""
        lines = []
        for cut in torch.tensor([len(m) for _, m in self.kinds]).cumsum(0).tolist()[:-1]:
            line = {"type": "line", "line": {"width": 1.5, "color": OTHER}}
            lines.append(line | {"xref": "paper", "x0": 0, "x1": 1, "y0": cut - 0.5, "y1": cut - 0.5})
            if both:
                lines.append(line | {"yref": "paper", "y0": 0, "y1": 1, "x0": cut - 0.5, "x1": cut - 0.5})
        return lines

    def height(self) -> int:
        return int(130 + min(720, max(100, 11 * len(self.paths))))


class Palette:
    """A colour for each expert; the most used have colours of their own, the rest are grey."""

    def __init__(self, experts: Sequence[str], mass: Sequence[float] | None):
        ranked = sorted(range(len(experts)), key=lambda i: -(mass[i] if mass else 0))
        own = sorted(ranked[: len(COLOURS)])
        self.colours = [COLOURS[own.index(i)] if i in own else OTHER for i in range(len(experts))]
        self.dashes = [DASHES[i // len(COLOURS) % len(DASHES)] for i in range(len(experts))]


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 or share == 0 else f"{100 * share:.1f}%"


def heat(
    axis: Layers, rows: list[list[float | None]] | list[list[float]], columns: list[str], what: str, form: str, **z: Any
) -> dict[str, Any]:
    """Layers x columns, layers in the axis's order."""
    return {
        "type": "heatmap",
        "x": columns,
        "y": [axis.paths[i] for i in axis.order],
        "z": [rows[i] for i in axis.order],
        "colorscale": SCALE,
        "hovertemplate": f"%{{y}}<br>%{{x}}: %{{z:{form}}}<extra></extra>",
        "colorbar": colour_bar(what) | ({"tickformat": ".0%"} if "%" in form else {}),
        **z,
    }


def cells(z: list[list[float]], x: list[str], y: list[str], what: str) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": z,
        "colorscale": SCALE,
        "zmin": 0,
        "zmax": 1,
        "xgap": 1,
        "ygap": 1,
        "colorbar": colour_bar(what) | {"tickformat": ".0%"},
    }


def by_depth(axis: Layers, values: list[float | None] | list[float], form: str) -> list[dict[str, Any]]:
    """A line for each kind of layer, over its depth."""
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label,
            "x": list(range(len(members))),
            "y": [values[i] for i in members],
            "text": [axis.paths[i] for i in members],
            "line": {
                "color": COLOURS[k % len(COLOURS)],
                "dash": DASHES[k // len(COLOURS) % len(DASHES)],
                "width": 2,
            },
            "marker": {"size": 6, "symbol": ["circle", "square", "diamond", "triangle-up", "x", "star"][k % 6]},
            "hovertemplate": f"%{{text}}: %{{y:{form}}}<extra></extra>",
        }
        for k, (label, members) in enumerate(axis.kinds)
    ]


def axis_names(names: list[str]) -> dict[str, Any]:
    """An axis of names."""
    return {
        "type": "category",
        "tickmode": "array",
        "tickvals": names,
        "ticktext": [shortened(name) for name in names],
        "automargin": True,
        "showgrid": False,
        "ticks": "",
    }


def level_line(y: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": OTHER, "dash": "dot"},
    }


def colour_bar(what: str) -> dict[str, Any]:
    return {"title": {"text": what, "side": "right"}, "thickness": 10, "outlinewidth": 0}


def shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def wrapped(names: list[str]) -> str:
    return "<br>".join(", ".join(names[i : i + 6]) for i in range(0, len(names), 6))
