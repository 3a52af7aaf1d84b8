"""DSelect-k: experts under binary codes, whose bits are smooth steps of the input (arXiv:2106.03760)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .call import Call
from .decision import Decision
from .precise import precise


class DSelect(nn.Module):
    """Gates `sum_j softmax(w_j . x) prod_b bit_b(code_i)`, exactly one-hot once every bit has saturated.

    Section 3 of arXiv:2106.03760; a layer norm precedes on the input, as in the reference code of arXiv:2306.03745.

    Args:
        width: of the input.
        experts: how many are chosen from.
        selectors: how many single-expert selectors are mixed: the paper's k.
        gamma: width of the smooth step.
    """

    reads = "input"
    losses = ("entropy",)
    codes: Tensor

    def __init__(self, width: int, experts: int, selectors: int = 1, gamma: float = 1.0):
        super().__init__()
        bits = math.ceil(math.log2(experts))
        self.experts, self.gamma = experts, gamma
        self.bits = nn.Parameter(torch.empty(selectors, bits, width))
        self.mix = nn.Parameter(torch.empty(selectors, width))
        self.input_gain, self.input_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters."""
        nn.init.normal_(self.bits, std=0.01, generator=generator)
        nn.init.normal_(self.mix, std=0.01, generator=generator)
        nn.init.ones_(self.input_gain)
        nn.init.zeros_(self.input_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gates (n, experts) of x (n, width), in float32 at least."""
        selected, mix = self._selectors(x)
        return (selected * mix).sum(1)

    @precise
    def _selectors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every selector's outputs (n, selectors, experts) and its weight (n, selectors, 1)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = F.layer_norm(x.to(dtype), x.shape[-1:], self.input_gain.to(dtype), self.input_bias.to(dtype))
        t = torch.einsum("nd,sbd->nsb", x, self.bits.to(dtype))
        g = self.gamma
        step = torch.where(t.abs() < g / 2, -2 / g**3 * t**3 + 3 / (2 * g) * t + 0.5, (t > 0).to(dtype))[:, :, None]
        places = torch.arange(self.bits.shape[1] - 1, -1, -1, device=x.device)
        codes = (torch.arange(self.experts, device=x.device)[:, None] >> places) & 1
        selected = torch.where(codes.bool(), step, 1 - step).prod(-1)
        return selected, (x @ self.mix.to(dtype).T).softmax(-1)[..., None]

    def loss(
        self, read: Tensor, scores: Tensor, decision: Decision, valid: Tensor | None, call: Call
    ) -> dict[str, Tensor]:
        """The selectors' entropy, which drives them to one expert; where codes have no expert, what keeps off them."""
        selected, _ = self._selectors(read)
        entropy = -(selected * (selected + 1e-6).log()).sum(-1).mean(-1)
        if self.experts & (self.experts - 1):
            entropy = entropy + (1 / (selected + 1e-6).sum(-1)).mean(-1)
        if valid is not None:
            entropy = entropy[valid]
        return {"entropy": entropy.mean()}
