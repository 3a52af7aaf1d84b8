"""Learned scores: a linear map of what the router reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precise import precise


class Linear(nn.Module):
    """`LN(x) . LN(w_i)`, or `x . w_i` (arXiv:2306.03745, section 3.2, and its reference code).

    Args:
        width: of the input.
        experts: how many are scored.
        normalise: whether a layer norm precedes, on the input and on each expert's weights; the latter's gain starts at
            0.01, so that all experts start nearly level.
        bias: whether experts have a bias.
    """

    reads = "input"

    def __init__(self, width: int, experts: int, normalise: bool = True, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None
        self.normalise = normalise
        if normalise:
            self.input_gain, self.input_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
            self.weight_gain, self.weight_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters."""
        nn.init.normal_(self.weight, std=0.01, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.normalise:
            nn.init.ones_(self.input_gain)
            nn.init.zeros_(self.input_bias)
            nn.init.constant_(self.weight_gain, 0.01)
            nn.init.zeros_(self.weight_bias)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        """Scores (..., experts) of x (..., width), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), self.weight.to(dtype)
        if self.normalise:
            x = F.layer_norm(x, x.shape[-1:], self.input_gain.to(dtype), self.input_bias.to(dtype))
            weight = F.layer_norm(weight, x.shape[-1:], self.weight_gain.to(dtype), self.weight_bias.to(dtype))
        return F.linear(x, weight, None if self.bias is None else self.bias.to(dtype))


class Soft(nn.Module):
    """Soft MoE's logits, of unit tokens and slots: `scale * x . phi / (|x| |phi|)` (arXiv:2308.00951, section 2.3).

    Args:
        width: of the input.
        experts: slots of all experts.
    """

    reads = "input"

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(experts, width)), nn.Parameter(torch.empty(()))

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5, generator=generator)
        nn.init.ones_(self.scale)

    @precise
    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., slots) of x (..., width), in float32 at least."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        unit = F.normalize(self.weight.to(dtype), dim=-1)
        return self.scale.to(dtype) * F.linear(F.normalize(x.to(dtype), dim=-1), unit)
