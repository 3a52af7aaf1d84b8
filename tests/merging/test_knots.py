"""KnOTS with TIES on each matrix equals its formula, on matrices and in factor space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.merging.knots import knots, knots_lora, ties_per_matrix
from coterie.sources.delta import LowRank


def naive_ties(deltas: np.ndarray, density: float) -> np.ndarray:
    """Trim each delta to its largest entries, elect signs by the sum, average what agrees; entry by entry."""
    flat = deltas.reshape(len(deltas), -1)
    keep = max(1, int(density * flat.shape[1]))
    trimmed = np.zeros_like(flat)
    for row, delta in zip(trimmed, flat, strict=True):
        top = np.argsort(-np.abs(delta))[:keep]
        row[top] = delta[top]
    merged = np.zeros(flat.shape[1])
    for p in range(flat.shape[1]):
        sign = np.sign(trimmed[:, p].sum())
        agree = [x for x in trimmed[:, p] if sign and np.sign(x) == sign]
        merged[p] = np.mean(agree) if agree else 0
    return merged.reshape(deltas.shape[1:])


def naive(deltas: np.ndarray, density: float, scale: float) -> np.ndarray:
    """The paper's steps, matrix by matrix: SVD of the concatenation, blocks of V, TIES on S V_i^T, back through U."""
    deltas = deltas.astype(np.float64)
    u, s, vt = np.linalg.svd(np.hstack(list(deltas)), full_matrices=False)
    u, s, vt = u[:, s > 1e-5], s[s > 1e-5], vt[s > 1e-5]
    blocks = np.stack([np.diag(s) @ block for block in np.split(vt, len(deltas), axis=1)])
    return scale * u @ naive_ties(blocks, density)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapters(ranks: list[int | None], m: int = 12, n: int = 9, seed: int = 0) -> list[LowRank | None]:
    draw = enumerate(ranks)
    return [
        r and LowRank(noise(m, r, seed=seed + i).double(), noise(r, n, seed=seed + 99 + i).double()) for i, r in draw
    ]


def stack(factors: list[LowRank | None], m: int = 12, n: int = 9) -> torch.Tensor:
    return torch.stack([f.dense() if f else torch.zeros(m, n) for f in factors])


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(2, 8, 11), (3, 11, 8), (1, 6, 6), (4, 30, 5)])
def test_equals_the_papers_steps_trimmed_per_matrix(shape, density):
    """The authors trim an expert's S V_i^T of all matrices together; `knots`, as here, trims that of each by itself."""
    deltas = noise(*shape)
    before = deltas.clone()
    merged = knots(deltas, density=density)
    assert merged.dtype == torch.float32
    np.testing.assert_allclose(merged, naive(deltas.numpy(), density, 0.6), atol=1e-5)
    assert deltas.equal(before)


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("ranks", [[3], [2, 2], [1, None, 4, 2], [8, 8]])
def test_in_factor_space_equals_the_papers_steps_trimmed_per_matrix(ranks, density):
    factors = adapters(ranks)
    merged = knots_lora(factors, density=density, scale=0.9)
    deltas = torch.stack([f.dense() for f in factors if f])
    np.testing.assert_allclose(merged.dense(), naive(deltas.numpy(), density, 0.9), atol=1e-4)
    assert merged.up.shape[1] == merged.down.shape[0] == min(12, sum(r or 0 for r in ranks))


def test_the_sum_is_the_sum():
    """Nothing is lost on the way into the common basis and back."""
    deltas = noise(3, 8, 11)
    torch.testing.assert_close(knots(deltas, merge="sum", scale=1.0), deltas.sum(0), atol=1e-5, rtol=1e-5)
    factors = adapters([2, 3])
    merged = knots_lora(factors, merge="sum", scale=1.0)
    torch.testing.assert_close(merged.dense(), stack(factors).sum(0), atol=1e-5, rtol=1e-5)


def test_one_and_identical_experts():
    delta = noise(8, 6)
    for experts in (1, 3):
        same = delta.expand(experts, -1, -1)
        torch.testing.assert_close(knots(same, density=1.0, scale=1.0), delta, atol=1e-5, rtol=1e-5)
    (one,) = adapters([3])
    torch.testing.assert_close(
        knots_lora([one, one], density=1.0, scale=1.0).dense(), one.dense(), atol=1e-5, rtol=1e-5
    )


def test_zero_deltas():
    deltas = noise(2, 8, 6)
    with_zero = torch.cat([deltas[:1], torch.zeros(1, 8, 6), deltas[1:]])
    torch.testing.assert_close(knots(with_zero), knots(deltas), atol=1e-5, rtol=1e-5)
    assert knots(torch.zeros(2, 4, 3)).equal(torch.zeros(4, 3))
    silent = LowRank(torch.zeros(12, 2).double(), noise(2, 9).double())
    assert knots_lora([silent, silent]).dense().equal(torch.zeros(12, 9))
    (one,) = adapters([3])
    torch.testing.assert_close(knots_lora([silent, one]).dense(), knots_lora([one]).dense())


@given(st.integers(1, 4), st.integers(2, 10), st.integers(2, 10), st.floats(1e-3, 1e3), st.integers(0, 2**20))
def test_order_and_scale(experts, m, n, factor, seed):
    deltas = noise(experts, m, n, seed=seed)
    merged = knots(deltas, density=1.0)
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(knots(deltas.flip(0), density=1.0), merged, **tolerance)
    torch.testing.assert_close(knots(deltas * factor, density=1.0) / factor, merged, **tolerance)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 1), st.integers(0, 2**20))
def test_ties_of_a_matrix(experts, m, n, density, seed):
    deltas = noise(experts, m, n, seed=seed)
    np.testing.assert_allclose(ties_per_matrix(deltas, density), naive_ties(deltas.numpy(), density), atol=1e-6)
