"""Selections: from scores to gates."""

from __future__ import annotations

import torch
from torch import nn


class TopK(nn.Module):
    """Softmax over the experts, keep the k largest, renormalise over them.

    Renormalising makes this the softmax over the k kept scores; with k = 1 the gate is exactly 1.

    Args:
        k: how many experts answer (all of them where there are fewer).
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """(..., E) float32 gates that sum to 1, zero for the experts not chosen, from (..., E) float32 scores."""
        values, index = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        return torch.zeros_like(scores).scatter(-1, index, values.softmax(-1))

    def extra_repr(self) -> str:
        return f"k={self.k}"
