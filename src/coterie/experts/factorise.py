"""Factorising a delta: its leading singular directions, with the residual measured.

Everything here works in float64, in (out, in) orientation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..sources.delta import Delta, Dense

# Singular values below this fraction of the largest count as zero: the rounding of float32 weights lies there.
NUMERICAL_RANK = 1e-6


@dataclass
class Factors:
    """`delta ~ u diag(s) vt`, singular values in descending order.

    Attributes:
        u: (m, k) left singular vectors, orthonormal columns, float64.
        s: (k,) singular values, float64.
        vt: (k, n) right singular vectors, orthonormal rows, float64.
        norm: Frobenius norm of the delta.
        rank: the delta's numerical rank, as far as it was computed (at least k).
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    norm: float
    rank: int

    @property
    def residual(self) -> float:
        """`|delta - u diag(s) vt| / |delta|` in Frobenius norm."""
        return residual(self.s, self.norm)


def residual(s: torch.Tensor, norm: float) -> float:
    """Relative residual of keeping singular values `s` of a delta of Frobenius norm `norm`.

    The directions are orthonormal, so the squares subtract.
    """
    return max(0.0, 1.0 - float((s.double() ** 2).sum()) / norm**2) ** 0.5 if norm else 0.0


def factorise(delta: Delta, rank: int | None = None) -> Factors:
    """The leading `rank` singular triplets of a delta, by the way that suits the form it comes in."""
    return thin_svd(delta.matrix, rank) if isinstance(delta, Dense) else low_rank_svd(delta.up, delta.down, rank)


def thin_svd(delta: torch.Tensor, rank: int | None = None) -> Factors:
    """The leading `rank` singular triplets of a dense delta.

    A few directions of a large matrix come from the eigenvectors of its float64 Gram matrix, whose relative error in
    the k-th singular value is about `1e-16 (s_1 / s_k)^2`; where that would exceed 1e-8, from the exact SVD.

    Args:
        delta: (m, n) matrix, any floating dtype.
        rank: how many triplets; None for all that are numerically non-zero.
    """
    delta = delta.double()
    norm = float(torch.linalg.matrix_norm(delta))
    m, n = delta.shape
    if rank is not None and rank < min(m, n) // 2:
        wide = n > m
        values, vectors = torch.linalg.eigh(delta @ delta.T if wide else delta.T @ delta)
        s = values[-rank:].flip(0).clamp_min(0).sqrt()
        if s[-1] > 1e-4 * s[0]:
            near = vectors[:, -rank:].flip(1)
            far = (delta.T if wide else delta) @ near / s
            return Factors(near, s, far.T, norm, rank) if wide else Factors(far, s, near.T, norm, rank)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return _truncate(u, s, vt, norm, rank)


def low_rank_svd(up: torch.Tensor, down: torch.Tensor, rank: int | None = None) -> Factors:
    """The leading singular triplets of `up @ down`, by QR of the factors; the product is never formed.

    Args:
        up: (m, r) up-projection, any scale folded in.
        down: (r, n) down-projection.
        rank: how many triplets; None for all that are numerically non-zero.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return _truncate(q_up @ u, s, vt @ q_down.T, float(torch.linalg.vector_norm(s)), rank)


def _truncate(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, norm: float, rank: int | None) -> Factors:
    numerical = int((s > NUMERICAL_RANK * s[0]).sum()) if len(s) and s[0] > 0 else 0
    k = numerical if rank is None else min(rank, numerical)
    return Factors(u[:, :k], s[:k], vt[:k], norm, numerical)
