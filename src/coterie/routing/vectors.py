"""Scores by one vector for each expert, read off its own data: PHATGOOSE's gates, average activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precise import precise


class Vectors(nn.Module):
    """`v_i . x / sqrt(d)`, v_i and x standardised over their d components; or `v_i . x`, as gates are trained.

    arXiv:2402.05859, section 3.

    Args:
        width: of the input, d.
        experts: how many are scored.
        normalise: whether both are standardised.
    """

    reads = "input"

    def __init__(self, width: int, experts: int, normalise: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.normalise = normalise

    def reset(self, generator: torch.Generator) -> None:
        """Zeros: every gate starts at one half."""
        nn.init.zeros_(self.weight)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        """Scores (..., experts) of x (..., width), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if not self.normalise:
            return F.linear(x, weight)
        # a vector's own length must not count, so that almost nothing is added to its variance
        x, weight = (F.layer_norm(each, each.shape[-1:], eps=1e-12) for each in (x, weight))
        return F.linear(x, weight) * x.shape[-1] ** -0.5
