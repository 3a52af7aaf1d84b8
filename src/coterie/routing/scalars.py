"""Scores that read nothing: a number for each expert, given once or learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CoterieError
from .call import Call


class Fixed(nn.Module):
    """The same weights for every input.

    Args:
        weights: of the experts; None: all 0.

    Raises:
        CoterieError: there are more or fewer than experts.
    """

    reads = "call"

    def __init__(self, width: int, experts: int, weights: list[float] | None = None):
        super().__init__()
        self.weights = [0.0] * experts if weights is None else list(weights)
        if len(self.weights) != experts:
            raise CoterieError(f"{len(self.weights)} weights for {experts} experts", "weights", "give one for each")

    def forward(self, call: Call, layer: int) -> Tensor:
        """Gates (batch, experts)."""
        return torch.tensor(self.weights, device=call.device).expand(call.batch, -1)


class Scalars(nn.Module):
    """A learned number for each expert in each layer, for every input (arXiv:2410.13025, section 3)."""

    reads = "call"

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts))

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters, N(0, 1)."""
        nn.init.normal_(self.weight, generator=generator)

    def forward(self, call: Call, layer: int) -> Tensor:
        """Scores (batch, experts), in float32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(dtype).expand(call.batch, -1)
