"""LoRA adapters to one LoRA adapter, in factor space: the base's weights are never read, and B A is never formed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..building.inputs import open_inputs
from ..errors import CoterieError
from ..sources.adapter import AdapterExpert
from ..sources.delta import LowRank
from .inputs import Opened, as_build
from .registry import value_for
from .report import Line
from .steps import seeded

PREFIX = "base_model.model."


def look(opened: Opened, token: str | None) -> None:
    """Open the adapters, and find the layers that they adapt and the modules that they save whole.

    Raises:
        CoterieError: an expert that is no adapter, or whole modules that differ where the recipe names no head.
    """
    recipe, name = opened.recipe, opened.method.name
    full = next((expert for expert, place in opened.places.items() if not place.is_adapter), None)
    if full is not None:
        raise CoterieError(
            f"method {name} merges LoRA adapters in factor space, and this is a full fine-tune",
            f"expert {full!r}",
            "make an adapter of it with `coterie extract`, or choose a method for deltas",
        )
    if recipe.others is not None or recipe.vocabulary != "error":
        key = "others" if recipe.others is not None else "vocabulary"
        raise CoterieError(f"{key} says nothing to method {name}, which merges factors", "recipe", "leave it out")
    inputs = opened.inputs = open_inputs(as_build(recipe), token, "the merge")
    opened.warnings, opened.left_out = inputs.warnings, inputs.left_out
    opened.checkpoints = {n: c for n, c in inputs.checkpoints.items() if n != "base"}
    paths = {path: None for expert in _adapters(opened) for path in expert.adapted}
    for expert in _adapters(opened):
        for path in expert.adapted:
            expert.factors(path)
    opened.steps = [*paths, *_saved(opened)]


def _adapters(opened: Opened) -> list[AdapterExpert]:
    inputs = opened.inputs
    return [e for e in inputs.experts if isinstance(e, AdapterExpert)] if inputs else []


def configs(opened: Opened) -> list[dict[str, Any]]:
    """The adapters' configurations."""
    return [expert.config for expert in _adapters(opened)]


def _saved(opened: Opened) -> list[str]:
    """The tensors that adapters hold whole: those of the named head, or those that all have alike."""
    recipe, adapters = opened.recipe, _adapters(opened)
    if recipe.head is not None:
        for expert in adapters:
            why = f"of what is held whole, {recipe.head!r} gives its own"
            opened.left_out[f"expert {expert.name}"] |= (
                {} if expert.name == recipe.head else dict.fromkeys(expert.saved, why)
            )
        return list(next(e.saved for e in adapters if e.name == recipe.head))
    names = sorted({name for expert in adapters for name in expert.saved})
    for name in names:
        values = [expert.value(name, None) for expert in adapters]
        if any(value is None or values[0] is None or not torch.equal(value, values[0]) for value in values):
            raise CoterieError(
                f"the adapters hold {name!r} whole, and not alike",
                "experts",
                f"say whose the merge takes, as `head: {recipe.names[0]}`",
            )
    return names


def written(opened: Opened) -> int:
    """About how many bytes the merged adapter takes, from headers: of the rank that the recipe names, else at most."""
    total = 0
    for step in opened.steps:
        ranks = [rank for expert in _adapters(opened) if (rank := expert.rank_bound(step))]
        shape = opened.skeleton.tensors[f"{step}.weight" if ranks else step].shape
        given = opened.parameters.of(f"{step}.weight")
        rank = (given["rank"] or max(ranks, default=0)) if "rank" in given else sum(ranks)
        total += rank * sum(shape) if ranks else shape.numel()
    return total * opened.floating.itemsize


