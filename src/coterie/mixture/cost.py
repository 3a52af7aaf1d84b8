"""Which compute path is cheapest? A rule fitted to measurements on a CPU (benchmarks/paths.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..experts.bank import BankShape
from .paths import Path


@dataclass(frozen=True)
class Prices:
    """What things cost, in multiply-adds of a large matrix product on one thread.

    Attributes:
        read: an element of a weight that is read, beside its multiply-adds.
        moved: an element of an activation that is gathered, scaled or scattered.
        expert: an expert that is run on its own (the calls into torch).
    """

    read: float
    moved: float
    expert: float


# Chosen by hand between the fits of two runs (docs/speed.md has the last one's); their regret is on that page.
SINGLE = Prices(read=17, moved=23, expert=67_000)
HALF = Prices(read=24, moved=65, expert=5_500_000)

# Up to this many tokens siblings share a scoring product: above, the shared scores fall out of the cache.
SHARED = 64


@lru_cache(maxsize=4096)
def cheapest(
    tokens: int, shape: BankShape, k: int, d_in: int, d_out: int, dtype: torch.dtype = torch.float32, threads: int = 1
) -> Path:
    """The path for a layer whose tokens decide for themselves.

    Args:
        tokens: how many there are.
        shape: the layer's bank.
        k: experts that answer a token.
        d_in, d_out: the layer's widths.
        dtype: the bank's.
        threads: that share a matrix product; the calls into torch stay as slow as with one.
    """
    prices = SINGLE if dtype.itemsize >= 4 else HALF
    extra = sum(
        count * price
        for count, price in zip(
            difference(tokens, shape, k, d_in, d_out),
            (1.0, prices.read, prices.moved, prices.expert * threads),
            strict=True,
        )
    )
    return "grouped" if extra < 0 else "stacked"


def difference(tokens: int, shape: BankShape, k: int, d_in: int, d_out: int) -> tuple[float, float, float, float]:
    """How much more the grouped path takes than the stacked one: multiply-adds, weights read, elements moved, experts.

    Stacked projects every token to all ranks of all experts and back, through a scaled copy of the projections. Grouped
    scores all experts, gathers each expert's tokens, runs it on them alone, and adds its output where it belongs.
    """
    experts = len(shape.experts)
    own = d_in * d_out if shape.ranks is None else sum(shape.ranks) / experts * (d_in + d_out)
    inner = d_out if shape.ranks is None else sum(shape.ranks) / experts
    scored = experts * shape.gate_rank * d_in
    alone = scored if shape.gate else 0  # else the stacked path scores what it projects anyway
    busy = min(experts, tokens * k)
    gathered = 0 if tokens == 1 else tokens * k * (d_in + 2 * d_out)
    return (
        tokens * (scored + k * own - alone - experts * own),
        scored + busy * own - alone - experts * own,
        gathered - tokens * 2 * experts * inner,
        busy - 1,
    )
