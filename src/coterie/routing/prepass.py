"""X-LoRA: the whole model's hidden states, from a pass without experts, weigh the experts of every layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .call import Call
from .precise import precise


class Classifier(nn.Module):
    """`softmax(MLP(h) / T)` for each token: the experts' gates, of every layer or one set for all (arXiv:2402.07148).

    Args:
        width: of the hidden states.
        experts: how many.
        layers: how many have gates of their own; 1 for one set for all.
        depth: linear layers; ReLU and dropout between.
        inner: width between them.
        dropout: between them, in training.
        temperature: logits are divided by it.
        top_k: only so many gates of a token are kept, as they are; None: all.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        layers: int = 1,
        depth: int = 1,
        inner: int = 2048,
        dropout: float = 0.2,
        temperature: float = 1.0,
        top_k: int | None = None,
    ):
        super().__init__()
        sizes = [width, *[inner] * (depth - 1), layers * experts]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.experts, self.dropout, self.temperature, self.top_k = experts, dropout, temperature, top_k

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters, as of `nn.Linear`."""
        for linear in self.linears:
            bound = linear.in_features**-0.5  # type: ignore[operator]
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)  # type: ignore[arg-type]
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]

    @precise
    def forward(self, h: Tensor) -> Tensor:
        """Gates (batch, tokens, layers, experts) of hidden states (batch, tokens, width), in float32 at least."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        h = h.to(dtype)
        linears: Any = self.linears
        for i, linear in enumerate(linears):
            h = F.dropout(F.relu(h), self.dropout, self.training) if i else h
            h = F.linear(h, linear.weight.to(dtype), linear.bias.to(dtype))
        gates = (h.unflatten(-1, (-1, self.experts)) / self.temperature).softmax(-1)
        if self.top_k is not None and self.top_k < self.experts:
            kept = gates.topk(self.top_k, dim=-1).indices
            gates = torch.zeros_like(gates).scatter(-1, kept, gates.gather(-1, kept))
        return gates


class Prepass(nn.Module):
    """The gates that a pass of the whole model decided before. Options are those of `Classifier`."""

    reads = "call"

    def __init__(self, width: int, experts: int, **options: object):
        super().__init__()
        self.experts = experts

    def forward(self, call: Call, layer: int) -> Tensor:
        """Gates (batch, tokens, experts) of a layer."""
        assert call.gates is not None
        return call.gates[:, :, layer if call.gates.shape[2] > 1 else 0]


def freeze(gates: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Gates that stay, after the prompt, what they are at its last token.

    Args:
        gates: (batch, tokens, layers, experts).
        prompt: (batch, tokens) bool.

    Returns:
        Such gates, and those of the prompt's last token, (batch, 1, layers, experts).
    """
    places = torch.arange(prompt.shape[1], device=prompt.device)
    last = torch.where(prompt, places, -1).max(1).values
    final = gates[torch.arange(len(gates), device=gates.device), last][:, None]
    return torch.where((places > last[:, None])[..., None, None], final, gates), final
