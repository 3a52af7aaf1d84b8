"""A mixture from live modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import CoterieError
from ..methods.registry import get
from ..mixture.handle import attach
from ..mixture.layer import is_mixture
from ..mixture.probe import called_linears
from ..mixture.sites import choose_sites, policy_of
from ..mixture.spec import MixtureSpec, insert
from ..recipe import Modules
from ..sources.checkpoint import require_finite
from ..sources.experts import ExpertSource, FullExpert
from ..sources.names import ModuleView
from .inputs import LABELS
from .others import follow, gather_head
from .report import BuildReport
from .stream import fit_layer


def build_in_memory(
    method: str,
    base: nn.Module,
    experts: dict[str, nn.Module],
    *,
    others: str | dict[str, str] = "base",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    weights: dict[str, float] | None = None,
    **parameters: Any,
) -> Any:
    """A mixture from live modules; the base and the experts stay as they are.

    Args as in `coterie.smile`. The account of the build is `model.coterie.report`.
    """
    if not experts:
        raise CoterieError("the list of experts is empty", method, "give at least one")
    registered = get(method)
    checked = registered.parameters(parameters, len(experts))
    mixture = registered.assemble(**checked)
    policies = [others] if isinstance(others, str) else list(others.values())
    if any(p not in ("base", "average") for p in policies):
        raise CoterieError(f"others is {others!r}", method, 'in memory it must be "base" or "average"')
    for name, module in {"base": base, **experts}.items():
        if any(is_mixture(part) for part in module.modules()):
            raise CoterieError("is a mixture already", name, "use dense models")
    view = ModuleView(base)
    sources: list[ExpertSource] = []
    for name, module in experts.items():
        config = getattr(module, "config", None)
        own = {key: getattr(config, key, None) for key in LABELS} if hasattr(config, "id2label") else {}
        sources.append(FullExpert(name, ModuleView(module), (weights or {}).get(name, 1.0), own))
        for key, tensor in module.state_dict().items():
            if key not in view:
                raise CoterieError(
                    f"tensor {key!r} has no place in the base", f"expert {name!r}", "use copies of the base"
                )
            require_finite(tensor, key, f"expert {name!r}")
    modules = Modules(include=include or ["*"], exclude=exclude or [])
    sites = choose_sites(base, set(), modules, others, _called(base))
    report = BuildReport(registered.name, checked, list(experts), type(base).__name__)
    spec = MixtureSpec(registered.name, checked, list(experts))
    banks: dict[str, dict[str, torch.Tensor]] = {}
    changed: dict[str, torch.Tensor] = {}
    for path in sites.layers:
        fitted = fit_layer(mixture, path, base.get_submodule(path), view, sources, "cpu")
        if fitted is None:
            report.dense_layers.append(path)
            if f"{path}.bias" in view:
                sites.others[f"{path}.bias"] = policy_of(f"{path}.bias", others)
                sites.why_dense[f"{path}.bias"] = "bias of a layer that stays dense"
            continue
        spec.layers[path], banks[path] = fitted.shape, fitted.tensors
        report.layers.append(fitted.report)
    for name, policy in sites.others.items():
        changed[name], report.others[name] = follow(name, view.get(name), sources, policy, sites.why_dense[name])
    labels = [source.labels for source in sources]
    for path in sites.heads:
        prefix = f"{path}."
        wanted = {n.removeprefix(prefix): t for n, t in base.state_dict().items() if n.startswith(prefix)}
        head = gather_head(path, wanted, view, sources, labels)
        if head.shape is not None:
            spec.heads[path] = head.shape
            report.heads[path] = [spec.experts[i] for i in head.owners]
        changed |= head.named()
    spec.labels = labels if sites.heads and all(labels) else []
    model = copy.deepcopy(base).eval()
    insert(model, spec, banks)
    state = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, value in changed.items():
            state[name].copy_(value)
    report.base_parameters = sum(p.numel() for p in base.parameters())
    report.mixture_parameters = sum(p.numel() for p in model.parameters())
    report.conclude()
    attach(model, spec).report = report
    return model


def _called(base: nn.Module) -> set[str] | None:
    """What a probe forward calls, for a transformers model; None for any other module."""
    from transformers import PreTrainedModel

    from ..sources.names import Skeleton

    if not isinstance(base, PreTrainedModel):
        return None
    called, broke = called_linears(Skeleton(type(base), base.config).model)
    return None if broke else called
