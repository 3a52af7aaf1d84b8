"""Merges that add up deltas: the average of the experts, and task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

State = Mapping[str, Tensor]
"""Tensor name -> tensor. A delta lacks the names that its expert did not change."""


def delta(expert: State, base: State) -> dict[str, Tensor]:
    """What fine-tuning changed: expert - base, for every floating tensor of the base that differs.

    Args:
        expert: tensors of the expert, with the base's names and shapes.
        base: tensors of the base.
    """
    return {
        name: expert[name] - weight
        for name, weight in base.items()
        if weight.is_floating_point() and not expert[name].equal(weight)
    }


def task_arithmetic(base: State, deltas: Sequence[State], scale: float) -> dict[str, Tensor]:
    """base + scale * sum of the deltas. [Ilharco et al. 2023, arXiv:2212.04089, section 2]

    Args:
        base: tensors of the base.
        deltas: one for each expert.
        scale: the scaling coefficient, 0 (the base) to about 1.
    """
    merged = {}
    for name, weight in base.items():
        changes = [each[name] for each in deltas if name in each]
        merged[name] = weight + scale * sum(changes[1:], start=changes[0]) if changes else weight
    return merged


def average(base: State, deltas: Sequence[State]) -> dict[str, Tensor]:
    """The uniform average of the experts. [Wortsman et al. 2022, arXiv:2203.05482, equation 2]

    Args:
        base: tensors of the base.
        deltas: one for each expert, at least one.
    """
    return task_arithmetic(base, deltas, 1 / len(deltas))
