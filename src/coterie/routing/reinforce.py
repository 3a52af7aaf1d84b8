"""REINFORCE: one expert answers, sampled, and learns from the call's loss against a learned baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .call import Call, Policy
from .decision import Decision
from .precise import precise


class Reinforce(nn.Module):
    """A sample of `softmax(s)` answers in training, the largest score without.

    As in the reference code of arXiv:2306.03745: the reward is minus an example's loss, the baseline a linear map
    through d / 8 of the router's input, trained with the Huber loss.

    Args:
        width: of what the router reads.
    """

    losses = ("policy", "policy_entropy", "value")

    def __init__(self, k: int = 1, width: int = 0):
        super().__init__()
        inner = max(width // 8, 1)
        self.down, self.down_bias = nn.Parameter(torch.empty(inner, width)), nn.Parameter(torch.empty(inner))
        self.up, self.up_bias = nn.Parameter(torch.empty(1, inner)), nn.Parameter(torch.empty(1))

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters."""
        for weight, bias in ((self.down, self.down_bias), (self.up, self.up_bias)):
            nn.init.normal_(weight, std=0.01, generator=generator)
            nn.init.zeros_(bias)

    def forward(self, scores: Tensor) -> Decision:
        """The decision for n rows from (n, E) float32 scores."""
        if self.training:
            return Decision(scores.shape[-1], scores.softmax(-1).multinomial(1), None)
        return Decision(scores.shape[-1], scores.argmax(-1, keepdim=True), None)

    @precise
    def loss(
        self, read: Tensor, scores: Tensor, decision: Decision, valid: Tensor | None, call: Call
    ) -> dict[str, Tensor]:
        """None yet: the choice is noted, and the call rewards it."""
        assert decision.index is not None
        log_probabilities = scores.log_softmax(-1)
        x = F.layer_norm(read.detach().float(), read.shape[-1:])
        value = F.linear(F.linear(x, self.down.float(), self.down_bias.float()), self.up.float(), self.up_bias.float())
        call.await_reward(
            Policy(
                log_probabilities.gather(-1, decision.index)[:, 0],
                -(log_probabilities.exp() * log_probabilities).sum(-1),
                value[:, 0],
            )
        )
        return {}
