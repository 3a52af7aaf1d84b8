"""An expert's change of one linear layer, in the form in which its source holds it."""

from __future__ import annotations

from dataclasses import dataclass

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
