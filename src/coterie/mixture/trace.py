"""Recording the gates of a call."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .layer import is_mixture


class RoutingTrace(dict[str, torch.Tensor]):
    """Layer name -> gates (batch, tokens, E) of the last call, experts in the order of `model.coterie.expert_names`.

    A layer that sees one vector per example (a pooler) has one token.

    Attributes:
        scores: where asked for, layer name -> what the router's score gave (batch, tokens, E), before any selection,
            -inf for experts that are no candidates; layers whose experts are chosen from outside have none.
    """

    batches: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[str, torch.Tensor] = {}

    def shaped(self, gates: torch.Tensor) -> torch.Tensor:
        """Gates as (batch, tokens, E): a layer may see its tokens flat, or in windows of an example."""
        rows = gates.numel() // gates.shape[-1]
        batch = gates.shape[0] if gates.ndim > 2 else rows
        if batch not in self.batches:
            batch = next((b for b in self.batches if b and rows % b == 0), 1)
        return gates.reshape(batch, -1, gates.shape[-1])


@contextmanager
def routing_trace(model: Any, scores: bool = False) -> Iterator[RoutingTrace]:
    """Record every mixture layer's gates: `with coterie.routing_trace(model) as trace: model(**batch)`.

    Args:
        model: a mixture.
        scores: record `trace.scores` as well; calls then take the path "stacked".

    Yields:
        A mapping that each call fills anew; read it inside or after the block.
    """
    trace = RoutingTrace()
    total = len(model.coterie.expert_names)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.clear()
        trace.scores.clear()
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim]
        trace.batches = [tensor.shape[0] for tensor in tensors] or [1]

    names = {layer: name for name, layer in model.named_modules() if is_mixture(layer)}
    pending: dict[nn.Module, torch.Tensor] = {}  # scores of layers that have not yet given their gates

    def record(layer: Any, gates: torch.Tensor) -> None:
        if layer not in names:  # a copy's, which shares its recorders
            return
        candidates, name = list(layer.bank.shape.experts), names[layer]
        whole = gates.new_zeros(*gates.shape[:-1], total)
        whole[..., candidates] = gates.detach()
        trace[name] = trace.shaped(whole)
        # scores that decide for other rows than tokens (segments, slots) have no place here
        if (found := pending.pop(layer, None)) is not None and found.numel() * total == trace[name].numel() * len(
            candidates
        ):
            whole = found.new_full(trace[name].shape, -torch.inf)
            whole[..., candidates] = found.detach().view(*whole.shape[:-1], -1)
            trace.scores[name] = whole

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True)]
    for layer in names if scores else ():
        keep = functools.partial(_keep, pending, layer)
        hooks.append(layer.router.score.register_forward_hook(keep))
    recorders = model.coterie.recorders
    recorders.append(record)
    try:
        # On this path, and not on all, every layer asks its own router for scores.
        with model.coterie.use_path("stacked") if scores else nullcontext():
            yield trace
    finally:
        for hook in hooks:
            hook.remove()
        recorders.remove(record)


def _keep(scores: dict[nn.Module, torch.Tensor], layer: nn.Module, _score: Any, _z: Any, given: torch.Tensor) -> None:
    scores[layer] = given
