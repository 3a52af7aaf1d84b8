"""The leading singular triplets of a matrix with a certificate: how far from the best they can be at most.

Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago and Chelikowsky 2006, J. Comput. Phys. 219) on the Gram matrix
H = A^T A finds Ritz values t_1 >= t_2 >= ... and orthonormal Ritz vectors Q. One Cholesky factorisation then proves
the Loewner order

    H <= x I + Q diag(b_i - x) Q^T        with b_i >= x

for bounds b_i just above t_i. Eigenvalues respect that order, so each b_i bounds the i-th eigenvalue of H and no
direction was missed: the best approximation of rank r holds at most the energy b_1 + ... + b_r. The bounds are as
large as the tolerated excess error allows. Nothing is assumed of the spectrum or of the random start; rounding is
allowed for by a shift of H.
"""

from __future__ import annotations

import math

import torch

# Tolerated excess: |A - A_r| <= (1 + TOLERANCE) |A - best A_r| in Frobenius norm.
TOLERANCE = 1e-3

# What rounding may do to H, Q and the Cholesky factors, relative to the largest eigenvalue. In float32, four machine
# epsilons: several times what was measured, and `_certified` compares H with the matrix itself.
ROUNDING = {torch.float32: 4 * 2.0**-23, torch.float64: 2e-13}

