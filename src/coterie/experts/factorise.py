"""Factorising a delta: its leading singular directions, with the residual measured.

Deltas are (out, in); what is found is given in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..sources.delta import Delta, Dense
from .subspace import TOLERANCE, certified_svd, oversampled, start

# Singular values below this fraction of the largest count as zero: the rounding of float32 weights lies there.
NUMERICAL_RANK = 1e-6

# Narrower matrices are factorised exactly in the time of an iteration.
ITERATED = 256

# A factor's condition up to which its Gram matrix tells its directions to nine digits.
CONDITION = 1e3

# Numbers that are widened to float64 at a time: they stay in a core's cache.
CHUNK = 2**16


@dataclass
class Factors:
    """`delta ~ u diag(s) vt`, singular values in descending order.

    Attributes:
        u: (m, k) left singular vectors, orthonormal columns, float64.
        s: (k,) singular values, float64.
        vt: (k, n) right singular vectors, orthonormal rows, float64.
        norm: Frobenius norm of the delta.
        rank: the delta's numerical rank, as far as it was computed (at least k).
        excess: certified: the residual is at most `1 + excess` times that of the best approximation of rank k.
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor
    norm: float
    rank: int
    excess: float = 0.0

    @property
    def residual(self) -> float:
        """`|delta - u diag(s) vt| / |delta|` in Frobenius norm."""
        return residual(self.s, self.norm)


def residual(s: torch.Tensor, norm: float) -> float:
    """Relative residual of keeping singular values `s` of a delta of Frobenius norm `norm`.

    The directions are orthonormal, so the squares subtract.
    """
    return max(0.0, 1.0 - float((s.double() ** 2).sum()) / norm**2) ** 0.5 if norm else 0.0


