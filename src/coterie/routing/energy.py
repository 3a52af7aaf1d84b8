"""SMILE's score: how much of an input's energy lies in an expert's leading row space."""

from __future__ import annotations

import torch
from torch import nn


class SubspaceEnergy(nn.Module):
    """`r_i = || V_i[:, :g]^T x ||_2` (arXiv:2408.10174, section 4).

    It holds no parameters: the projections come from the bank. Norms are taken in float32.
    """

    reads = "rows"

    def __init__(self, width: int = 0, experts: int = 0):
        super().__init__()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Scores (..., E) in float32 at least, from each expert's leading g projections z (..., E, g)."""
        return torch.linalg.vector_norm(z, dim=-1, dtype=torch.promote_types(z.dtype, torch.float32))
