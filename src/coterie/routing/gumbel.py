"""Straight-through Gumbel: one expert answers, sampled, with the gradient of its relaxed probability."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .decision import Decision


class Gumbel(nn.Module):
    """`argmax((s + G) / T)`, G Gumbel noise; the gate is `1 - p + p` with a gradient through p alone.

    The reference code of arXiv:2306.03745 (after arXiv:1611.01144); without training, the largest score.

    Args:
        temperature: T at first.
        anneal: T falls as `exp(-anneal * step)`.
        floor: the least T.

    Attributes:
        step: calls of the model in training, the present one included. The model's forward counts them, and not the
            layer's, which gradient checkpointing repeats.
    """

    step: Tensor

    def __init__(self, k: int = 1, temperature: float = 10.0, anneal: float = 1e-4, floor: float = 0.5):
        super().__init__()
        self.temperature, self.anneal, self.floor = temperature, anneal, floor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset(self, generator: torch.Generator) -> None:
        """From the first step."""
        self.step.zero_()

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 scores."""
        experts = scores.shape[-1]
        if not self.training:
            return Decision(experts, scores.argmax(-1, keepdim=True), None)
        noise = -torch.empty_like(scores).exponential_().clamp(min=1e-20).log()
        before = (self.step - 1).clamp(min=0)
        temperature = (self.temperature * torch.exp(-self.anneal * before)).clamp(min=self.floor)
        probability, index = ((scores + noise) / temperature).softmax(-1).max(-1, keepdim=True)
        return Decision(experts, index, 1 + (probability - probability.detach()))
