"""Truncated factorisations: never further from the best than they say, and exact where they must be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.experts import factorise as module
from coterie.experts import subspace
from coterie.experts.factorise import factorise, frobenius, iterated_svd, low_rank_svd, range_svd, thin_svd
from coterie.experts.fit import TruncatedSVD
from coterie.experts.subspace import TOLERANCE, certified_svd
from coterie.sources.delta import Dense, LowRank

N = 256  # the narrowest width at which `thin_svd` iterates


def spectrum(name: str, n: int) -> torch.Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    one = torch.ones_like(i)
    return {
        "i^-0.5": i**-0.5,
        "i^-1": i**-1,
        "i^-2": i**-2,
        "i^-3": i**-3,
        "geometric": 0.8**i,
        "low rank + noise": torch.where(i <= 8, 10 * 0.9**i, 0.3 * (1 - 0.9 * i / n)),
        "plateau at the cut": torch.where(i <= 40, one, 0.2 * one),
        "flat": one,
        "cluster at the cut": torch.where(i <= 5, 5 * one, torch.where(i <= 30, 1 - 1e-4 * i, 0.9 * one)),
        "dominated": torch.where(i <= 1, 1e4 * one, i**-0.5),
    }[name]


SPECTRA = ["i^-0.5", "i^-1", "i^-2", "i^-3", "geometric", "low rank + noise", "plateau at the cut", "flat",
           "cluster at the cut", "dominated"]  # fmt: skip


def basis(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def matrix(m: int, n: int, s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """An (m, n) float32 matrix with these singular values."""
    return ((basis(m, len(s), seed) * s) @ basis(n, len(s), seed + 1).T).float()


def noise(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def excess(delta: torch.Tensor, u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor) -> float:
    """How far a truncated factorisation is above the best of its rank, relative; everything in float64."""
    delta = delta.double()
    best = float(torch.linalg.svdvals(delta)[len(s) :].square().sum().sqrt())
    return float(torch.linalg.matrix_norm(delta - (u * s) @ vt)) / best - 1


def assert_orthonormal(columns: torch.Tensor, tolerance: float = 1e-6) -> None:
    eye = torch.eye(columns.shape[1], dtype=torch.float64)
    assert (columns.T @ columns - eye).abs().max() < tolerance


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("m", "n", "rank"), [(96, 96, 4), (300, 128, 8), (256, 256, 16)])
def test_what_is_certified_is_within_the_tolerance(name, m, n, rank):
    delta = matrix(m, n, spectrum(name, n))
    found = iterated_svd(delta, rank, frobenius(delta))
    if found is None:
        assert name in ("i^-3", "dominated")  # too steep for Gram matrices
        return
    assert excess(delta, found.u, found.s, found.vt) <= TOLERANCE
    assert found.excess == TOLERANCE
    assert_orthonormal(found.u)
    assert_orthonormal(found.vt.T)
    assert (found.s.diff() <= 0).all()


@given(
    n=st.integers(64, 160),
    extra=st.integers(0, 100),
    rank=st.integers(1, 24),
    levels=st.lists(st.floats(0.01, 1), min_size=2, max_size=12),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40)
def test_a_certificate_holds_for_any_spectrum(n, extra, rank, levels, seed):
    """Stairs of any heights and numbers, so that cuts fall on gaps, slopes and plateaus alike."""
    stairs = torch.tensor(levels, dtype=torch.float64).sort(descending=True).values
    s = stairs.repeat_interleave(-(-n // len(stairs)))[:n]
    delta = matrix(n + extra, n, s, seed)
    for dtype in (torch.float32, torch.float64):
        found = certified_svd(delta, rank, frobenius(delta), dtype)
        if found is not None:
            assert excess(delta, found[0], found[1], found[2].T) <= TOLERANCE


@pytest.mark.parametrize("shape", [(N, N), (N, 400), (400, N)])
@pytest.mark.parametrize("name", [*SPECTRA, "noise", "bfloat16"])
def test_thin_svd_is_within_the_tolerance(name, shape):
    if name in ("noise", "bfloat16"):
        delta = noise(*shape)
        delta = delta.bfloat16() if name == "bfloat16" else delta
    else:
        delta = matrix(*shape, spectrum(name, N))
    found = thin_svd(delta, 16)
    assert len(found.s) == 16
    assert excess(delta, found.u, found.s, found.vt) <= max(found.excess, 1e-6)
    left = torch.linalg.matrix_norm(delta.double() - (found.u * found.s) @ found.vt)
    assert found.residual == pytest.approx(float(left / torch.linalg.matrix_norm(delta.double())), rel=1e-4)


def test_where_no_certificate_can_be_had_the_exact_factorisation_takes_over(monkeypatch):
    """i^-3 at rank 32 is too steep for Gram matrices and too slow for the range finder."""
    delta = matrix(N, N, spectrum("i^-3", N))
    calls = []
    exact = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **k: calls.append(tuple(a.shape)) or exact(a, **k))
    found = thin_svd(delta, 32)
    assert (N, N) in calls
    assert found.excess == 0
    torch.testing.assert_close(found.s, torch.linalg.svdvals(delta.double())[:32], rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", [0, 11, 12])
def test_what_a_merged_adapter_left_is_factorised(seed):
    """All but low-rank: the iteration's smallest value is rounding, by which its filter must not divide."""
    values = [
        1.22,
        0.194,
        0.124,
        0.081,
        0.078,
        0.069,
        0.068,
        0.053,
        0.049,
        0.042,
        0.039,
        0.037,
        0.029,
        0.027,
        0.025,
        0.02,
    ]
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(384, 384, generator=generator) * 0.05
    u, v = (torch.linalg.qr(torch.randn(384, 16, generator=generator))[0] for _ in range(2))
    delta = (base + (u * torch.tensor(values)) @ v.T) - base
    found = thin_svd(delta, 8)
    missed = torch.linalg.vector_norm(delta.double() - (found.u * found.s) @ found.vt)
    assert missed <= (1 + TOLERANCE) * torch.linalg.svdvals(delta.double())[8:].norm()