def merged_factors(opened: Opened, adapters: list[AdapterExpert], path: str) -> tuple[LowRank, Line]:
    """One layer's merged factors, and its line of the report (without a base's norm, and without signs)."""
    method, recipe, key = opened.method, opened.recipe, f"{path}.weight"
    own = [expert.factors(path) for expert in adapters]
    weights = [float(value_for(expert.weight, key, 1.0)) for expert in recipe.experts.values()]
    weighted = [None if f is None else LowRank(w * f.up, f.down) for w, f in zip(weights, own, strict=True)]
    given: dict[str, Any] = {"factors": weighted, "weights": torch.tensor(weights)}
    if "generator" in method.asks:
        given["generator"] = seeded(recipe.seed, path, 0)
    merged: LowRank = method.function(**{n: given[n] for n in method.asks}, **opened.parameters.of(key))
    squares = [0.0 if f is None else _product(f, f) for f in own]
    products = [0.0 if f is None else _product(f, merged) for f in own]
    shape = [merged.up.shape[0], merged.down.shape[1]]
    line = Line(key, shape, method.name, [*squares, 0.0, _product(merged, merged)], products, 0.0, 0.0)
    budget = recipe.norm_budget
    if budget is not None and (line.reach or 0.0) > budget:
        line.capped = budget / (line.reach or 1.0)
        merged = LowRank(line.capped * merged.up, merged.down)
        line.products = [line.capped * product for product in line.products]
        line.squares[-1] *= line.capped**2
    return merged, line


def _product(a: LowRank, b: LowRank) -> float:
    """<B_a A_a, B_b A_b> by matrices of the ranks' size."""
    return float(((a.up.T @ b.up) * (a.down @ b.down.T)).sum())


@dataclass
class MadeFactors:
    """What a step gives back: tensors under the names that PEFT gives them, their rank, and what was read for them."""

    tensors: dict[str, Tensor]
    line: Line | None
    rank: int
    sha256: dict[str, dict[str, str]]


def make_adapter_step(opened: Opened, step: str) -> MadeFactors:
    """Merge one layer's factors, or take over what is held whole."""
    if opened.inputs is None:
        raise TypeError("these adapters are not open")
    inputs = opened.inputs.reader()
    adapters = [expert for expert in inputs.experts if isinstance(expert, AdapterExpert)]
    made = MadeFactors({}, None, 0, {})
    if any(step in expert.adapted for expert in adapters):
        merged, made.line = merged_factors(opened, adapters, step)
        made.rank = merged.up.shape[1]
        dtype = opened.floating
        parts = {"lora_A": merged.down.to(dtype), "lora_B": merged.up.to(dtype)} if made.rank else {}
        if not all(torch.isfinite(part).all() for part in parts.values()):
            raise CoterieError(
                f"the merge of layer {step!r} overflows or is not a number",
                f"method {opened.method.name}",
                "check its parameters and the experts' weights",
            )
        made.tensors = {f"{PREFIX}{step}.{part}.weight": t.contiguous() for part, t in parts.items()}
    else:
        owner = next(expert for expert in adapters if opened.recipe.head in (None, expert.name))
        value = owner.value(step, None)
        if value is not None:
            path, _, leaf = step.rpartition(".")
            name = f"{path}.base_layer.{leaf}" if any(path in expert.adapted for expert in adapters) else step
            made.tensors = {PREFIX + name: value.to(opened.dtype(value.dtype))}
    made.sha256 = {n: c.sha256 for n, c in inputs.checkpoints.items() if n != "base" and c.sha256}
    return made


def write_config(
    folder: Path, configs: list[dict[str, Any]], base: str | None, ranks: dict[str, int], saved: list[str]
) -> None:
    """adapter_config.json: alpha is the rank everywhere, for all scale is in lora_B.

    Args:
        folder: of the adapter.
        configs: those of the adapters that it was made of.
        base: its base, where they do not agree on one.
        ranks: module path -> rank of the merged factors.
        saved: names of the tensors that are held whole.
    """
    if not ranks:
        raise CoterieError("no adapter changes any layer: the merge would be empty", "experts", "check their weights")
    bases = {config.get("base_model_name_or_path") for config in configs}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {path: r for path, r in sorted(ranks.items()) if r != rank}
    whole = {name.rpartition(".")[0] for name in saved if not name.endswith(".bias")}
    biases = [name for name in saved if name.endswith(".bias") and name.rpartition(".")[0] not in whole]
    config = {
        "peft_type": "LORA",
        "task_type": configs[0].get("task_type"),
        "base_model_name_or_path": bases.pop() if len(bases) == 1 else base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(whole) or None,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",  # PEFT's word for biases that were trained beside the factors
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
