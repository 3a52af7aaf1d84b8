"""What is not a mixture layer: tensors that follow a policy, and modules that are kept per expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CoterieError
from ..sources.checkpoint import is_counter
from ..sources.experts import ExpertSource, same
from .report import Followed


def follow(
    name: str, base: torch.Tensor, experts: list[ExpertSource], policy: str, why: str
) -> tuple[torch.Tensor, Followed]:
    """One tensor under a policy.

    `base` keeps the base's; `average` is the base plus the mean of the weighted deltas over all experts, those that do
    not touch it counting as zero.

    Args:
        name: the tensor's name in memory.
        base: the base's value.
        experts: all experts.
        policy: `base` or `average`.
        why: why the tensor is not part of a mixture layer, for the account.

    Returns:
        The base's tensor itself where nothing is added, else a float32 one; and the account.

    Raises:
        CoterieError: an integer buffer that differs between base and expert.
    """
    # A single tensor cannot be kept per expert: that takes a module of its own, which `prepare` makes a head.
    followed = Followed(why, "base" if policy == "per_expert" else policy)
    total = torch.zeros_like(base, dtype=torch.float32) if policy == "average" else None
    for expert in experts:
        if expert.altered(name):
            followed.changed_by.append(expert.name)
            continue
        value = expert.value(name, base)
        if value is None or is_counter(name) or same(value, base):
            continue
        if not base.is_floating_point():
            raise CoterieError(
                f"integer buffer {name!r} differs from the base's",
                f"expert {expert.name!r} ({expert.location})",
                "use experts of this base",
            )
        followed.changed_by.append(expert.name)
        if total is not None:
            total += expert.weight * (value.float() - base.float())
    if total is None or not followed.changed_by:
        return base, followed
    return base.float() + total / len(experts), followed


@dataclass
class Head:
    """A module that may differ from expert to expert; plain data.

    Attributes:
        owners: indices of the experts that have it.
        shapes: per copy, name inside the module -> shape.
        shared: whether one copy serves all experts, for they do not differ.
    """

    owners: list[int]
    shapes: list[dict[str, list[int]]]
    shared: bool

    def copy_of(self, expert: int) -> dict[str, list[int]]:
        """The shapes of the copy that serves an expert; empty where it has none."""
        if self.shared:
            return self.shapes[0]
        return self.shapes[self.owners.index(expert)] if expert in self.owners else {}


def gather_head(
    path: str,
    wanted: dict[str, torch.Tensor],
    base: Any,
    experts: list[ExpertSource],
    labels: list[dict[str, Any]],
    written: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Head, dict[str, torch.Tensor]]:
    """A module's copies: one per expert where they (as they are written) or their labels differ, else a single one.

    An expert that says nothing of the module has the base's; where the base lacks it too, the expert has none.

    Args:
        path: the module's path.
        wanted: name inside the module -> the architecture's tensor.
        base: view of the base model.
        experts: all experts.
        labels: per expert, the configuration fields of its head.
        written: a tensor in the dtype in which it is written; an expert that a mixture holds has no other.

    Returns:
        The structure, and the copies' tensors under their names in the mixture.
    """
    owners: list[int] = []
    copies: list[dict[str, torch.Tensor]] = []
    for index, expert in enumerate(experts):
        copy: dict[str, torch.Tensor] = {}
        for leaf in wanted:
            name = f"{path}.{leaf}"
            mine = base.get(name) if name in base else None
            value = expert.value(name, mine, any_shape=True)
            value = mine if value is None else value
            if value is not None:
                copy[leaf] = written(value)
        if len(copy) == len(wanted):
            owners.append(index)
            copies.append(copy)
        elif any(expert.has(f"{path}.{leaf}") for leaf in wanted):
            lacking = next(leaf for leaf in wanted if leaf not in copy)
            raise CoterieError(
                f"it changes {path!r}, and neither it nor the base holds all of it ({path}.{lacking})",
                f"expert {expert.name!r}",
                "give a base that has this head, or an expert that brings it whole",
            )
    if not owners:
        raise CoterieError(
            f"neither the base nor any expert has module {path!r}",
            "sources",
            "name another class of the mixture with `architecture`",
        )
    first = copies[0]
    shared = len(owners) == len(experts) and all(
        all(torch.equal(first[leaf], copy[leaf]) for leaf in wanted) and labels[i] == labels[owners[0]]
        for i, copy in zip(owners, copies, strict=True)
    )
    if shared:
        copies, named = [first], {f"{path}.{leaf}": t for leaf, t in first.items()}
    else:
        named = {f"{path}.{i}.{leaf}": t for i, copy in enumerate(copies) for leaf, t in copy.items()}
    return Head(owners, [{leaf: list(t.shape) for leaf, t in copy.items()} for copy in copies], shared), named
