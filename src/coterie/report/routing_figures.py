"""The page's figures of routing: what the routers did on data, each with a sentence that says what to see."""

from __future__ import annotations

import math
from statistics import fmean

import torch

from .charts import (
    COLOURS,
    OTHER,
    SCALE,
    Figure,
    Layers,
    axis_names,
    by_depth,
    cells,
    colour_bar,
    heat,
    level_line,
    listed,
    percent,
    wrapped,
)
from .routing import RoutingRecord, committees, dead, dominant, standing_committee


def routed(axis: Layers, record: RoutingRecord) -> list[Figure]:
    """What the routers did on data."""
    figures = [_who(axis, record), _where(axis, record)]
    if any(task.hits.isfinite().any() for task in record.tasks):
        figures.append(_accuracy(axis, record))
    if any(task.margin.isfinite().any() for task in record.tasks):
        figures += [_certainty(axis, record, "margin"), _certainty(axis, record, "entropy")]
    if bool(record.kappa.isfinite().any()) and len(axis.paths) > 1:
        figures.append(_agreement(axis, record))
    if len(record.experts) > 1:
        figures.append(_committee(record))
    return figures


def _who(axis: Layers, record: RoutingRecord) -> Figure:
    tasks = [task.task for task in record.tasks]
    views = [{"z": [record.share[:, members].nanmean(1).tolist()]} for _, _, members in axis.views]
    z = views[0]["z"][0]
    own = [
        (z[t][task.expert], max(range(len(z[t])), key=z[t].__getitem__) == task.expert)
        for t, task in enumerate(record.tasks)
        if task.expert is not None
    ]
    if own:
        said = (
            f"{sum(right for _, right in own)} of {len(own)} tasks with a known expert give it the largest share; "
            f"it gets {percent(fmean(s for s, _ in own))} of their gates on average "
            f"(fair share: {percent(1 / len(record.experts))})."
        )
    else:
        top = record.mass.mean(0)
        best = int(top.argmax())
        said = f"{record.experts[best]} answers most: {percent(float(top[best]))} of the gates over all tasks."
    return Figure(
        "who",
        "Who answers, by task",
        said,
        "Mean gate of each expert over a task's tokens and over the chosen layers; padding does not count.",
        [
            cells(z, record.experts, tasks, "share")
            | {
                "texttemplate": "%{z:.0%}" if len(tasks) * len(record.experts) <= 144 else "",
                "hovertemplate": "%{y} → %{x}: %{z:.1%}<extra></extra>",
            }
        ],
        {"xaxis": axis_names(record.experts), "yaxis": axis_names(tasks) | {"autorange": "reversed"}},
        170 + max(120, min(640, 32 * len(tasks))),
        "layer",
        views,
    )


def _where(axis: Layers, record: RoutingRecord) -> Figure:
    means = [record.share.nanmean(0), *record.share]
    top = means[0].nan_to_num().max(-1)
    layer = int(top.values.argmax())
    return Figure(
        "where",
        "Who answers, by layer",
        f"Over all tasks the most one-sided layer is {axis.paths[layer]}: {record.experts[int(top.indices[layer])]} "
        f"takes {percent(float(top.values[layer]))} of its tokens.",
        "Mean gate of each expert in each layer. Choose a task above the figure; a click on a row chooses its layer.",
        [heat(axis, means[0].tolist(), record.experts, "share", zmin=0, zmax=1, form=".0%")],
        {"yaxis": axis.axis(), "shapes": axis.separators(), "xaxis": axis_names(record.experts)},
        axis.height(),
        "task",
        [{"z": [mean[axis.order].tolist()]} for mean in means],
        ["all tasks", *(task.task for task in record.tasks)],
    )


def _accuracy(axis: Layers, record: RoutingRecord) -> Figure:
    known = [task for task in record.tasks if task.expert is not None]
    hits = torch.stack([task.hits for task in known], dim=1)
    by_kind = {label: float(hits[members].nanmean()) for label, members in axis.kinds}
    by_kind = {label: value for label, value in by_kind.items() if value == value}
    best, worst = max(by_kind, key=by_kind.__getitem__), min(by_kind, key=by_kind.__getitem__)
    counts = record.candidates.sum(1)
    chance = float((1 / counts[counts > 1]).mean())
    said = f"A token's first choice is its task's expert in {percent(float(hits.nanmean()))} of cases (chance: "
    said += f"{percent(chance)})"
    said += f"; {best} routes best ({percent(by_kind[best])})" if len(by_kind) > 1 else ""
    said += f", {worst} worst ({percent(by_kind[worst])})." if len(by_kind) > 1 else "."
    return Figure(
        "accuracy",
        "Is the routing right?",
        said,
        "Share of tokens whose largest gate is at the expert that was made for their task. Layers where that expert is "
        "no candidate, or the only one, are left out.",
        [heat(axis, hits.tolist(), [task.task for task in known], "right", zmin=0, zmax=1, form=".0%")],
        {"yaxis": axis.axis(), "shapes": axis.separators(), "xaxis": axis_names([task.task for task in known])},
        axis.height(),
    )


