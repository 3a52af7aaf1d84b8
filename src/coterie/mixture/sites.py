"""Which modules become mixture layers, which are kept per expert, and what the rest follows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import CoterieError
from ..recipe import Modules
from .layer import MIXTURE_OF
from .probe import reads_weights_directly


@dataclass
class Sites:
    """Every tensor of a model, sorted by what becomes of it.

    Attributes:
        layers: paths of the linear layers that become mixture layers.
        heads: paths of the modules that are kept per expert where they differ: task heads, and what the base lacks.
        others: tensor name -> policy, for everything else (tied tensors under their owner's name only).
        why_dense: tensor name -> why it is not part of a mixture layer.
    """

    layers: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)
    why_dense: dict[str, str] = field(default_factory=dict)


def choose_sites(
    model: nn.Module,
    missing: set[str],
    modules: Modules,
    others: str | Mapping[str, str],
    called: set[str] | None,
    tied: Mapping[str, str],
    notes: list[str],
    needed: bool = True,
) -> Sites:
    """Sort a model's tensors.

    Args:
        model: the model, or its skeleton on the meta device.
        missing: names of tensors that the base model lacks.
        modules: the recipe's include and exclude globs.
        others: the recipe's policy for everything that is not a mixture layer.
        called: linear layers that a probe forward called; None where there was no probe.
        tied: name of a tied tensor -> name of the tensor that it shares.
        notes: gets a sentence for every glob that matches nothing.
        needed: whether it takes a layer at least.

    Raises:
        CoterieError: the base lacks a tensor that belongs to no module, or no layer is left.
    """
    sites = Sites()
    tied_names = set(tied) | set(tied.values())
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied and name not in unsaved}
    linears = [path for path, module in model.named_modules() if type(module) in MIXTURE_OF]
    for kind, globs, names in (
        ("include", modules.include, linears),
        ("exclude", modules.exclude, linears),
        ("others", [] if isinstance(others, str) else list(others), list(tensors)),
    ):
        unmatched = [g for g in globs if g not in ("*", "*lm_head*") and not any(fnmatchcase(n, g) for n in names)]
        if unmatched:
            notes.append(f"{kind}: no name matches {', '.join(map(repr, unmatched))}")
    sites.heads = _heads(model, missing, tied_names, tensors)
    outside = outside_base(model)
    output = _output_paths(model)
    seen: dict[int, str] = {}
    taken: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module) not in MIXTURE_OF or _inside(path, sites.heads):
            continue
        if id(module) in seen:
            continue
        seen[id(module)] = path
        named = [g for g in modules.include if fnmatchcase(path, g)]
        explicit = any(g != "*" for g in named)
        ancestors = [model.get_submodule(".".join(path.split(".")[:i])) for i in range(path.count(".") + 1)]
        if f"{path}.weight" in tied_names:
            why: str | None = "its weight is tied to another module's"
        elif (path in output or _inside(path, outside)) and not explicit:
            why = "output head (off unless an include glob names it)"
        elif not named:
            why = "no include glob matches"
        elif any(fnmatchcase(path, g) for g in modules.exclude):
            why = "an exclude glob matches"
        elif called is not None and path not in called:
            why = "a probe forward never calls it"
        else:
            why = reads_weights_directly(ancestors)
        if why is None:
            sites.layers.append(path)
            taken |= {f"{path}.weight", f"{path}.bias"}
        else:
            sites.why_dense[f"{path}.weight"] = why
    for name in tensors:
        if name in taken or _inside(name, sites.heads):
            continue
        sites.others[name] = policy_of(name, others)
        sites.why_dense.setdefault(name, _kind(model, name))
    if needed and not sites.layers:
        raise CoterieError(
            "no layer would become a mixture layer", "modules", "check the include and exclude globs of the recipe"
        )
    return sites


def policy_of(name: str, others: str | Mapping[str, str]) -> str:
    """What a tensor follows: the policy of the first glob that matches its name, else the base."""
    if isinstance(others, str):
        return others
    return next((policy for glob, policy in others.items() if fnmatchcase(name, glob)), "base")


def _inside(name: str, paths: list[str] | set[str]) -> bool:
    return any(name == path or name.startswith(path + ".") for path in paths)


def outside_base(model: nn.Module) -> list[str]:
    """Children of a model with a head that are not its base model's: `classifier`, `lm_head`, `qa_outputs`, ..."""
    prefix = getattr(model, "base_model_prefix", "")
    children = [name for name, _ in model.named_children()]
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return [name for name in children if name != prefix]
    # Some classes (CLIPForImageClassification, T5ForQuestionAnswering) hold their base's children beside their head.
    from transformers import AutoModel, PreTrainedModel
    from transformers.initialization import no_init_weights

    if not isinstance(model, PreTrainedModel) or type(model.config) not in AutoModel._model_mapping:
        return []
    base = AutoModel._model_mapping[type(model.config)]
    if isinstance(base, tuple) or type(model) is base:
        return []
    whole = [name for name, child in model.named_children() if type(child) is base]  # Llama 4: under another name
    if whole:
        return [name for name in children if name not in whole]
    from .handle import unguard

    config = copy.deepcopy(model.config)
    unguard(config)
    with torch.device("meta"), no_init_weights():
        own = {name for name, _ in base(config).named_children()}
    return [name for name in children if name not in own]


def _output_paths(model: nn.Module) -> set[str]:
    get: Any = getattr(model, "get_output_embeddings", None)
    output = get() if get else None
    return {path for path, module in model.named_modules() if module is output} if output is not None else set()


def _heads(model: nn.Module, missing: set[str], tied: set[str], tensors: dict[str, torch.Tensor]) -> list[str]:
    output = _output_paths(model)
    heads = [
        path
        for path in outside_base(model)
        if any(_inside(name, [path]) for name in tensors)
        and not any(_inside(o, [path]) for o in output)
        and not any(_inside(name, [path]) for name in tied)
    ]
    for name in sorted(missing):
        if name not in tensors or _inside(name, heads):
            continue
        parts = name.split(".")
        whole = next(
            (
                p
                for i in range(1, len(parts))
                if (p := ".".join(parts[:i])) and {t for t in tensors if _inside(t, [p])} <= missing
            ),
            None,
        )
        if whole is None:
            raise CoterieError(
                f"the base lacks tensor {name!r}", "base", "use the base that the experts were tuned from"
            )
        heads.append(whole)
    return heads


def _kind(model: nn.Module, name: str) -> str:
    """In a word, why a tensor cannot be part of a mixture layer."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "convolution"
    if type(module) in MIXTURE_OF:
        return "bias of a layer that stays dense"
    tensor = dict(module.named_parameters(recurse=False)).get(leaf)
    if tensor is None:
        return "buffer"
    if tensor.ndim == 3:
        return "fused 3-D expert weights"
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__}, a special linear layer"
    return "normalisation or vector" if tensor.ndim < 2 else f"parameter of {type(module).__name__}"
