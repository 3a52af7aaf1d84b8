"""Tensors that are computed from parameters and kept while these stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn


class Derived:
    """One tensor (or a tuple of them) made from parameters, for inference.

    It is made anew when torch counts a change in place, or when a parameter was replaced or moved. Changes that torch
    does not count (through `.data`, or by a fused optimiser) need `drop`. Where gradients would flow, and under
    tracing, it is made at each call and not kept. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, parameters: tuple[torch.Tensor, ...], make: Callable[[], Any], of: Hashable = None) -> Any:
        """The value, made if need be.

        Args:
            parameters: what it is made from.
            make: makes it.
            of: what else it depends on.
        """
        if torch.compiler.is_compiling() or flows(parameters):
            return make()
        key = (of, *((p.data_ptr(), p.dtype, None if p.is_inference() else p._version) for p in parameters))
        if key != self._key:
            device = parameters[0].device.type
            # usable, and precise, outside of inference mode and of autocast too
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self._value, self._key = make(), key
        return self._value

    def drop(self) -> None:
        """Forget it."""
        self._key = self._value = None

    def __reduce__(self) -> Any:
        return Derived, ()


def flows(to: nn.Module | tuple[torch.Tensor, ...]) -> bool:
    """Whether gradients would reach one of a module's parameters, or one of these."""
    if not torch.is_grad_enabled():
        return False
    return any(p.requires_grad for p in (to.parameters() if isinstance(to, nn.Module) else to))