def frobenius(matrix: torch.Tensor) -> float:
    """Frobenius norm in float64, without a float64 copy of the matrix."""
    if matrix.stride(0) < matrix.stride(-1):
        matrix = matrix.T
    rows = max(1, CHUNK // max(1, matrix.shape[-1]))
    wide = matrix.new_empty(min(rows, len(matrix)), matrix.shape[-1], dtype=torch.float64)
    parts = [torch.linalg.vector_norm(wide[: len(part)].copy_(part)) for part in matrix.split(rows)]
    return math.hypot(*map(float, parts))


def factorise(delta: Delta, rank: int | None = None) -> Factors:
    """The leading `rank` singular triplets of a delta, by the way that suits the form it comes in."""
    return thin_svd(delta.matrix, rank) if isinstance(delta, Dense) else low_rank_svd(delta.up, delta.down, rank)


def thin_svd(delta: torch.Tensor, rank: int | None = None, exact: bool = False) -> Factors:
    """The leading `rank` singular triplets of a dense delta, at most `subspace.TOLERANCE` worse than the best.

    A few directions of a large matrix come from a subspace iteration that certifies its error, in float32 where the
    spectrum lets it. Next comes the float64 Gram matrix, whose relative error in the k-th singular value is about
    `1e-16 (s_1 / s_k)^2`; where that would exceed 1e-8, and for all directions, the SVD.

    Args:
        delta: (m, n) matrix, any floating dtype.
        rank: how many triplets; None for all that are numerically non-zero.
        exact: never iterate: the directions themselves are wanted, not only what they leave out.
    """
    m, n = delta.shape
    if n > m:
        f = thin_svd(delta.T, rank, exact)
        return Factors(f.vt.T, f.s, f.u.T, f.norm, f.rank, f.excess)
    norm = frobenius(delta)
    if not norm:
        return nothing(m, n, delta.device)
    if rank is not None and not exact and n >= ITERATED and oversampled(rank) <= n // 4:
        found = iterated_svd(delta, rank, norm)
        if found is not None:
            return found
    delta = delta.double()
    if rank is not None and rank < n // 2:
        values, vectors = torch.linalg.eigh(delta.T @ delta)
        s = values[-rank:].flip(0).clamp_min(0).sqrt()
        if s[-1] > 1e-4 * s[0]:
            v = vectors[:, -rank:].flip(1)
            return Factors(delta @ v / s, s, v.T, norm, rank)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return _truncate(u, s, vt, norm, rank)


def iterated_svd(delta: torch.Tensor, rank: int, norm: float) -> Factors | None:
    """The leading triplets of a tall delta with a certified error, or None where no certificate can be had.

    Args:
        delta: (m, n) matrix, m >= n >= oversampled(rank).
        rank: how many triplets.
        norm: its Frobenius norm, not zero.
    """
    if 1e-12 < norm < 1e12:  # squares and their sums stay within float32
        found = certified_svd(delta, rank, norm, torch.float32)
        if found is not None:
            return Factors(found[0], found[1], found[2].T, norm, rank, TOLERANCE)
    delta = delta.double()
    low = range_svd(delta, rank, norm)
    if low is not None:
        return low
    found = certified_svd(delta, rank, norm, torch.float64)
    return None if found is None else Factors(found[0], found[1], found[2].T, norm, rank, TOLERANCE)


def range_svd(delta: torch.Tensor, rank: int, norm: float) -> Factors | None:
    """The leading triplets of a delta that is all but low-rank, by a randomised range finder (arXiv:0909.4061).

    With V an orthonormal basis and D = A (I - V V^T), A A^T = (A V)(A V)^T + D D^T, so that no approximation of any
    rank keeps more energy than that of A V plus |D|_F^2, which is measured. None where that is no certificate.

    Args:
        delta: (m, n) matrix in float64, n >= oversampled(rank).
        rank: how many triplets.
        norm: its Frobenius norm.
    """
    v = torch.linalg.qr(delta.T @ (delta @ start(delta.shape[1], rank, delta)))[0]
    image = delta @ v
    left, core = torch.linalg.qr(image)
    u, s, vt = torch.linalg.svd(core)
    outside = frobenius(torch.addmm(delta, image, v.T, alpha=-1))
    found = _truncate((u.T @ left.T).T, s, vt @ v.T, norm, rank)
    if found.rank < rank:  # the rest counts as zero, whatever it is made of
        return found if outside < 0.1 * NUMERICAL_RANK * s[0] else None
    missed = float(s[rank:].square().sum()) + outside**2
    if outside**2 > missed * (1 - (1 + TOLERANCE) ** -2):
        return None
    found.excess = TOLERANCE
    return found


def nothing(m: int, n: int, device: torch.device | None = None) -> Factors:
    """The factors of an (m, n) delta that is zero."""
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return Factors(empty.new_zeros(m, 0), empty, empty.new_zeros(0, n), 0.0, 0)


def low_rank_svd(up: torch.Tensor, down: torch.Tensor, rank: int | None = None) -> Factors:
    """The leading singular triplets of `up @ down`, by a basis of each factor; the product is never formed.

    Args:
        up: (m, r) up-projection, any scale folded in.
        down: (r, n) down-projection.
        rank: how many triplets; None for all that are numerically non-zero.
    """
    up, down = up.double(), down.double().T
    (in_up, r_up), (in_down, r_down) = _basis(up), _basis(down)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    core = _truncate(u, s, vt, float(torch.linalg.vector_norm(s)), rank)
    core.u, core.vt = in_up(core.u.T).T, in_down(core.vt)
    return core


def _basis(a: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """`a = q r` with orthonormal columns of q (m, k): what maps c (n, k) to `c q^T`, and r (k, r), float64.

    By the Cholesky factor of the Gram matrix, whose error is the square of a's condition times the rounding, where
    that stays below 1e-9; else by QR, which takes some times as long, but for few columns.
    """
    if a.shape[1] >= 16:
        lower, failed = torch.linalg.cholesky_ex(a.T @ a)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        if not failed and float(torch.linalg.vector_norm(lower) * torch.linalg.vector_norm(inverse)) < CONDITION:
            return lambda c: (c @ inverse) @ a.T, lower.T
    q, r = torch.linalg.qr(a)
    return lambda c: c @ q.T, r


def _truncate(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, norm: float, rank: int | None) -> Factors:
    """What of an exact factorisation is wanted and numerically there; copied, so that the rest can be freed."""
    numerical = int((s > NUMERICAL_RANK * s[0]).sum()) if len(s) and s[0] > 0 else 0
    k = numerical if rank is None else min(rank, numerical)
    if k < len(s):
        u, s, vt = u[:, :k].clone(), s[:k].clone(), vt[:k].clone()
    return Factors(u, s, vt, norm, numerical)
