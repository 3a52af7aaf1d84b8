"""A build before its first tensor is read: sources open, parameters checked, every tensor sorted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import CoterieError
from ..methods.registry import Method, Mixture, get
from ..mixture.probe import called_linears
from ..mixture.sites import Sites, choose_sites
from ..recipe import Recipe
from .inputs import Inputs, open_inputs


@dataclass
class Prepared:
    """A build before its first tensor is read."""

    inputs: Inputs
    method: Method
    parameters: dict[str, Any]
    mixture: Mixture
    sites: Sites
    warnings: list[str]


def prepare(recipe: Recipe, token: str | None = None) -> Prepared:
    """Open every source, check every parameter and sort every tensor, from headers alone."""
    method = get(recipe.method)
    parameters = method.parameters(recipe.parameters, len(recipe.experts))
    inputs = open_inputs(recipe, token)
    skeleton = inputs.skeleton
    missing = {name for name in skeleton.tensors if name not in inputs.base and name not in skeleton.tied}
    called, broke = called_linears(skeleton.model)
    notes = list(inputs.warnings)
    if broke:
        notes.append(f"the probe forward broke off ({broke}): every linear layer is taken to be called")
    sites = choose_sites(skeleton.model, missing, recipe.modules, recipe.others, None if broke else called)
    per_expert = {name for name, policy in sites.others.items() if policy == "per_expert"}
    for path in sorted({name.rpartition(".")[0] for name in per_expert}):
        _require_module(skeleton.model, path, per_expert, sites)
        sites.heads.append(path)
    sites.others = {name: p for name, p in sites.others.items() if name not in per_expert}
    return Prepared(inputs, method, parameters, method.assemble(**parameters), sites, notes)


def _require_module(model: nn.Module, path: str, names: set[str], sites: Sites) -> None:
    """`per_expert` keeps whole modules: refuse bare parameters, tied tensors, and parts of modules."""
    tied = set(getattr(model, "all_tied_weights_keys", {}).items())
    module = model.get_submodule(path)
    inside = {f"{path}.{leaf}" for leaf in module.state_dict()} if path else set()
    partial = not path or not inside <= names or any(name in pair for name in inside for pair in tied)
    if partial or any(True for _ in module.children()):
        name = sorted(n for n in names if n.rpartition(".")[0] == path)[0]
        raise CoterieError(
            f"{name!r} cannot be kept per expert: it is a bare parameter, tied, or only a part of its module",
            "others",
            'use "base" or "average" for it, by a glob: `others: {"GLOB": base, "*": per_expert}`',
        )
