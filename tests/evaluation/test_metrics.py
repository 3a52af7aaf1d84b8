"""Metrics equal values computed by hand."""

import numpy as np
import pytest

from coterie.evaluation.metrics import accuracies, bootstrap, normalised, recovered_gap


def rows(*shares: float, n: int = 10) -> list[np.ndarray]:
    return [np.arange(n) < round(share * n) for share in shares]


BASE, EXPERT, METHOD = rows(0.2, 0.4), rows(0.8, 1.0), rows(0.4, 0.9)


def test_values() -> None:
    assert accuracies(METHOD).tolist() == [0.4, 0.9]
    assert normalised(METHOD, EXPERT) == pytest.approx((0.5 + 0.9) / 2)
    assert recovered_gap(METHOD, BASE, EXPERT) == pytest.approx((0.2 + 0.5) / (0.6 + 0.6))


def test_base_and_expert_are_the_ends() -> None:
    assert recovered_gap(BASE, BASE, EXPERT) == 0
    assert normalised(EXPERT, EXPERT) == recovered_gap(EXPERT, BASE, EXPERT) == 1


def test_bootstrap_equals_resampling_row_by_row() -> None:
    rng = np.random.default_rng(1)
    base, expert, method = ([rng.random(n) < p for n in (40, 60, 50)] for p in (0.3, 0.9, 0.7))
    naive = []
    for _ in range(3000):
        chosen = rng.integers(3, size=3)
        index = [rng.integers(len(base[t]), size=len(base[t])) for t in chosen]
        b, e, m = ([each[t][i] for t, i in zip(chosen, index, strict=True)] for each in (base, expert, method))
        naive.append((normalised(m, e), recovered_gap(m, b, e)))
    for k, interval in enumerate(bootstrap(method, base, expert).values()):
        low, high = np.percentile([draw[k] for draw in naive], [2.5, 97.5])
        assert interval.low == pytest.approx(low, abs=0.02)
        assert interval.high == pytest.approx(high, abs=0.02)
        assert interval.low < interval.value < interval.high


def test_bootstrap_is_paired() -> None:
    interval = bootstrap(EXPERT, BASE, EXPERT)["recovered_gap"]
    assert (interval.low, interval.value, interval.high) == (1, 1, 1)
