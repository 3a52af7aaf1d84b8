"""AdaMix: training picks down- and up-projections at random, and use averages them all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decision import Decision


class Uniform(nn.Module):
    """In training a random expert's down-projection and a random expert's up-projection, else the mean of all.

    arXiv:2205.12410, sections 3.1 to 3.3; combined as factors.
    """

    losses = ("consistency",)

    def __init__(self, k: int = 0):
        super().__init__()

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows; of the scores (n, E) only the shape counts."""
        n, experts = scores.shape
        if not self.training:
            return Decision(experts, None, torch.full_like(scores, 1 / experts))
        down, up = torch.randint(experts, (2, n), device=scores.device)
        hot = nn.functional.one_hot
        return Decision(experts, None, hot(down, experts).to(scores.dtype), hot(up, experts).to(scores.dtype))
