"""SMILE's score: how much of an input's energy lies in an expert's leading row space."""

from __future__ import annotations

import torch
from torch import nn


class SubspaceEnergy(nn.Module):
    """`r_i = || V_i[:, :g]^T x ||_2` (arXiv:2408.10174, section 4).

    It holds no parameters: the projections come from the bank, the norms are taken in float32.

    Args:
        widths: rows of the projection that belong to each expert.
        gate_rank: g, how many leading rows of each expert count, the same for all experts of the layer.
    """

    def __init__(self, widths: list[int], gate_rank: int):
        super().__init__()
        self.widths, self.gate_rank = widths, gate_rank

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Scores (..., E) in float32 from stacked projections z (..., sum of widths)."""
        if len(set(self.widths)) == 1:
            rows = z.unflatten(-1, (len(self.widths), self.widths[0]))[..., : self.gate_rank]
        else:
            rows = torch.stack([part[..., : self.gate_rank] for part in z.split(self.widths, dim=-1)], dim=-2)
        return torch.linalg.vector_norm(rows.float(), dim=-1)

    def extra_repr(self) -> str:
        return f"experts={len(self.widths)}, gate_rank={self.gate_rank}"
