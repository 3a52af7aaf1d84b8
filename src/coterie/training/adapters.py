"""Experts that start from PEFT adapters."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CoterieError
from ..recipe import Modules
from ..sources.adapter import AdapterExpert
from ..sources.locate import locate
from ..sources.names import Skeleton

if TYPE_CHECKING:
    from ..experts.bank import Bank
    from .wrap import MixtureConfig


def read_adapters(model: Any, sources: dict[str, str]) -> list[AdapterExpert]:
    """The adapters of a model, in the experts' order.

    Raises:
        CoterieError: one is no plain LoRA adapter of this model.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CoterieError("is no transformers model, as adapters need one", "coterie.wrap", "name experts only")
    skeleton = Skeleton(type(model), model.config)
    adapters = []
    for name, source in sources.items():
        location = locate(source)
        if not location.is_adapter:
            raise CoterieError(
                "is no PEFT adapter, and an expert that is trained starts from one",
                f"expert {name!r} ({source})",
                "make one of a full fine-tune with `coterie extract`, or build a mixture first (method: smile)",
            )
        adapter = AdapterExpert(name, location, skeleton)
        if adapter.saved:
            warnings.warn(
                f"expert {name!r}: {', '.join(sorted(adapter.saved))} of the adapter are left out, for all experts "
                "share the model's own",
                stacklevel=5,
            )
        adapters.append(adapter)
    return adapters


def suited(config: MixtureConfig, adapters: list[AdapterExpert]) -> MixtureConfig:
    """The configuration, its rank and layers by default those of the adapters.

    Raises:
        CoterieError: a rank is below an adapter's, or experts are to be no low-rank pairs.
    """
    if not adapters:
        return config
    ranks = {adapter.name: max(_rank(adapter, path) for path in adapter.adapted) for adapter in adapters}
    rank = config.parameters.get("rank", max(ranks.values()))
    low = next((name for name, own in ranks.items() if isinstance(rank, int) and own > rank), None)
    if low is not None:
        raise CoterieError(f"rank is {rank} and expert {low!r} has rank {ranks[low]}", "parameters", "raise it")
    if config.parameters.get("expert", "lora") != "lora":
        raise CoterieError("adapters are low-rank pairs", "parameters: expert", 'leave it at "lora"')
    modules = config.modules
    if modules.include == ["*"]:
        paths = dict.fromkeys(path for adapter in adapters for path in adapter.adapted)
        modules = Modules(include=list(paths), exclude=modules.exclude)
    return config.model_copy(update={"parameters": {**config.parameters, "rank": rank}, "modules": modules})


def start(bank: Bank, expert: int, adapter: AdapterExpert, path: str) -> None:
    """Put an adapter's factors into a fresh bank, in place; rows beyond its rank stay as they are, and silent.

    Args:
        bank: of the layer at `path`, fresh: up-projections are zero.
        expert: its position.
        adapter: it.
        path: of the layer.
    """
    factors = adapter.factors(path)
    if factors is None:
        return
    rows, rank = bank.rows(expert), len(factors.down)
    with torch.no_grad():
        bank.down[rows][:rank] = factors.down.to(bank.down)
        bank.up[rows][:rank] = (factors.up.T / bank.shape.scale).to(bank.up)


def _rank(adapter: AdapterExpert, path: str) -> int:
    _, down, _ = adapter.pair(path)
    return int(adapter.checkpoint.tensors[down].shape[0])
