"""Recording the gates of a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .layer import is_mixture


class RoutingTrace(dict[str, torch.Tensor]):
    """Layer name -> gates (batch, tokens, E) of the last call, experts in the order of `model.coterie.expert_names`.

    A layer that sees one vector per example (a pooler) has one token.
    """

    batches: list[int]

    def shaped(self, gates: torch.Tensor) -> torch.Tensor:
        """Gates as (batch, tokens, E): a layer may see its tokens flat, or in windows of an example."""
        rows = gates.numel() // gates.shape[-1]
        batch = gates.shape[0] if gates.ndim > 2 else rows
        if batch not in self.batches:
            batch = next((b for b in self.batches if b and rows % b == 0), 1)
        return gates.reshape(batch, -1, gates.shape[-1])


@contextmanager
def routing_trace(model: Any) -> Iterator[RoutingTrace]:
    """Record every mixture layer's gates: `with coterie.routing_trace(model) as trace: model(**batch)`.

    Args:
        model: a mixture.

    Yields:
        A mapping that each call fills anew; read it inside or after the block.
    """
    trace = RoutingTrace()
    total = len(model.coterie.expert_names)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.clear()
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim]
        trace.batches = [tensor.shape[0] for tensor in tensors] or [1]

    names = {layer: name for name, layer in model.named_modules() if is_mixture(layer)}

    def record(layer: Any, gates: torch.Tensor) -> None:
        if layer not in names:  # a copy's, which shares its recorders
            return
        whole = gates.new_zeros(*gates.shape[:-1], total)
        whole[..., list(layer.bank.shape.experts)] = gates.detach()
        trace[names[layer]] = trace.shaped(whole)

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    recorders = model.coterie.recorders
    recorders.append(record)
    try:
        yield trace
    finally:
        hook.remove()
        recorders.remove(record)