def _certainty(axis: Layers, record: RoutingRecord, what: str) -> Figure:
    each = torch.stack([getattr(task, what) for task in record.tasks])
    views = [by_depth(axis, values.tolist(), ".3f") for values in (each.nanmean(0), *each)]
    mean = float(each.nanmean())
    kinds = {label: float(each[:, members].nanmean()) for label, members in axis.kinds}
    kinds = {label: value for label, value in kinds.items() if value == value}
    pick = max if what == "margin" else min
    surest = pick(kinds, key=kinds.__getitem__)
    if what == "margin":
        title, said = "Margin of the router", f"The first gate leads the second by {mean:.3f} on average"
        how = "p₁ − p₂, the lead of the largest gate before selection; p is the softmax of the router's scores."
    else:
        title = "Entropy of the router"
        said = f"Before selection the gates have {percent(mean)} of the highest possible entropy (all experts alike)"
        how = (
            "−Σ p ln p / ln n over a layer's n candidates, p as above: 0 one expert is sure, 1 all are alike. A "
            "selection by order alone (top-1) is not weaker for it."
        )
    return Figure(
        what,
        title,
        said + (f"; the surest layers are {surest} ({kinds[surest]:.3f})." if len(kinds) > 1 else "."),
        how + " Mean over tokens.",
        views[0],
        {
            "xaxis": {"title": {"text": "depth"}},
            "yaxis": {"title": {"text": what}} | ({"rangemode": "tozero"} if what == "margin" else {}),
            "legend": {},
        },
        380,
        "task",
        [{"y": [line["y"] for line in view]} for view in views],
        ["all tasks", *(task.task for task in record.tasks)],
    )


def _agreement(axis: Layers, record: RoutingRecord) -> Figure:
    order = torch.tensor(axis.order)
    off = record.kappa.clone().fill_diagonal_(torch.nan)
    inside = [off[torch.tensor(m)[:, None], torch.tensor(m)] for _, m in axis.kinds if len(m) > 1]
    within = torch.cat([each.flatten() for each in inside]).nanmean() if inside else torch.tensor(torch.nan)
    mean, observed = float(off.nanmean()), float(record.agreement.clone().fill_diagonal_(torch.nan).nanmean())
    said = f"Two layers choose the same expert for {percent(observed)} of the tokens; beyond chance that is {mean:.2f} "
    said += "on a scale from 0 (independent) to 1 (always alike)"
    said += f"; layers of one kind agree by {float(within):.2f}." if float(within) == float(within) else "."
    paths = [axis.paths[i] for i in axis.order]
    heat = {
        "type": "heatmap",
        "x": paths,
        "y": paths,
        "z": off[order[:, None], order].tolist(),
        "colorscale": SCALE,
        "zmin": 0,
        "zmax": 1,
        "hovertemplate": "%{y}<br>%{x}<br>agreement beyond chance %{z:.2f}<extra></extra>",
        "colorbar": colour_bar("kappa"),
    }
    return Figure(
        "agreement",
        "Do the layers agree?",
        said,
        "Cohen's kappa of the layers' first choices, (a − c) / (1 − c): a is the share of tokens with the same choice, "
        "c what the layers' shares give by chance. Blank where two layers never see the same tokens.",
        [heat],
        {"yaxis": axis.axis(), "xaxis": axis.axis("x"), "shapes": axis.separators(both=True)},
        max(420, min(760, axis.height())),
    )


def _committee(record: RoutingRecord) -> Figure:
    mass, experts = record.mass, record.experts
    total = mass.mean(0)
    groups = committees(mass)
    group = standing_committee(mass)
    silent, loud = [experts[i] for i in dead(total)], [experts[i] for i in dominant(total)]
    even = math.ceil(len(experts) / 2)
    if len(group) < even:
        said = (
            f"A standing committee of {len(group)} ({listed([experts[i] for i in group])}) carries at least half of "
            f"the routing in every task ({even} experts if all were used alike). "
        )
    else:
        said = (
            f"No standing committee: half of the routing in every task takes {len(group)} of {len(experts)} experts "
            f"({even} if all were used alike). "
        )
    said += f"Dead: {listed(silent)}. " if silent else "No expert is dead. "
    said += f"Dominant: {listed(loud)}." if loud else "None is dominant."
    sizes = list(range(1, len(experts) + 1))
    return Figure(
        "committee",
        "A standing committee?",
        said,
        "For each size, the group of experts that carries most in the task where it carries least; the committee is "
        "the smallest group with at least half of the gates in every task. With one expert for each task, no group "
        "short of all would carry anything everywhere. Dead: under a tenth of the fair share over all tasks; dominant: "
        "over three times it (0.9 where that is more). After the “standing committee” audit of mixture-of-experts "
        "models (COMMITTEEAUDIT).",
        [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "best group, in its worst task",
                "x": sizes,
                "y": [carried for _, carried in groups],
                "text": [wrapped([experts[i] for i in members]) for members, _ in groups],
                "hovertemplate": "%{x} experts: at least %{y:.0%}<br>%{text}<extra></extra>",
                "line": {"color": COLOURS[0], "width": 2.5},
                "marker": {"size": [12 if s == len(group) else 6 for s in sizes]},
            },
            {
                "type": "scatter",
                "mode": "lines",
                "name": "all experts alike",
                "x": sizes,
                "y": [s / len(sizes) for s in sizes],
                "line": {"color": OTHER, "dash": "dot"},
                "hoverinfo": "skip",
            },
        ],
        {
            "xaxis": {"title": {"text": "experts in the group"}, "dtick": 1 if len(experts) <= 20 else None},
            "yaxis": {"title": {"text": "gates carried"}, "tickformat": ".0%", "range": [0, 1.04]},
            "legend": {},
            "shapes": [level_line(0.5)],
        },
        380,
    )
