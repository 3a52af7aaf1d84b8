"""The compute paths of a mixture layer: different orders of the same sums.

Each adds the experts' outputs to `y`, what the base layer gives, in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

from ..experts.bank import Bank
from ..routing.decision import Decision

Path = Literal["stacked", "grouped", "merged", "native"]
# Products of fewer rows cost their call more than their sums: 128 rows in float32, 256 in half precision, in bytes.
FEW = 512
PATHS: tuple[Path, ...] = ("stacked", "grouped", "merged", "native")


def stacked(bank: Bank, x: torch.Tensor, z: torch.Tensor | None, decision: Decision, y: torch.Tensor) -> torch.Tensor:
    """All experts at once, gates folded in at rank width: two products, nothing that depends on data.

    Args:
        bank: the layer's experts.
        x: (tokens, d_in).
        z: (tokens, R), the down-projections of x; None for a dense bank.
        decision: which experts answer.
        y: (tokens, d_out), is added to.
    """
    gates = decision.gates()
    if z is None:
        for expert in range(bank.experts):
            y = y + gates[:, expert, None].to(y.dtype) * F.linear(x, bank.dense[expert]).to(y.dtype)
    else:
        y = y.addmm_(bank.weigh(z, gates).to(y.dtype), bank.up.to(y.dtype))
    return _biases(bank, gates, y)


def grouped(bank: Bank, x: torch.Tensor, decision: Decision, y: torch.Tensor) -> torch.Tensor:
    """Each expert on the tokens that chose it: no work for the others. Arguments as in `stacked`.

    Tokens are sorted by expert once. With few tokens an expert, all run in two grouped products; with many, expert
    after expert takes its own, so that what lies between the products stays in the cache.
    """
    pairs = 0 if decision.index is None else decision.index.numel()
    if pairs > 1 and pairs * x.element_size() <= FEW * bank.experts and bank.groupable(x):
        tokens, gates, counts = decision.sorted()
        part = bank.by_counts(x.index_select(0, tokens), gates, counts)
        y = y.index_add_(0, tokens, part.to(y.dtype))
        return _biases(bank, decision.gates(), y)
    for expert, chosen, weights in decision.by_expert():
        y = bank.accumulate(y, x, expert, chosen, weights)
    return y


def alike(bank: Bank, x: torch.Tensor, weights: Sequence[float], y: torch.Tensor) -> torch.Tensor:
    """The same weights, one per candidate, for all tokens. Arguments as in `stacked`."""
    for expert, weight in enumerate(weights):
        if weight:
            y = bank.accumulate(y, x, expert, None, None if weight == 1 else y.new_full((len(y), 1), weight))
    return y


def _biases(bank: Bank, gates: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Add the experts' bias deltas, where they have any, each times its gate (tokens, n)."""
    return y.addmm_(gates.to(y.dtype), bank.bias.to(y.dtype)) if bank.shape.bias else y
