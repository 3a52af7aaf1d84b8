"""Selections: from scores to a decision.

Each takes scores (n, E) in float32. A selection, like a score, may have a method `loss`: what it adds in training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decision import Decision


class TopK(nn.Module):
    """Softmax over the experts, keep the k largest, renormalise over them.

    Renormalising makes this the softmax over the k kept scores; with k = 1 the gate is exactly 1, and the order of the
    scores decides alone. Its gradient in training is then the straight-through one: that of the softmax's probability.

    Args:
        k: how many experts answer (all of them where there are fewer).
        renormalise: whether the kept gates sum to 1; else they are the probabilities themselves (Switch, equation 2 of
            arXiv:2101.03961).
        dropout: share of experts that training leaves out of an example's (or token's) choice.
        temperature: scores are divided by it.
    """

    def __init__(self, k: int, renormalise: bool = True, dropout: float = 0.0, temperature: float = 1.0):
        super().__init__()
        self.k, self.renormalise, self.dropout, self.temperature = k, renormalise, dropout, temperature

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n tokens from (n, E) float32 scores."""
        experts = scores.shape[-1]
        scores = scores if self.temperature == 1 else scores / self.temperature
        if self.training and self.dropout:
            scores = scores.masked_fill(torch.rand_like(scores) < self.dropout, -1e10)
        if not self.renormalise:
            weight, index = scores.softmax(-1).topk(min(self.k, experts), dim=-1)
            return Decision(experts, index, weight)
        if self.k == 1:
            index = scores.argmax(-1, keepdim=True)
            if not (self.training and scores.requires_grad):
                return Decision(experts, index, None)
            probability = scores.softmax(-1).gather(-1, index)
            return Decision(experts, index, 1 + (probability - probability.detach()))
        values, index = scores.topk(min(self.k, experts), dim=-1)
        return Decision(experts, index, values.softmax(-1))

    def extra_repr(self) -> str:
        return f"k={self.k}"


class Softmax(nn.Module):
    """Every expert answers, by the softmax of its score.

    Args:
        dropout: share of experts that training leaves out for an example, the others' gates renormalised
            (arXiv:2306.03745, section 3.3). Where all are left out, all stay in, level (the reference's `+ 1e-10`).
    """

    def __init__(self, k: int = 0, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 scores."""
        gates = scores.softmax(-1)
        if self.training and self.dropout:
            kept = gates * (torch.rand_like(gates) >= self.dropout) + 1e-10
            gates = kept / kept.sum(-1, keepdim=True)
        return Decision(scores.shape[-1], None, gates)


class Shares(nn.Module):
    """The k experts of the largest scores answer: each by its score's share of their sum, or all alike.

    Args:
        k: how many experts answer (all of them where there are fewer). Scores are not negative, unless `level`.
        level: whether they answer alike, by 1 / k.
    """

    def __init__(self, k: int, level: bool = False):
        super().__init__()
        self.k, self.level = k, level

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 scores."""
        values, index = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        values = torch.ones_like(values) if self.level else values
        tiny = torch.finfo(values.dtype).tiny
        return Decision(scores.shape[-1], index, values / values.sum(-1, keepdim=True).clamp(min=tiny))


class Sigmoid(nn.Module):
    """Every expert answers by the sigmoid of its score, for itself alone."""

    def __init__(self, k: int = 0):
        super().__init__()

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 scores."""
        return Decision(scores.shape[-1], None, scores.sigmoid())


class Given(nn.Module):
    """The scores are the gates."""

    def __init__(self, k: int = 0):
        super().__init__()

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 gates."""
        return Decision(scores.shape[-1], None, scores)


class First(nn.Module):
    """The expert of the largest score answers, with weight 1: for scores that are a choice already."""

    def __init__(self, k: int = 1):
        super().__init__()

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 scores."""
        return Decision(scores.shape[-1], scores.argmax(-1, keepdim=True), None)
