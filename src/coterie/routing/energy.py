"""SMILE's score: how much of an input's energy lies in an expert's leading row space."""

from __future__ import annotations

import torch
from torch import nn

from .select import top_k


class SubspaceEnergy(nn.Module):
    """Gates from `r_i = || V_i[:, :g]^T x ||_2`, then softmax, top-k, renormalise (arXiv:2408.10174, section 4).

    It holds no parameters: the projections come from the bank, the norms are taken in float32.

    Args:
        widths: rows of the projection that belong to each expert.
        gate_rank: how many leading rows of each expert count, the same for all experts of the layer.
        k: how many experts answer.
    """

    def __init__(self, widths: list[int], gate_rank: int, k: int):
        super().__init__()
        self.widths, self.gate_rank, self.k = widths, gate_rank, k

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Gates (..., E) in float32 from stacked projections z (..., sum of widths)."""
        if len(self.widths) == 1:
            return torch.ones(*z.shape[:-1], 1, dtype=torch.float32, device=z.device)
        if len(set(self.widths)) == 1:
            rows = z.unflatten(-1, (len(self.widths), self.widths[0]))[..., : self.gate_rank]
        else:
            rows = torch.stack([part[..., : self.gate_rank] for part in z.split(self.widths, dim=-1)], dim=-2)
        return top_k(torch.linalg.vector_norm(rows.float(), dim=-1), self.k)

    def extra_repr(self) -> str:
        return f"experts={len(self.widths)}, gate_rank={self.gate_rank}, top_k={self.k}"
