"""Metrics equal values computed by hand."""

import numpy as np
import pytest

from coterie.evaluation.metrics import bootstrap, normalised, recovered_gap, skills


def rows(*shares: float, n: int = 10) -> list[np.ndarray]:
    return [np.arange(n) < round(share * n) for share in shares]


BASE, EXPERT, METHOD = rows(0.2, 0.4), rows(0.8, 1.0), rows(0.4, 0.9)


def test_values() -> None:
    assert skills(METHOD).tolist() == [0.4, 0.9]
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


def test_perplexity_by_hand_and_resampled_row_by_row() -> None:
    rng = np.random.default_rng(2)
    base, expert, method = ([rng.gamma(3, scale, n) for n in (30, 50)] for scale in (1.0, 0.4, 0.7))
    names = ["perplexity"] * 2

    def skill(rows: np.ndarray) -> float:
        return float(1 / np.exp(rows.mean()))

    assert skills(method, names) == pytest.approx([skill(rows) for rows in method])
    naive = []
    for _ in range(3000):
        chosen = rng.integers(2, size=2)
        index = [rng.integers(len(base[t]), size=len(base[t])) for t in chosen]
        b, e, m = (
            np.array([skill(s[t][i]) for t, i in zip(chosen, index, strict=True)]) for s in (base, expert, method)
        )
        naive.append(((m / e).mean(), (m - b).sum() / (e - b).sum()))
    for k, interval in enumerate(bootstrap(method, base, expert, names).values()):
        low, high = np.percentile([draw[k] for draw in naive], [2.5, 97.5])
        assert interval.low == pytest.approx(low, rel=0.05)
        assert interval.high == pytest.approx(high, rel=0.05)


def test_experts_that_gain_nothing_have_no_gap() -> None:
    assert np.isnan(bootstrap(BASE, BASE, BASE)["recovered_gap"].value)
    lost = bootstrap(METHOD, EXPERT, BASE)["recovered_gap"]  # worse than the base: a loss is no recovery
    assert np.isnan([lost.value, lost.low, lost.high]).all()
    # Resampled, some gaps are nothing but for rounding, and some are gains: there is no interval around no value.
    little = bootstrap(METHOD, rows(0.5, 0.5), rows(0.55, 0.4))["recovered_gap"]
    assert np.isnan([little.value, little.low, little.high]).all()
