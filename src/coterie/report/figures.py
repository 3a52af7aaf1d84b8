"""The page's figures of the experts' weights, each with a sentence that says what to see."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

import torch

from .charts import (
    MOST_POINTS,
    SCALE,
    SPACE_COLOURS,
    Figure,
    Layers,
    Palette,
    axis_names,
    by_depth,
    colour_bar,
    heat,
    level_line,
    percent,
)
from .subspaces import LayerSpaces, Spaces

SPACES = ("one", "two", "three", "mixed")


def weights(
    layers: list[LayerSpaces], experts: list[str], built: dict[str, dict[str, Any]], palette: Palette
) -> list[Figure]:
    """What the experts' weights say.

    Args:
        layers: of the mixture.
        experts: their names.
        built: layer path -> what the build measured there (`LayerReport` as a dict); empty where nothing is recorded.
        palette: the experts' colours.
    """
    axis = Layers(layers)
    figures = []
    if built:
        residuals = _table(axis, built, "residuals", len(experts))
        kept = [[None if r is None else 1 - r * r for r in row] for row in residuals]
        flat = [value for row in kept for value in row if value is not None]
        if flat and min(flat) < 0.9995:
            figures.append(_energy(axis, kept, flat, experts))
        norms = _table(axis, built, "norms", len(experts))
        if any(value is not None for row in norms for value in row):
            figures.append(_norms(axis, norms, experts))
    if any(values for layer in layers for values in layer.spectra):
        figures.append(_spectrum(axis, layers, experts, palette))
    if any(layer.overlap for layer in layers):
        figures += [_overlap(axis, layers, experts), _overlap_by_depth(axis, layers)]
    if any(layer.spaces for layer in layers):
        figures.append(_spaces(axis, layers, experts))
    return figures


def kept_sentence(layers: list[LayerSpaces], built: dict[str, dict[str, Any]]) -> str:
    """How much of the deltas the mixture holds."""
    values = [1 - r * r for each in built.values() for r in each["residuals"] if r is not None]
    if not values:
        return ""
    if min(values) >= 0.9995:
        return "Every delta is kept whole: the chosen ranks leave nothing out."
    return f"The chosen ranks keep {percent(fmean(values))} of the deltas' energy, {percent(min(values))} at the least."


def overlap_means(layers: list[LayerSpaces]) -> tuple[float, float] | None:
    """(mean overlap over layers and pairs, what chance would give)."""
    pairs = [(fmean(_off_diagonal(layer.overlap)), layer.chance) for layer in layers if layer.overlap]
    return (fmean(p[0] for p in pairs), fmean(p[1] for p in pairs)) if pairs else None


def _energy(axis: Layers, kept: list[list[float | None]], flat: list[float], experts: list[str]) -> Figure:
    least = min((v, p, e) for p, row in enumerate(kept) for e, v in enumerate(row) if v is not None)
    return Figure(
        "energy",
        "Energy kept by the chosen rank",
        f"The mixture keeps {percent(fmean(flat))} of the deltas' energy on average; the least is "
        f"{percent(least[0])}, of {experts[least[2]]} in {axis.paths[least[1]]}.",
        "1 − (|delta − kept| / |delta|)², Frobenius norms, measured in float64 when the mixture was built.",
        [heat(axis, kept, experts, "kept", zmin=min(0.5, min(flat)), zmax=1, form=".1%")],
        {"yaxis": axis.axis(), "shapes": axis.separators(), "xaxis": axis_names(experts)},
        axis.height(),
    )


def _norms(axis: Layers, norms: list[list[float | None]], experts: list[str]) -> Figure:
    means = {
        label: fmean(v for i in members for v in norms[i] if v is not None)
        for label, members in axis.kinds
        if any(v is not None for i in members for v in norms[i])
    }
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    said = f"The experts changed {most} most ({percent(means[most])} of the base weight's norm on average)"
    return Figure(
        "norms",
        "How far each expert moved from the base",
        said + (f" and {least} least ({percent(means[least])})." if len(means) > 1 else "."),
        "|delta| / |W| in Frobenius norm, of the whole delta, measured when the mixture was built.",
        [heat(axis, norms, experts, "|delta| / |W|", zmin=0, form=".3f")],
        {"yaxis": axis.axis(), "shapes": axis.separators(), "xaxis": axis_names(experts)},
        axis.height(),
    )


def _spectrum(axis: Layers, layers: list[LayerSpaces], experts: list[str], palette: Palette) -> Figure:
    def lines(members: list[int]) -> dict[str, Any]:
        xs, ys = [], []
        for e in range(len(experts)):
            values = [layers[i].spectra[layers[i].experts.index(e)] for i in members if e in layers[i].experts]
            longest = max((len(v) for v in values), default=0)
            at = list(range(longest))
            if longest > MOST_POINTS:  # the first ones all, then ever fewer
                at = sorted({0, *(round((longest - 1) ** (j / (MOST_POINTS - 1))) for j in range(MOST_POINTS))})
            xs.append([i + 1 for i in at])
            ys.append([median(v[i] for v in values if i < len(v)) for i in at])
        return {"x": xs, "y": ys}

    views = [lines(members) for _, _, members in axis.views]
    needed = [_directions_for(s, 0.9) / len(s) for layer in layers for s in layer.spectra if s]
    return Figure(
        "spectrum",
        "Singular values of the deltas",
        f"A delta has 90% of its stored energy in the first {percent(median(needed))} of its directions (median over "
        "layers and experts); the steeper a line, the fewer directions matter.",
        "Singular values of each expert's delta as stored, its weight folded in; over several layers, the median of "
        "each.",
        [
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": views[0]["x"][e],
                "y": views[0]["y"][e],
                "line": {"color": palette.colours[e], "dash": palette.dashes[e], "width": 2},
                "hovertemplate": "direction %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
            }
            for e, name in enumerate(experts)
        ],
        {
            "xaxis": {"title": {"text": "direction"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "singular value"}, "type": "log", "tickformat": "~g", "nticks": 3},
            "legend": {},
        },
        420,
        "layer",
        views,
    )


def _overlap(axis: Layers, layers: list[LayerSpaces], experts: list[str]) -> Figure:
    def matrix(members: list[int]) -> dict[str, Any]:
        total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
        chance = torch.zeros_like(total)
        for i in members:
            found = layers[i].overlap
            if found is not None:
                at = torch.tensor(layers[i].experts)
                total[at[:, None], at] += torch.tensor(found, dtype=torch.float64)
                chance[at[:, None], at] += layers[i].chance
        ratio = (total / chance).fill_diagonal_(torch.nan)
        return {"z": [ratio.tolist()]}

    views = [matrix(members) for _, _, members in axis.views]
    z = views[0]["z"][0]
    highest = max((v, i, j) for i, row in enumerate(z) for j, v in enumerate(row) if v == v)
    mean, chance = overlap_means(layers) or (0.0, 1.0)
    verdict = (
        "so they are hard to tell apart by their weights"
        if mean > max(0.2, 3 * chance)
        else "so their weights can be told apart"
    )
    return Figure(
        "overlap",
        "Overlap between experts, against chance",
        f"What the router reads of two experts overlaps by {mean:.3f} on average, {mean / chance:.1f} times chance "
        f"({chance:.3f}), {verdict}; most alike are {experts[highest[1]]} and {experts[highest[2]]} "
        f"({highest[0]:.1f} times chance).",
        "|Q_i Q_jᵀ|² / min(g_i, g_j) in Frobenius norm, Q an orthonormal basis of an expert's gate rows (its leading "
        "right singular directions): 0 orthogonal, 1 the same space; divided by g / d, what random spaces have. Over "
        "several layers: mean over mean.",
        [
            {
                "type": "heatmap",
                "x": experts,
                "y": experts,
                "z": z,
                "colorscale": SCALE,
                "zmin": 0,
                "zmax": max(3.0, highest[0]),
                "xgap": 1,
                "ygap": 1,
                "texttemplate": "%{z:.1f}" if len(experts) <= 12 else "",
                "hovertemplate": "%{y} and %{x}: %{z:.2f} times chance<extra></extra>",
                "colorbar": colour_bar("× chance"),
            }
        ],
        {"yaxis": axis_names(experts) | {"autorange": "reversed"}, "xaxis": axis_names(experts)},
        170 + max(160, min(560, 30 * len(experts))),
        "layer",
        views,
    )


def _overlap_by_depth(axis: Layers, layers: list[LayerSpaces]) -> Figure:
    def ratio(i: int) -> float | None:
        found = layers[i].overlap
        return fmean(_off_diagonal(found)) / layers[i].chance if found else None

    values = {i: value for i in axis.order if (value := ratio(i)) is not None}
    most = max(values, key=values.__getitem__)
    above = sum(v > 3 for v in values.values())
    return Figure(
        "overlap_depth",
        "Overlap by depth",
        f"{above} of {len(values)} layers lie above three times chance; the highest is {axis.paths[most]} "
        f"({values[most]:.1f} times).",
        "Mean over pairs of experts of the overlap above, divided by chance, per layer.",
        by_depth(axis, [values.get(i) for i in range(len(axis.paths))], ".2f"),
        {
            "xaxis": {"title": {"text": "depth"}},
            "yaxis": {"title": {"text": "overlap / chance"}, "rangemode": "tozero"},
            "legend": {},
            "shapes": [level_line(1)],
        },
        380,
    )


def _spaces(axis: Layers, layers: list[LayerSpaces], experts: list[str]) -> Figure:
    measured = [i for i, layer in enumerate(layers) if layer.spaces]
    rows = ["random change", *reversed(experts)]

    def bars(members: list[int]) -> dict[str, Any]:
        found: dict[str, list[Spaces]] = {name: [] for name in rows}
        for i in members:
            for e, each in zip(layers[i].experts, layers[i].spaces or [], strict=False):
                found[experts[e]].append(each)
            if (random := layers[i].random) is not None:
                found["random change"].append(random)
        parts = [[fmean(getattr(s, part) for s in found[n]) if found[n] else None for n in rows] for part in SPACES]
        return {"x": parts}

    views = [bars(members) for _, _, members in axis.views]
    lead = views[0]["x"][0]
    mine, chance = fmean(v for v in lead[1:] if v is not None), lead[0]
    rest = fmean(a + b for a, b in zip(*(views[0]["x"][p][1:] for p in (1, 2)), strict=True) if a is not None)
    ratio = mine / chance if chance else math.inf
    word = "more than" if ratio > 1.25 else "less than" if ratio < 0.8 else "about as much as"
    names = ["I: leading", "II: the rest of the base's", "III: where the base is zero", "between leading and others"]
    return Figure(
        "spaces",
        "Where the experts changed the base: spaces I, II and III",
        f"{percent(mine)} of the experts' energy lies between the base's leading directions (space I), {word} a "
        f"random change would put there ({percent(chance)}); {percent(rest)} lies in spaces II and III together."
        + ("" if len(measured) == len(layers) else f" Measured in {len(measured)} of {len(layers)} layers."),
        "U, V are the base weight's singular vectors; k of them lead: the fewest whose singular values add up to half "
        "of the sum. Shares of |delta|² in the blocks of UᵀΔV: I has both indices up to k; II and III both above k, II "
        "where both are within the base's rank; the last colour is what couples a leading direction with another, "
        "which the paper counts to none. Deltas are as stored, so what truncation left out is not seen. The "
        "lowest row is what random directions would give. (Tang et al. 2024, arXiv:2408.10174, section 3.)",
        [
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": rows,
                "x": views[0]["x"][p],
                "marker": {"color": SPACE_COLOURS[p]},
                "hovertemplate": "%{y}: %{x:.1%}<extra>" + name + "</extra>",
            }
            for p, name in enumerate(names)
        ],
        {
            "barmode": "stack",
            "xaxis": {"tickformat": ".0%", "range": [0, 1]},
            "yaxis": axis_names(rows),
            "legend": {},
        },
        200 + max(120, min(560, 26 * len(rows))),
        "layer",
        views,
    )


def _table(axis: Layers, built: dict[str, dict[str, Any]], key: str, experts: int) -> list[list[float | None]]:
    return [list(built[path][key]) if path in built else [None] * experts for path in axis.paths]


def _off_diagonal(matrix: list[list[float]]) -> list[float]:
    return [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]


def _directions_for(values: list[float], share: float) -> int:
    energy = torch.tensor(values, dtype=torch.float64).square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1