# A Cholesky factorisation is tried once coupling / (slack x gap) is below this, as it then mostly succeeds.
TRY = 0.05

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def oversampled(rank: int) -> int:
    """Width of the subspace that is iterated for `rank` directions."""
    return rank + max(16, rank // 2)


def certified_svd(a: torch.Tensor, rank: int, norm: float, dtype: torch.dtype) -> Triplets | None:
    """The leading triplets of a tall matrix, if their excess error can be certified.

    Args:
        a: (m, n) matrix, m >= n >= oversampled(rank).
        rank: how many triplets.
        norm: its Frobenius norm, accurate in float64; not zero.
        dtype: what to compute in: float32, which cannot certify steep spectra, or float64.

    Returns:
        u (m, rank), s (rank,), v (n, rank) in float64, at most `TOLERANCE` worse than the best approximation of this
        rank; or None.
    """
    a = a.to(dtype)
    gram = _gram(a)
    v = torch.linalg.qr(gram @ (gram @ start(len(gram), rank, a) / norm**2))[0]
    products = max(24, len(gram) // 6)  # with more of them, the exact factorisation is cheaper
    while products > 0:
        image = gram @ v
        values, turn = _descending(v.T @ image)
        v, image = v @ turn, image @ turn
        coupling = (image - v * values)[:, :rank].double().square().sum(0)
        bounds = _bounds(values[:rank].double(), coupling, norm, _rounding(values, norm, len(gram)))
        if bounds is None:
            return None
        # By the Schur complement, what lies outside the span can raise the bounds by about coupling / gap.
        slack = float((bounds - values[:rank]).sum())
        if float(coupling.sum()) < TRY * slack * (float(bounds[-1]) - float(values[-1])):
            triplets = _triplets(a, v[:, :rank])
            if _certified(gram, triplets, coupling, norm):
                return triplets
        if not float(values[-1]) > torch.finfo(dtype).eps * float(values[0]):
            return None  # all but low-rank: the filter would divide by what rounding left, and overflow
        degree = _degree(values)
        products -= degree + 2
        v = torch.linalg.qr(_filter(gram, v, image, float(values[-1]), degree))[0]
    return None


def start(n: int, rank: int, like: torch.Tensor) -> torch.Tensor:
    """A Gaussian start, the same in every run and on every device; the global generators are left alone."""
    return torch.randn(n, oversampled(rank), generator=torch.Generator().manual_seed(0)).to(like)


def _gram(a: torch.Tensor) -> torch.Tensor:
    """`a.T @ a`, computing little more than one triangle."""
    n = a.shape[1]
    gram, step = a.new_empty(n, n), max(128, -(-n // 4))
    for i in range(0, n, step):
        torch.mm(a[:, i : i + step].T, a[:, i:], out=gram[i : i + step, i:])
        gram[i + step :, i : i + step] = gram[i : i + step, i + step :].T
    return gram


def _descending(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of a small symmetric matrix, largest first, in its dtype."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.flip(0).to(matrix), vectors.flip(1).to(matrix)


def _degree(values: torch.Tensor) -> int:
    """The degree that the dtype bears: the last column must survive the growth of the first direction."""
    growth = math.acosh(max(2 * float(values[0] / values[-1]) - 1, 1 + 1e-9))
    return min(max(int(math.log(0.5 / torch.finfo(values.dtype).eps) / growth), 2), 10)


def _filter(gram: torch.Tensor, v: torch.Tensor, image: torch.Tensor, cut: float, degree: int) -> torch.Tensor:
    """`H T(H)` applied to the Ritz vectors `v`, which are overwritten.

    T is the Chebyshev polynomial that is bounded by 1 on [0, cut]. The factor H damps what is far below a plateau
    that reaches past the subspace, where T does not.
    """
    before, now = v, image.mul(2 / cut).sub_(v)
    for _ in range(degree - 1):
        before, now = now, before.add_(now, alpha=2).addmm_(gram, now, beta=-1, alpha=4 / cut)
    return gram @ (now / torch.linalg.vector_norm(now, dim=0))


def _bounds(values: torch.Tensor, coupling: torch.Tensor, norm: float, rounding: float) -> torch.Tensor | None:
    """Bounds on the leading eigenvalues, as high as the tolerance lets them be; None where it lets nothing.

    Half of the tolerated energy raises the smallest values to one level. The other half is slack: for rounding, a
    quarter of the rest for all alike, and three quarters where `coupling`, the squared residuals of the Ritz vectors,
    needs them.
    """
    missed = norm**2 - float(values.sum())
    tolerated = missed * (1 - (1 + TOLERANCE) ** -2)
    slack = tolerated / 2 - rounding * len(values)
    if slack <= 0 or values[-1] <= 1e-8 * values[0]:
        return None
    count = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    levels = (tolerated / 2 + values.flip(0).cumsum(0)) / count  # of the j smallest; what would overflow is not least
    share = 0.25 / len(values) + 0.75 * coupling / coupling.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return values.clamp_min(float(levels.min())) + rounding + slack * share


def _rounding(values: torch.Tensor, norm: float, n: int) -> float:
    """The shift for rounding: the largest eigenvalue's, and what n rows of a flat spectrum add up to."""
    return ROUNDING[values.dtype] * (float(values[0]) + norm**2 / n**0.5 / 8)


def _triplets(a: torch.Tensor, v: torch.Tensor) -> Triplets:
    """The triplets of `a` restricted to the span of `v`."""
    v = torch.linalg.qr(v.double())[0]
    image = (v.T.to(a) @ a.T).double()
    values, turn = _descending(image @ image.T)
    s = values.sqrt()
    return ((turn / s).T @ image).T, s, (turn.T @ v.T).T


def _certified(gram: torch.Tensor, triplets: Triplets, coupling: torch.Tensor, norm: float) -> bool:
    """Whether the Loewner order of the module's head holds for these triplets."""
    _, s, v = triplets
    values, q = s.square(), v.to(gram)
    rounding = _rounding(values.to(gram), norm, len(gram))
    bounds = _bounds(values, coupling, norm, rounding)
    # A Gram matrix of low precision (TF32, say) shows here.
    if bounds is None or ((q * (gram @ q)).sum(0).double() - values).abs().max() > rounding:
        return False
    others = bounds.min()
    order = torch.addmm(gram, q * (bounds - others).to(gram), q.T, beta=-1)
    order.diagonal().add_(float(others) - rounding)
    return not torch.linalg.cholesky_ex(order).info
