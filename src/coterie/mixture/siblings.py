"""Layers that read the same input (q, k, v; gate and up) share one scoring product."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.nn import functional as F

from ..experts.derived import Derived
from ..routing.decision import Decision


class Siblings:
    """A group of mixture layers that are given the same tensor, with as many candidates and the same gate rank each.

    The first that is called scores for all, with the group's packed rows; each still decides by its own scores. The
    files stay per layer: the packed rows are derived, for inference.

    Args:
        layers: mixture layers, in the order in which they are called.
    """

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self._rows = Derived()
        self._last: tuple[weakref.ref[torch.Tensor], int, list[Decision]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    @staticmethod
    def fit(layers: list[Any]) -> bool:
        """Whether layers can be a group."""
        kinds = {(layer.bank.experts, layer.bank.shape.gate_rank) for layer in layers}
        return len(layers) > 1 and len(kinds) == 1 and layers[0].bank.experts > 1

    def decide(self, layer: Any, x: torch.Tensor, flat: torch.Tensor) -> Decision:
        """One layer's decision.

        Args:
            layer: the layer.
            x: its input, the very tensor that its siblings are given, too.
            flat: the same as (tokens, d_in), in the bank's dtype.
        """
        version = 0 if x.is_inference() else x._version
        last = self._last
        if last is None or last[0]() is not x or last[1] != version:
            last = self._last = (weakref.ref(x), version, self._decisions(flat))
        at = self.layers.index(layer)
        if at == len(self.layers) - 1:
            self._last = None
        return last[2][at]

    def drop(self) -> None:
        """Forget the packed rows."""
        self._rows.drop()
        self._last = None

    def _decisions(self, flat: torch.Tensor) -> list[Decision]:
        banks = [layer.bank for layer in self.layers]
        read = tuple(bank.gate if bank.shape.gate else bank.down for bank in banks)
        rows = self._rows.get(read, lambda: torch.cat([bank.score_rows() for bank in banks]))
        z = F.linear(flat, rows).view(len(flat), len(banks), banks[0].experts, -1)
        both = self.layers[0].router(z)
        return [
            Decision(both.experts, both.index[:, i], None if both.weight is None else both.weight[:, i])
            for i in range(len(banks))
        ]
