"""What routers and retrieval ask of an expert: computed from its factors, or put in by whoever has the data.

Each kind is one safetensors file beside the adapter (`sources/statistics.py`); what belongs to other weights is never
taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..experts.factorise import low_rank_svd
from ..sources.delta import LowRank
from ..sources.statistics import FOLDER, file_of, read, write

__all__ = ["FOLDER", "OF_INPUTS", "OF_WEIGHTS", "file_of", "gram", "prototype", "read", "sigma", "write"]


def prototype(delta: LowRank) -> Tensor:
    """(in,) float32: the delta's first right singular vector, its largest component positive; zeros of a zero delta.

    Arrow's prototype (Ostapenko et al. 2024, arXiv:2405.11157), exact by QR of the factors and an r x r SVD.
    """
    vt = low_rank_svd(delta.up, delta.down, 1).vt
    if not len(vt):
        return torch.zeros(delta.down.shape[1])
    return (vt[0] * vt[0][vt[0].abs().argmax()].sign()).float()


def sigma(delta: LowRank) -> Tensor:
    """(r,) float64: the delta's singular values, the largest first, with zeros up to the rank of the factors."""
    values = low_rank_svd(delta.up, delta.down).s
    return torch.nn.functional.pad(values, (0, delta.up.shape[1] - len(values)))


def gram(delta: LowRank) -> Tensor:
    """(r, r) float64: `up^T up`, the scale in `up`: with z = down x, the delta's output has the norm sqrt(z^T G z).

    What the score of SpectR (Fleshman & Van Durme 2025) needs, without an SVD.
    """
    return delta.up.T @ delta.up


OF_WEIGHTS: dict[str, Callable[[LowRank], Tensor]] = {"prototype": prototype, "sigma": sigma, "gram": gram}
"""The kinds that are computed from an expert's factors, layer by layer."""

OF_INPUTS = ("gate", "activation")
"""The kinds that somebody with data puts in: one vector as wide as its input, (in,), for layers of the expert."""
