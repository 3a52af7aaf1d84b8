"""Scores that read no input: the task's name, a table of skills for each task, a hash, nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CoterieError
from .call import Call


def tasks_of(call: Call) -> Tensor:
    """Each example's task, (batch,).

    Raises:
        CoterieError: none was given.
    """
    if call.tasks is None:
        raise CoterieError(
            "the routers go by each example's task, and the call names none",
            "task_ids",
            "pass task_ids=(batch,) with the batch (a column `task_ids` of the data set), or name an expert with "
            "model.coterie.route",
        )
    return call.tasks


class Task(nn.Module):
    """One-hot of the example's task: task i has expert i, or the one that `share` gives it.

    Args:
        share: the expert of each task; None: one each.

    Raises:
        CoterieError: a task's expert does not exist.
    """

    reads = "call"

    def __init__(self, width: int, experts: int, share: list[int] | None = None):
        super().__init__()
        self.experts = experts
        self.share = list(range(experts)) if share is None else share
        self.tasks = len(self.share)
        if not self.share or not all(0 <= expert < experts for expert in self.share):
            raise CoterieError(
                f"share is {share} and there are {experts} experts",
                "share",
                f"name experts from 0 to {experts - 1}",
            )

    def forward(self, call: Call, layer: int) -> Tensor:
        """Gates (batch, experts)."""
        tasks = tasks_of(call)
        return nn.functional.one_hot(torch.tensor(self.share, device=tasks.device)[tasks], self.experts).float()


class Skills(nn.Module):
    """A learned share of every expert (skill) for each task, its rows summing to 1 (arXiv:2202.13914, section 3).

    Args:
        tasks: how many there are.
        splits: blocks of the input and output dimensions with shares of their own (arXiv:2211.03831, MHR).
        relaxed: whether training samples shares from a relaxed Bernoulli (temperature 1); else they are sigmoids.
    """

    reads = "call"

    def __init__(self, width: int, experts: int, tasks: int, splits: int = 1, relaxed: bool = True):
        super().__init__()
        self.experts, self.tasks, self.splits, self.relaxed = experts, tasks, splits, relaxed
        self.table = nn.Parameter(torch.empty(tasks, experts, splits))

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters, U(-1e-3, 1e-3)."""
        nn.init.uniform_(self.table, -1e-3, 1e-3, generator=generator)

    def forward(self, call: Call, layer: int) -> Tensor:
        """Gates (batch, experts), or (batch, experts, splits) where there are several."""
        logits = self.table.float()[tasks_of(call)]
        if self.training and self.relaxed:
            u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + u.log() - (-u).log1p()
        shares = logits.sigmoid()
        shares = shares / (shares.sum(1, keepdim=True) + 1e-12)
        return shares[..., 0] if self.splits == 1 else shares


class Hash(nn.Module):
    """One-hot of an expert that an example's content and the layer decide, at random and for good."""

    reads = "call"

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.experts = experts

    def forward(self, call: Call, layer: int) -> Tensor:
        """Gates (batch, experts)."""
        assert call.key is not None
        mixed = (call.key ^ (layer * 0x9E3779B97F4A7C & 0x7FFFFFFFFFFFFFFF)) * 0x2545F4914F6CDD1D
        mixed = (mixed ^ (mixed >> 29)) * 0x1B873593CC9E2D51
        return nn.functional.one_hot(((mixed >> 33) & 0x3FFFFFFF) % self.experts, self.experts).float()


class Level(nn.Module):
    """The same share for all experts."""

    reads = "call"

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.experts = experts

    def forward(self, call: Call, layer: int) -> Tensor:
        """Gates (batch, experts)."""
        return torch.full((call.batch, self.experts), 1 / self.experts, device=call.device)
