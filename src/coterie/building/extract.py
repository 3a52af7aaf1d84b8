"""One expert of a mixture, as an ordinary dense checkpoint again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CoterieError
from ..mixture.handle import unguard
from ..mixture.heads import PerExpert
from ..mixture.layer import MIXTURE_OF, MixtureConv1D, is_mixture
from ..sources.locate import locate
from .directory import whole_directory
from .finish import copy_inputs
from .lora import BOTTLENECK, write_adapter


def extract_expert(
    source: str | Path,
    name: str | None,
    out: str | Path,
    force: bool = False,
    adapter: bool = False,
    base: str | None = None,
    **kwargs: Any,
) -> None:
    """Write one expert as a dense model: base + its (truncated, weighted) delta, its bias and its head.

    What followed `others` in the build is as in the mixture; `rank: full` gives the expert's linears back to rounding.

    Args:
        source: a mixture directory or Hub id.
        name: the expert; None, with `adapter`: the experts' factors mixed as the mixture mixes them for every input
            (LoraHub).
        out: the directory to make.
        force: replace an existing directory.
        adapter: write a PEFT LoRA adapter of the base instead: its factors as they are, `lora_alpha` their scale, and
            as `modules_to_save` whatever else differs from the base (a trained head).
        base: directory or Hub id (`id@revision`) of the base model, where the mixture does not name it or it has moved.
        **kwargs: as `coterie.load` takes them.

    Raises:
        CoterieError: no such expert, `out` exists, or the expert is nothing that an adapter can hold.
    """
    from ..mixture.load import load, read_spec

    spec = read_spec(locate(str(source), kwargs.get("token")))
    names = spec["experts"]
    fixed = spec["routing"]["score"] == "fixed" and adapter
    if name not in names and not (name is None and fixed):
        raise CoterieError(f"no expert {name!r}", str(source), f"known: {', '.join(names)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that heads are to be selected: one is, below
        model = load(str(source), **kwargs, **({"base": base} if spec.get("base") else {}))
    handle = model.coterie
    if adapter:
        index = None if name is None else names.index(name)
        write_adapter(model, index, base, Path(out), force, kwargs.get("token"))
        return
    assert name is not None
    index = names.index(name)
    bent = [n for n, m in model.named_modules() if is_mixture(m) and not m.bank.linear]
    if bent:
        raise CoterieError(f"expert {name!r} is {BOTTLENECK} (at {bent[0]!r})", str(source), "keep the mixture")
    bare = [n for n, m in model.named_modules() if is_mixture(m) and m.bias is None and m.bank.shape.bias]
    if bare:
        raise CoterieError(
            f"{bare[0]!r} has no bias in the base, and the experts add one", str(source), "keep the mixture"
        )
    handle.use_head(name)
    with torch.no_grad():
        for parent in list(model.modules()):
            for leaf, child in list(parent._modules.items()):
                if child is not None and is_mixture(child):
                    parent._modules[leaf] = _dense(child, index)
                elif isinstance(child, PerExpert):
                    parent._modules[leaf] = child.answering
    unguard(model.config)
    with whole_directory(Path(out), force, sources=[Path(model.name_or_path)]) as folder:
        model.save_pretrained(folder)
        copy_inputs(Path(model.name_or_path), folder)
        record = {"mixture": str(source), "expert": name, "method": handle.spec.method}
        (folder / "extracted.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


def _dense(layer: Any, expert: int) -> nn.Module:
    """The layer that the expert alone would have, of the type that the mixture layer replaced."""
    kind = next(dense for dense, mixture in MIXTURE_OF.items() if mixture is type(layer))
    dense: Any = kind.__new__(kind)
    dense.__dict__.update(layer.__dict__)
    dense.__dict__["_parameters"] = {"weight": layer.base_weight, "bias": layer.bias}
    dense.__dict__["_modules"] = {}
    for derived in ("context", "siblings", "_merged"):
        del dense.__dict__[derived]
    shape = layer.bank.shape
    if expert not in shape.experts:
        return dense
    with torch.no_grad():
        weight, bias = layer.merge(tuple(float(i == expert) for i in shape.experts))
    dense.weight = nn.Parameter(weight.T.contiguous() if isinstance(layer, MixtureConv1D) else weight)
    dense.bias = None if bias is None else nn.Parameter(bias)
    return dense