def test_a_missed_direction_is_never_certified():
    """Whatever the triplets are short of: the first direction, the last, or one of them by an angle."""
    delta = matrix(200, 128, spectrum("i^-0.5", 128)).double()
    norm, gram = frobenius(delta), delta.T @ delta
    vt = torch.linalg.svd(delta, full_matrices=False)[2]

    def certified(keep):
        v = vt[keep].T
        coupling = torch.zeros(len(keep), dtype=torch.float64)
        return subspace._certified(gram, subspace._triplets(delta, v), coupling, norm)

    assert certified(list(range(16)))
    assert not certified(list(range(1, 17)))
    assert not certified([*range(15), 40])
    turned = vt.clone()
    turned[3] = 0.9 * vt[3] + 0.19**0.5 * vt[100]
    vt = turned
    assert not certified(list(range(16)))


def test_a_start_that_misses_the_largest_direction_is_found_out(monkeypatch):
    delta = matrix(160, 128, spectrum("low rank + noise", 128))
    top = torch.linalg.svd(delta.double())[2][0]

    def blind(n, rank, like):
        omega = noise(n, subspace.oversampled(rank)).double()
        return (omega - top[:, None] * (top @ omega)).to(like)

    monkeypatch.setattr(subspace, "start", blind)
    monkeypatch.setattr(torch.linalg, "qr", lambda a, qr=torch.linalg.qr: _without(qr(a), top))
    for dtype in (torch.float32, torch.float64):
        assert certified_svd(delta, 8, frobenius(delta), dtype) is None


def _without(factors, top):
    q, r = factors
    return (q - top[:, None].to(q) * (top.to(q) @ q), r) if len(q) == len(top) else factors


def test_a_gram_matrix_of_low_precision_is_found_out(monkeypatch):
    """As GPUs compute it in TF32, or CPUs in bfloat16, where a program asks for that."""
    delta = noise(160, 128)
    gram = subspace._gram
    assert certified_svd(delta, 8, frobenius(delta), torch.float32) is not None
    monkeypatch.setattr(subspace, "_gram", lambda a: gram(a.bfloat16().to(a)))
    assert certified_svd(delta, 8, frobenius(delta), torch.float32) is None


@pytest.mark.parametrize("rank", [16, 32])
def test_with_a_gap_the_directions_are_the_exact_ones(rank):
    s = torch.cat([torch.linspace(10, 6, 16), torch.linspace(4, 3, 16), torch.linspace(1, 0.5, N - 32)]).double()
    delta = matrix(400, N, s)
    found = thin_svd(delta, rank)
    assert found.excess == TOLERANCE  # not by the exact way
    torch.testing.assert_close(found.s, s[:rank], rtol=1e-4, atol=0)
    vt = torch.linalg.svd(delta.double(), full_matrices=False)[2]
    overlap = float((found.vt[:16] @ vt[:16].T).square().sum()) / 16  # gates read the first 16
    assert overlap > 1 - (1e-4 if rank == 16 else 1e-6)


def test_the_same_input_gives_the_same_bits_and_global_generators_are_left_alone():
    delta = noise(300, N)
    state = torch.get_rng_state()
    first = thin_svd(delta, 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = thin_svd(delta.clone(), 16)
    assert first.excess == TOLERANCE
    assert all(torch.equal(getattr(first, part), getattr(second, part)) for part in ("u", "s", "vt"))


def test_a_wide_delta_is_a_tall_one_transposed():
    delta = noise(300, N)
    tall, wide = thin_svd(delta, 16), thin_svd(delta.T.contiguous(), 16)
    torch.testing.assert_close(wide.s, tall.s, rtol=1e-5, atol=0)
    torch.testing.assert_close((wide.u * wide.s) @ wide.vt, ((tall.u * tall.s) @ tall.vt).T, rtol=0, atol=1e-4)
    assert (wide.norm, wide.excess) == pytest.approx((tall.norm, tall.excess))


@pytest.mark.parametrize("n", [64, N])
@pytest.mark.parametrize("true", [1, 4, 12])
def test_the_numerical_rank_of_a_dense_delta(n, true):
    delta = (noise(n + 10, true) @ noise(true, n)) / n
    for asked in (8, 16, None):
        found = thin_svd(delta, asked)
        kept = true if asked is None else min(asked, true)
        assert len(found.s) == kept
        assert found.rank == true or (asked == kept < true and found.rank >= kept)
        if kept == true:
            assert found.residual < 1e-5
            torch.testing.assert_close((found.u * found.s) @ found.vt, delta.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (N, N), (N, 300)])
