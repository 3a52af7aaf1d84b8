"""A build before its first tensor is read: sources open, parameters checked, every tensor sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..errors import CoterieError
from ..methods.registry import Method, Mixture, get
from ..mixture.kinds import check_routing
from ..mixture.probe import Probe, probe
from ..mixture.sites import Sites, choose_sites
from ..recipe import Recipe
from .inputs import Inputs, open_inputs
from .kept import Kept
from .statistics import RouterStatistics, find


@dataclass
class Prepared:
    """A build before its first tensor is read.

    Attributes:
        siblings: groups of layers that read the same input.
        statistics: what the routers hold of the experts' data, where the method needs that.
    """

    inputs: Inputs
    method: Method
    parameters: dict[str, Any]
    mixture: Mixture
    sites: Sites
    siblings: list[list[str]]
    statistics: RouterStatistics | None = None


def prepare(recipe: Recipe, token: str | None = None, kept: Kept | None = None) -> Prepared:
    """Open every source, check every parameter and sort every tensor, from headers alone.

    Args:
        recipe: of the build.
        token: Hub token.
        kept: experts that an earlier build made, and that are not made again.
    """
    method = get(recipe.method)
    method.parameters(recipe.parameters, len(recipe.experts))  # before anything is fetched
    if method.trained:
        raise CoterieError(
            f"{recipe.method} is trained, and a build trains nothing", "method", "use coterie.wrap or `coterie train`"
        )
    inputs = open_inputs(recipe, token, kept=kept)
    skeleton = inputs.skeleton
    missing = {name for name in skeleton.tensors if name not in inputs.base and name not in skeleton.tied}
    seen = probe(skeleton.model)
    if seen.broke:
        inputs.warnings.append(f"the probe forward broke off ({seen.broke}): every linear layer is taken to be called")
    return sort(inputs, missing, seen)


def sort(inputs: Inputs, missing: set[str], seen: Probe | None) -> Prepared:
    """Check the method's parameters, and sort every tensor of opened sources.

    Args:
        inputs: the sources.
        missing: tensors that the base lacks.
        seen: what a probe forward saw; None where there was none.
    """
    recipe, model = inputs.recipe, inputs.skeleton.model
    method = get(recipe.method)
    parameters = method.parameters(recipe.parameters, len(recipe.experts))
    sites = choose_sites(
        model,
        missing,
        recipe.modules,
        recipe.others,
        None if seen is None else seen.called,
        inputs.skeleton.tied,
        inputs.warnings,
    )
    per_expert = {name for name, policy in sites.others.items() if policy == "per_expert"}
    for path in sorted({name.rpartition(".")[0] for name in per_expert}):
        _require_module(inputs, path, per_expert)
        sites.heads.append(path)
    sites.others = {name: p for name, p in sites.others.items() if name not in per_expert}
    siblings = seen.siblings() if seen else []
    mixture, found = method.assemble(**parameters), None
    check_routing(model, mixture.routing)
    if mixture.statistics is not None:
        found = find(mixture.statistics, inputs, sites.layers)
    own: dict[str, Any] = {} if found is None else found.options
    if mixture.routing.pool == "model":
        _require_votes(inputs, sites.layers)
    if mixture.routing.score == "signal":
        glob = mixture.routing.score_options["layer"]
        if not any(fnmatchcase(path, glob) for path in sites.layers):
            raise CoterieError(f"no mixture layer matches {glob!r}", "layer", f"there is {sites.layers[-1]!r}, say")
        own = {"weights": [expert.weight for expert in inputs.experts]}
    routing = replace(mixture.routing, score_options={**mixture.routing.score_options, **own})
    return Prepared(inputs, method, parameters, replace(mixture, routing=routing), sites, siblings, found)


def _require_votes(inputs: Inputs, layers: Sequence[str]) -> None:
    """Layers that have the most experts vote: refuse an expert that is in none of them, which would never answer."""
    held = {path: {expert.name for expert in inputs.experts if expert.rank_bound(path) != 0} for path in layers}
    most = max(map(len, held.values()), default=0)
    voted = set[str]().union(*(names for names in held.values() if len(names) == most))
    if missing := [expert.name for expert in inputs.experts if expert.name not in voted]:
        raise CoterieError(
            f"is in none of the layers that vote, those with {most} experts, and would never answer",
            f"expert {missing[0]!r}",
            "combine adapters of the same layers, or set pool to token, sequence or prompt",
        )


def _require_module(inputs: Inputs, path: str, names: set[str]) -> None:
    """`per_expert` keeps whole modules: refuse bare parameters, tied tensors, and parts of modules."""
    tied = {*inputs.skeleton.tied, *inputs.skeleton.tied.values()}
    module = inputs.skeleton.module(path)
    inside = {f"{path}.{leaf}" for leaf in module.state_dict()} if path else set()
    if not path or not inside <= names or inside & tied or any(True for _ in module.children()):
        name = sorted(n for n in names if n.rpartition(".")[0] == path)[0]
        raise CoterieError(
            f"{name!r} cannot be kept per expert: it is a bare parameter, tied, or only a part of its module",
            "others",
            'use "base" or "average" for it, by a glob: `others: {"GLOB": base, "*": per_expert}`',
        )
