"""An expert's change of one linear layer, in the form in which its source holds it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch


@dataclass
class Dense:
    """A delta as a matrix, (out, in)."""

    matrix: torch.Tensor

    def dense(self) -> torch.Tensor:
        return self.matrix

    def to(self, device: str) -> Dense:
        return Dense(self.matrix.to(device))


@dataclass
class LowRank:
    """A delta as factors: `up @ down` with up (out, r), down (r, in), any scale folded into `up`."""

    up: torch.Tensor
    down: torch.Tensor

    def dense(self) -> torch.Tensor:
        return (self.up @ self.down).float()

    def to(self, device: str) -> LowRank:
        return LowRank(self.up.to(device), self.down.to(device))


Delta = Dense | LowRank


@dataclass
class Fitted:
    """What a fit makes of one expert's delta, by itself: its part of a layer's bank, the expert's weight folded in.

    Attributes:
        down: (k, in) and up: (k, out); or dense: (out, in).
        gate: (g, in), leading right singular directions that are known beside `down`.
        rank: the delta's numerical rank, as far as it matters; None where no more is known than `down` tells.
        residual, excess, norm: of the fit, and of the delta itself; as of `LayerReport`, but |delta|, not its ratio.
        bias: (out,), None where it is unchanged.
    """

    gate: torch.Tensor
    rank: int | None
    residual: float
    excess: float
    norm: float
    down: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    up: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    dense: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def to(self, device: str) -> Fitted:
        moved = {name: getattr(self, name).to(device) for name in ("gate", "down", "up")}
        return replace(self, **moved, dense=None if self.dense is None else self.dense.to(device))