@pytest.mark.parametrize("rank", [8, None])
def test_a_delta_of_zero_has_no_directions(shape, rank):
    found = thin_svd(torch.zeros(shape), rank)
    assert (found.rank, found.norm, found.residual) == (0, 0.0, 0.0)
    assert (found.u.shape, found.s.shape, found.vt.shape) == ((shape[0], 0), (0,), (0, shape[1]))


@pytest.mark.parametrize("rank", [None, N - 1, N // 2])
def test_many_directions_are_exact(rank):
    delta = noise(N + 20, N)
    found = thin_svd(delta, rank)
    assert found.excess == 0
    s = torch.linalg.svdvals(delta.double())
    torch.testing.assert_close(found.s, s[: rank or N], rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_scale_changes_nothing_but_the_scale(scale):
    delta = noise(N, N).double()
    found, plain = thin_svd(delta * scale, 16), thin_svd(delta, 16)
    assert excess(delta * scale, found.u, found.s, found.vt) <= TOLERANCE
    torch.testing.assert_close(found.s / scale, plain.s, rtol=1e-3, atol=0)
    assert found.residual == pytest.approx(plain.residual, rel=TOLERANCE)


def test_the_range_finder_refuses_what_it_does_not_hold():
    delta = matrix(200, 128, spectrum("i^-0.5", 128)).double()
    assert range_svd(delta, 8, frobenius(delta)) is None
    delta = matrix(200, 128, spectrum("geometric", 128)).double()
    found = range_svd(delta, 32, frobenius(delta))
    assert found is not None
    assert excess(delta, found.u, found.s, found.vt) <= TOLERANCE


@pytest.mark.parametrize("rank", [3, 8, None])
def test_factors_are_factorised_as_their_product_is(rank):
    up, down = noise(90, 8).double(), noise(8, 70, 1).double()
    found, dense = low_rank_svd(up, down, rank), thin_svd(up @ down, rank)
    torch.testing.assert_close(found.s, dense.s)
    torch.testing.assert_close((found.u * found.s) @ found.vt, (dense.u * dense.s) @ dense.vt, rtol=0, atol=1e-9)
    assert found.norm == pytest.approx(dense.norm)
    assert found.rank == 8


@pytest.mark.parametrize("columns", [8, 24, 80])  # 80: more than a side
@pytest.mark.parametrize("condition", [1, 1e5, math.inf])
def test_factors_of_any_condition(columns, condition):
    scales = torch.logspace(0, -math.log10(condition) if condition < math.inf else -1, columns).double()
    scales[-1] *= condition < math.inf
    turn = torch.linalg.qr(noise(columns, columns, 2).double())[0]
    up, down = noise(90, columns).double() * scales @ turn, turn.T @ noise(columns, 70, 1).double()
    found, exact = low_rank_svd(up, down), torch.linalg.svdvals(up @ down)
    assert found.rank == min(columns - (condition == math.inf and columns < 70), 70)
    torch.testing.assert_close(found.s, exact[: found.rank], rtol=1e-8, atol=0)
    for rows in (found.u.T, found.vt):
        torch.testing.assert_close(rows @ rows.T, torch.eye(found.rank).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close((found.u * found.s) @ found.vt, up @ down, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(3, 5), (700, 900)])
def test_frobenius(shape):
    a = noise(*shape)
    exact = float(torch.linalg.matrix_norm(a.double()))
    assert frobenius(a) == pytest.approx(exact, rel=1e-12)
    assert frobenius(a.T) == pytest.approx(exact, rel=1e-12)


def test_a_layer_reports_what_is_certified():
    weight = noise(N, N, 9)
    deltas = [Dense(noise(N, N, 1)), None, LowRank(noise(N, 20), noise(20, N))]
    fitted = TruncatedSVD(16, 8).fit("layer", weight, deltas, [None] * 3, [1.0, 1.0, 2.0])
    assert fitted.report.excess == [TOLERANCE, None, 0.0]
    assert fitted.report.residuals[0] == factorise(deltas[0], 16).residual
    exact = TruncatedSVD("dense", 8).fit("layer", weight, deltas, [None] * 3, [1.0, 1.0, 2.0])
    assert exact.report.excess == [0.0, None, 0.0]


def test_narrow_matrices_are_exact():
    delta = noise(module.ITERATED - 1, module.ITERATED - 1)
    assert thin_svd(delta, 16).excess == 0
