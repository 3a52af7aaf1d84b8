"""The exact k-th largest magnitude of vectors that are seen in blocks, in two passes over them.

Magnitudes of float32 are in the order of their bit patterns. Histograms of the upper 15 bits, summed over the blocks,
say in which bin the k-th largest lies; histograms of the lower 16 bits inside that bin say which value it is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 17
"""Elements of a vector that are worked on at a time: what stays in a core's cache."""

# For functions of finished counts, which every block asks for again. Tensors are told apart by identity.
remembered = lru_cache(maxsize=8)


def upper_bits(vectors: Tensor) -> Tensor:
    """How often the magnitudes' upper bits take each value: (E, n) float32 -> (E, 2**15) int64."""
    counts = torch.zeros(len(vectors), 1 << 15, dtype=torch.int64, device=vectors.device)
    for count, vector in zip(counts, vectors, strict=True):
        for x in vector.split(CHUNK):
            count += torch.bincount(x.abs().view(torch.int32) >> 16, minlength=1 << 15)
    return counts


def lower_bits(vectors: Tensor, bins: Tensor) -> Tensor:
    """How often the lower bits of the magnitudes in a bin take each value.

    Args:
        vectors: (E, n) float32, on the CPU.
        bins: (E,) the upper bits that count, for each vector.

    Returns:
        (E, 2**16) int64.
    """
    counts = torch.zeros(len(vectors), 1 << 16, dtype=torch.int64)
    edges = torch.stack([bins, bins + 1]).int().bitwise_left_shift(16).view(torch.float32).tolist()
    for count, vector, lowest, above in zip(counts, vectors, *edges, strict=True):
        inside = []
        for x in vector.split(CHUNK):
            x = x.abs()
            chosen = (x >= lowest) & (x < above)
            inside.append(x.numpy()[chosen.numpy()])  # which takes a fifth of the time that it takes torch
        count += torch.bincount(torch.from_numpy(np.concatenate(inside)).view(torch.int32) & 0xFFFF, minlength=1 << 16)
    return counts


@remembered
def find(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th largest, and its rank from the top within that bin.

    Args:
        counts: (E, bins) int64.
        k: (E,) from 1 to the sum of the vector's counts.

    Returns:
        (E,) and (E,).
    """
    larger = counts.sum(1, keepdim=True) - counts.cumsum(1)
    at = (larger >= k[:, None]).sum(1)
    return at, k - larger.gather(1, at[:, None]).squeeze(1)


@remembered
def kth_largest(upper: Tensor, lower: Tensor, k: Tensor) -> Tensor:
    """The k-th largest magnitude: (E,) float32, from the counts of both passes."""
    bins, inside = find(upper, k)
    low, _ = find(lower, inside)
    return (bins << 16 | low).int().view(torch.float32)


def just_below(magnitudes: Tensor) -> list[float]:
    """Bounds for `hardshrink`, which keeps what is larger than its bound, so that these magnitudes stay too."""
    return torch.nextafter(magnitudes, torch.zeros_like(magnitudes)).tolist()
