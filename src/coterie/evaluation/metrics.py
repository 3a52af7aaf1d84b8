"""What rows' scores amount to, and how much of the experts' skill a single model keeps, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Sequence[np.ndarray]
"""One (N_t,) array for each task t: its rows' scores, as a `Reader` gives them."""


@dataclass(frozen=True)
class Metric:
    """How a task's row scores are read.

    Skill is what is compared: larger is better, and zero is none at all.

    Args:
        rows: what one row's score is, in words.
        spread: (..., N) scores -> (..., N, K) float64, whose mean over rows determines the skill.
        skill: (..., K) means -> (...) skill.
        shown: skill -> the number that tables show.
        percent: whether tables show it in percent.
    """

    rows: str
    spread: Callable[[np.ndarray], np.ndarray]
    skill: Callable[[np.ndarray], np.ndarray]
    shown: Callable[[float], float] = lambda skill: skill
    percent: bool = True


def _columns(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scores, dtype=np.float64)[..., None]


def _confusion(cells: np.ndarray) -> np.ndarray:
    """(..., N) cell numbers of a confusion matrix -> (..., N, MOST_CLASSES**2) one-hot; NaN where a cell is NaN."""
    hits = (cells[..., None] == np.arange(MOST_CLASSES**2)).astype(np.float64)
    return np.where(np.isnan(cells)[..., None], np.nan, hits)


def _macro_f1(confusion: np.ndarray) -> np.ndarray:
    square = confusion.reshape(*confusion.shape[:-1], MOST_CLASSES, MOST_CLASSES)
    hits = np.diagonal(square, axis1=-2, axis2=-1)
    either = square.sum(-1) + square.sum(-2)  # rows of a class, and rows that were given it
    seen = either > 0  # not where it is NaN
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(seen, 2 * hits / either, 0.0).sum(-1) / seen.sum(-1)
    return mean


MOST_CLASSES = 32
"""Of a task that is read by F1."""
ROUNDING = 1e-12
"""What is left of a gap of nothing."""

METRICS = {
    "accuracy": Metric("1 where the answer is right, else 0", _columns, lambda mean: mean[..., 0]),
    "exact_match": Metric("1 where the generated text is the wanted one, else 0", _columns, lambda mean: mean[..., 0]),
    "f1": Metric("the row's cell in the confusion matrix, target * MOST_CLASSES + answer", _confusion, _macro_f1),
    "perplexity": Metric(
        "negative log-likelihood per token, nats; skill is its inverse, the geometric mean probability of a token",
        _columns, lambda mean: np.exp(-mean[..., 0]), lambda skill: float(1 / skill), percent=False,
    ),
}  # fmt: skip


def class_scores(logits: np.ndarray, targets: np.ndarray, metric: str = "accuracy") -> np.ndarray:
    """(N,) float64 scores of a classification by "accuracy" or "f1"; NaN where a logit is no number.

    Args:
        logits: (N, C).
        targets: (N,) the right classes.
        metric: the task's.
    """
    answers = logits.argmax(1)
    scores = (targets * MOST_CLASSES + answers if metric == "f1" else answers == targets).astype(np.float64)
    return np.where(np.isfinite(logits).all(1), scores, np.nan)


def skills(scores: Scores, metrics: Sequence[str] | None = None) -> np.ndarray:
    """(T,) the skill on each task: accuracy, macro F1, or one over the perplexity.

    Args:
        scores: of every task.
        metrics: the tasks'; default: accuracy everywhere.
    """
    known = [METRICS[name] for name in metrics or ["accuracy"] * len(scores)]
    return np.array([metric.skill(metric.spread(rows).mean(0)) for metric, rows in zip(known, scores, strict=True)])


def normalised_skill(method: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """(...) mean over tasks of skill_method / skill_expert, from (..., T) skills."""
    return (method / expert).mean(-1)


def recovered(method: np.ndarray, base: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """(...) sum_t(skill_method - skill_base) / sum_t(skill_expert - skill_base), from (..., T) skills; NaN where the
    experts gain nothing: what is worse than the base would recover more than what is better."""
    gap = (expert - base).sum(-1)
    share: np.ndarray = np.where(gap > ROUNDING, (method - base).sum(-1) / gap, np.nan)
    return share


def normalised(method: Scores, expert: Scores, metrics: Sequence[str] | None = None) -> float:
    """`normalised_skill` of scores: 1 where one model does every task as well as that task's expert."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(normalised_skill(skills(method, metrics), skills(expert, metrics)))


def recovered_gap(method: Scores, base: Scores, expert: Scores, metrics: Sequence[str] | None = None) -> float:
    """`recovered` of scores: 0 for the base, 1 for the experts; NaN where the experts gain nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(recovered(skills(method, metrics), skills(base, metrics), skills(expert, metrics)))


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it."""

    value: float
    low: float
    high: float


def bootstrap(
    method: Scores,
    base: Scores,
    expert: Scores,
    metrics: Sequence[str] | None = None,
    samples: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of `normalised` and `recovered_gap`, resampling tasks and, within each, rows.

    The three models keep their scores of a drawn row together (a paired bootstrap): a row is one of a task's patterns
    of three scores (eight, where scores are right and wrong), so drawing N_t rows is one multinomial draw over the
    patterns. Samples in which the experts gain nothing have no value and are left out.

    Args:
        method, base, expert: scores of the same rows.
        metrics: the tasks'; default: accuracy everywhere.
        samples: bootstrap samples.
        level: coverage.
        seed: of the resampling.
    """
    names = list(metrics or ["accuracy"] * len(base))
    patterns, counts = zip(*(_patterns(np.stack(rows)) for rows in zip(method, base, expert, strict=True)), strict=True)
    shares = np.zeros((len(names), max(map(len, counts))))
    for task, each in enumerate(counts):
        shares[task, : len(each)] = each / each.sum()
    sizes = np.array([each.sum() for each in counts])
    rng = np.random.default_rng(seed)
    tasks = rng.integers(len(names), size=(samples, len(names)))
    skill = np.empty((3, *tasks.shape))
    step = max(1, 2**23 // shares.size)  # samples at a time: 64 MB of counts
    for start in range(0, samples, step):
        block = tasks[start : start + step]
        drawn = rng.multinomial(sizes[block], shares[block]) / sizes[block][..., None]
        for task, name in enumerate(names):
            spread = METRICS[name].spread(patterns[task])
            mean = drawn[block == task][:, : spread.shape[1]] @ spread
            skill[:, start : start + step][:, block == task] = METRICS[name].skill(mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = {"normalised": normalised_skill(skill[0], skill[2]), "recovered_gap": recovered(*skill)}
    values = {
        "normalised": normalised(method, expert, names),
        "recovered_gap": recovered_gap(method, base, expert, names),
    }
    tail = 50 * (1 - level)
    return {name: _interval(values[name], each, tail) for name, each in draws.items()}


def _patterns(triples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(3, P) the patterns of three scores that a row can have, and (P,) how many rows have each."""
    if set(np.unique(triples)) <= {0, 1}:
        bits = (np.arange(8) >> np.array([[2], [1], [0]])) & 1
        return bits, np.bincount(np.array([4, 2, 1]) @ triples.astype(np.int64), minlength=8)
    return np.unique(triples, axis=1, return_counts=True)


def _interval(value: float, draws: np.ndarray, tail: float) -> Interval:
    """Of a value, where there is one, by its percentiles."""
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(finite):
        return Interval(value, float("nan"), float("nan"))
    return Interval(value, *(float(q) for q in np.percentile(finite, [tail, 100 - tail])))
