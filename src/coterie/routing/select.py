"""Selections: from scores to a decision."""

from __future__ import annotations

import torch
from torch import nn

from .decision import Decision


class TopK(nn.Module):
    """Softmax over the experts, keep the k largest, renormalise over them.

    Renormalising makes this the softmax over the k kept scores; with k = 1 the gate is exactly 1, and the order of the
    scores decides alone.

    Args:
        k: how many experts answer (all of them where there are fewer).
    """

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, scores: torch.Tensor) -> Decision:
        """The decision for n tokens from (n, E) float32 scores."""
        experts = scores.shape[-1]
        if self.k == 1:
            return Decision(experts, scores.argmax(-1, keepdim=True), None)
        values, index = scores.topk(min(self.k, experts), dim=-1)
        return Decision(experts, index, values.softmax(-1))

    def extra_repr(self) -> str:
        return f"k={self.k}"
