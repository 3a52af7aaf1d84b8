"""A mixture from live modules, through the same stream as a build from disk."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import CoterieError
from ..mixture.handle import attach
from ..mixture.layer import is_mixture
from ..mixture.probe import Probe, probe
from ..mixture.spec import insert
from ..recipe import read_recipe
from ..sources.checkpoint import require_finite
from ..sources.experts import ExpertSource, FullExpert
from ..sources.names import LiveSkeleton, ModuleView, Skeleton
from .inputs import LABELS, Inputs
from .prepare import sort
from .report import BuildReport
from .steps import Options, make
from .stream import Stream


class _Dict(dict[str, torch.Tensor]):
    """A sink in memory."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self[name] = tensor

    def note(self, step: Any) -> None:
        pass


def build_in_memory(
    method: str,
    base: nn.Module,
    experts: dict[str, nn.Module],
    *,
    others: Any = "base",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    weights: dict[str, float] | None = None,
    statistics: dict[str, str] | None = None,
    **parameters: Any,
) -> Any:
    """A mixture from live modules; the base and the experts stay as they are.

    Args as in `coterie.smile`; statistics: name -> file, for methods whose routers need them.

    The account of the build is `model.coterie.report`.
    """
    if not isinstance(experts, dict):
        raise CoterieError("the experts are no mapping of names to modules", method, 'give {"name": module, ...}')
    strange = [name for name in weights or {} if name not in experts]
    if strange:
        raise CoterieError(f"weights name {strange[0]!r}, which is no expert", method, f"known: {', '.join(experts)}")
    named = {
        name: {
            "source": "module",
            "weight": float((weights or {}).get(name, 1.0)),
            "statistics": (statistics or {}).get(name),
        }
        for name in experts
    }
    recipe = read_recipe(
        {
            "method": method,
            "base": "module",
            "experts": named,
            "parameters": parameters,
            "others": others,
            "modules": {"include": ["*"] if include is None else include, "exclude": exclude or []},
        }
    )
    for name, module in {"base": base, **experts}.items():
        if hasattr(module, "merge_and_unload"):
            raise CoterieError(
                "is a PEFT model", name, "give module.merge_and_unload(), or its directory to coterie.build"
            )
        if not isinstance(module, nn.Module):
            raise CoterieError(f"is a {type(module).__name__}, not a module", name, "give live modules")
        if any(is_mixture(part) for part in module.modules()):
            raise CoterieError("is a mixture already", name, "use dense models")
        for key, tensor in module.state_dict().items():
            require_finite(tensor, key, name)
    inputs = _inputs(recipe, base, experts)
    ready = sort(inputs, set(), _probe(base))
    report = BuildReport(method, ready.parameters, recipe.names, type(base).__name__, warnings=inputs.warnings)
    report.left_out = inputs.left_out
    tensors = _Dict()
    stream = Stream(ready, tensors, report, lambda steps: (make(ready, Options(), step) for step in steps))
    stream.run(lambda: None)
    model: Any = copy.deepcopy(base).eval()
    if inputs.config is not None:
        model.config.id2label, model.config.label2id = inputs.config.id2label, inputs.config.label2id
        model.config.problem_type = inputs.config.problem_type
    insert(model, stream.spec)
    with torch.no_grad():
        state = model.state_dict(keep_vars=True)
        for name, value in tensors.items():
            state[name].copy_(value)
    report.base_parameters = sum(p.numel() for p in base.parameters())
    report.mixture_parameters = sum(p.numel() for p in model.parameters())
    report.conclude()
    attach(model, stream.spec).report = report
    return model


def _inputs(recipe: Any, base: nn.Module, experts: dict[str, nn.Module]) -> Inputs:
    config = copy.deepcopy(getattr(base, "config", None))
    labelled = hasattr(config, "id2label")
    skeleton = LiveSkeleton(base)
    sources: list[ExpertSource] = []
    for name, module in experts.items():
        theirs = getattr(module, "config", None)
        labels = {key: getattr(theirs, key, None) for key in LABELS} if labelled else {}
        sources.append(FullExpert(name, ModuleView(module), recipe.experts[name].weight, labels))
        for key in module.state_dict():
            if key not in skeleton.tensors:
                raise CoterieError(
                    f"tensor {key!r} has no place in the base", f"expert {name!r}", "use copies of the base"
                )
    own = {key: getattr(config, key, None) for key in LABELS} if labelled else {}
    return Inputs(recipe, config if labelled else None, own, skeleton, ModuleView(base), sources, {}, [])


def _probe(base: nn.Module) -> Probe | None:
    """What a probe forward sees, for a transformers model; None for any other module."""
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel):
        return None
    return probe(Skeleton(type(base), base.config).model)
