"""How much of the experts' skill a single model keeps, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Correct = Sequence[np.ndarray]
"""One (N_t,) bool array for each task t: whether a row was answered correctly."""


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it."""

    value: float
    low: float
    high: float


def accuracies(correct: Correct) -> np.ndarray:
    """(T,) share of correct rows of each task."""
    return np.array([rows.mean() for rows in correct])


def normalised(method: Correct, expert: Correct) -> float:
    """mean_t(acc_method / acc_expert): 1 where one model does every task as well as that task's expert."""
    return float(np.mean(accuracies(method) / accuracies(expert)))


def recovered_gap(method: Correct, base: Correct, expert: Correct) -> float:
    """sum_t(acc_method - acc_base) / sum_t(acc_expert - acc_base): 0 for the base, 1 for the experts."""
    low = accuracies(base)
    return float((accuracies(method) - low).sum() / (accuracies(expert) - low).sum())


def bootstrap(
    method: Correct, base: Correct, expert: Correct, samples: int = 4000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Percentile intervals of `normalised` and `recovered_gap`, resampling tasks and, within each, rows.

    The three models keep their answers to a drawn row together (a paired bootstrap): a row is one of eight patterns of
    right and wrong, so drawing N_t rows is one multinomial draw over the patterns. Samples in which the experts gain
    nothing have no value and are left out; only a handful of rows can lead to one.

    Args:
        method, base, expert: answers to the same rows.
        samples: bootstrap samples.
        level: coverage.
        seed: of the resampling.
    """
    triples = [np.stack(rows).astype(np.int64) for rows in zip(method, base, expert, strict=True)]
    shares = np.stack([np.bincount(np.array([4, 2, 1]) @ t, minlength=8) / t.shape[1] for t in triples])
    sizes = np.array([t.shape[1] for t in triples])
    rng = np.random.default_rng(seed)
    tasks = rng.integers(len(triples), size=(samples, len(triples)))
    drawn = rng.multinomial(sizes[tasks], shares[tasks]) / sizes[tasks][..., None]
    patterns = np.arange(8)
    acc_method, acc_base, acc_expert = (drawn @ ((patterns >> bit) & 1) for bit in (2, 1, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = {
            "normalised": (acc_method / acc_expert).mean(1),
            "recovered_gap": (acc_method - acc_base).sum(1) / (acc_expert - acc_base).sum(1),
        }
    values = {"normalised": normalised(method, expert), "recovered_gap": recovered_gap(method, base, expert)}
    tail = 50 * (1 - level)
    return {
        name: Interval(values[name], *(float(q) for q in np.percentile(each[np.isfinite(each)], [tail, 100 - tail])))
        for name, each in draws.items()
    }
