"""Losses that keep experts in use. Rows that do not count are left out."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .decision import Decision
from .precise import precise


def balance(scores: Tensor, decision: Decision, valid: Tensor | None) -> Tensor:
    """`E sum_i f_i P_i`: f the share of rows that choose an expert, P its mean probability (arXiv:2101.03961, eq. 4).

    With k choices a row, f sums to k.

    Args:
        scores: (n, E).
        decision: made of them.
        valid: (n,) bool, which rows count; None for all.
    """
    chosen = (decision.gates() != 0).to(scores.dtype)
    return scores.shape[-1] * (_mean(chosen, valid) * _mean(scores.softmax(-1), valid)).sum()


def z(scores: Tensor, decision: Decision, valid: Tensor | None) -> Tensor:
    """The router z-loss, the mean of `logsumexp(scores)^2` (arXiv:2202.08906, eq. 5); arguments as of `balance`."""
    return _mean(scores.logsumexp(-1).square(), valid)


LOSSES: dict[str, Callable[[Tensor, Decision, Tensor | None], Tensor]] = {"balance": balance, "z": z}


@precise
def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return rows.mean(0)
    share = valid.to(rows.dtype)
    share = share / share.sum().clamp(min=1)
    return share @ rows
