"""The bank: all experts of one layer, stacked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BankShape:
    """What a layer's bank holds; enough to rebuild it on the meta device.

    Attributes:
        experts: indices (in the mixture's order) of the experts that touch this layer: its candidates.
        ranks: each candidate's rank, or None for a dense bank.
        gate_rank: leading right singular directions that score a candidate (0 where there is one candidate).
        gate: whether the gate has rows of its own (the down-projection has fewer than `gate_rank` rows, or none).
        bias: whether any candidate changes the bias.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...] | None
    gate_rank: int
    gate: bool
    bias: bool

    @classmethod
    def from_dict(cls, shape: dict[str, Any]) -> BankShape:
        ranks = shape["ranks"]
        return cls(
            tuple(shape["experts"]),
            None if ranks is None else tuple(ranks),
            shape["gate_rank"],
            shape["gate"],
            shape["bias"],
        )

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def tensors(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of the bank."""
        n = len(self.experts)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.ranks is None:
            shapes["dense"] = (n, d_out, d_in)
        else:
            shapes["down"] = (sum(self.ranks), d_in)
            shapes["up"] = (sum(self.ranks), d_out)
        if self.gate:
            shapes["gate"] = (n * self.gate_rank, d_in)
        if self.bias:
            shapes["bias"] = (n, d_out)
        return shapes


class Bank(nn.Module):
    """The experts of one layer: `sum_i g_i expert_i(x)`, all at once.

    Parameters (R is the sum of the ranks; each expert's rows are contiguous):
        down: (R, d_in), the down-projections A, orthonormal rows `V_i^T` in SMILE.
        up: (R, d_out), the up-projections B, singular values and the expert's weight folded in.
        dense: (n, d_out, d_in) instead of the two, for rank "dense".
        gate: (n * gate_rank, d_in), only where the score needs rows that `down` lacks.
        bias: (n, d_out), the experts' bias deltas, only where they have any.
    """

    down: nn.Parameter
    up: nn.Parameter
    dense: nn.Parameter
    gate: nn.Parameter
    bias: nn.Parameter

    def __init__(self, shape: BankShape, d_in: int, d_out: int, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.shape = shape
        for name, size in shape.tensors(d_in, d_out).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(down-projections of x or None for a dense bank, the projections that the router scores)."""
        z = None if self.shape.ranks is None else F.linear(x, self.down)
        scored = F.linear(x, self.gate) if self.shape.gate else z
        return z, x[..., :0] if scored is None else scored

    def forward(self, x: torch.Tensor, z: torch.Tensor | None, gates: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the experts' outputs, (..., d_out), from x (..., d_in) and gates (..., n)."""
        gates = gates.to(x.dtype)
        if z is None:
            parts = [gates[..., i : i + 1] * F.linear(x, self.dense[i]) for i in range(len(self.shape.experts))]
            y = torch.stack(parts).sum(0)
        else:
            y = F.linear(self._spread(gates) * z, self.up.T)
        return y + F.linear(gates, self.bias.T) if self.shape.bias else y

    def _spread(self, gates: torch.Tensor) -> torch.Tensor:
        """Gates (..., n), one per expert, as (..., R), one per rank."""
        ranks = self.shape.ranks or ()
        parts = [gates[..., i : i + 1].expand(*gates.shape[:-1], rank) for i, rank in enumerate(ranks)]
        return torch.cat(parts, dim=-1)

    def widths(self) -> list[int]:
        """Rows per candidate of what the router scores."""
        if self.shape.gate or self.shape.ranks is None:
            return [self.shape.gate_rank] * len(self.shape.experts)
        return list(self.shape.ranks)

    def extra_repr(self) -> str:
        return f"experts={list(self.shape.experts)}, ranks={self.shape.ranks or 'dense'}"
