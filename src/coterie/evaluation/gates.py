"""The gates that a suite must pass before any router runs on it: `python -m coterie.evaluation.gates SUITE CACHE`.

A suite tells methods apart only if its experts learn, combining them by plain arithmetic loses much of what they
learn, their low-rank deltas keep it, and the task can be seen in the input. Nothing here routes by anything but an
oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from ..errors import CoterieError
from .combine import SCALES, Experts
from .compare import check, expert_sets, find_suite, kind_of
from .ladder import State, delta, linear_deltas, linear_layers, load
from .metrics import normalised, recovered_gap, skills
from .reader import Reader
from .suite import Split, Task
from .tables import Sheet, percent, shown
from .train import quiet

LEAST_GAIN, MOST_RECOVERED, LEAST_KEPT, LEAST_PROBE, RANK = 0.15, 0.75, 0.97, 0.98, 32


@dataclass(frozen=True)
class Gates:
    """What the gates measure.

    Args:
        base, expert, merged, truncated: skill on each task.
        scale: of the best task arithmetic (1 / E is the average), by normalised skill on validation rows.
        recovered: the gap that it recovers.
        kept: normalised skill of rank-32 linear deltas under oracle routing.
        probe: share of test rows whose task a linear probe on the base's features names.
    """

    base: list[float]
    expert: list[float]
    merged: list[float]
    truncated: list[float]
    scale: float
    recovered: float
    kept: float
    probe: float

    def verdicts(self) -> dict[str, bool]:
        return {
            "every expert gains 15 points": bool(min(np.subtract(self.expert, self.base)) >= LEAST_GAIN),
            "the best merge recovers at most 75%": self.recovered <= MOST_RECOVERED,
            f"oracle routing at rank {RANK} keeps 97%": self.kept >= LEAST_KEPT,
            "a linear probe names the task at 98%": self.probe >= LEAST_PROBE,
        }


def measure(reader: Reader, tasks: Sequence[Task], directories: dict[str, Path], rows: int = 1000) -> Gates:
    """Measure the gates.

    Args:
        reader: of the base.
        tasks: of the suite.
        directories: of each task's expert.
        rows: test rows of each task; the probe learns from all training rows.
    """
    experts = Experts(reader, directories)
    base, metrics = experts.base, [task.metric for task in tasks]
    layers, model = linear_layers(reader.model, reader.blocks), reader.base_model()

    def by(states: Sequence[State], split: str) -> list[np.ndarray]:
        return [
            reader.scores(load(model, state), task, task.validation if split == "validation" else task.test.head(rows))
            for state, task in zip(states, tasks, strict=True)
        ]

    whole = [experts.state(task.name) for task in tasks]
    deltas = [delta(state, base) for state in whole]
    expert, expert_validation, untrained = by(whole, "test"), by(whole, "validation"), by([base] * len(tasks), "test")

    def merge(scale: float) -> list[State]:
        """base + scale * the sum of the deltas, for every task."""
        total: dict[str, object] = {}
        for each in deltas:
            for name, change in each.items():
                total[name] = total[name] + change if name in total else change  # type: ignore[operator]
        return [{n: w + scale * total[n] if n in total else w for n, w in base.items()}] * len(tasks)  # type: ignore[operator]

    scores = {s: normalised(by(merge(s), "validation"), expert_validation, metrics) for s in (1 / len(tasks), *SCALES)}
    scale = max(scores, key=scores.__getitem__)
    merged, truncated = by(merge(scale), "test"), by([linear_deltas(base, d, layers, RANK) for d in deltas], "test")
    return Gates(
        base=skills(untrained, metrics).tolist(),
        expert=skills(expert, metrics).tolist(),
        merged=skills(merged, metrics).tolist(),
        truncated=skills(truncated, metrics).tolist(),
        scale=scale,
        recovered=recovered_gap(merged, untrained, expert, metrics),
        kept=normalised(truncated, expert, metrics),
        probe=task_probe(reader, tasks, rows),
    )


def task_probe(reader: Reader, tasks: Sequence[Task], rows: int = 1000) -> float:
    """Share of test rows whose task a logistic regression on the frozen base's features names.

    It learns from every training row, as experts do: from few it would say how many rows it had, and not what is there
    to be seen.
    """
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    def features(splits: Sequence[Split]) -> tuple[np.ndarray, np.ndarray]:
        parts = [reader.features(split.inputs) for split in splits]
        return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    probe = LogisticRegression(C=100, max_iter=500).fit(*features([task.train for task in tasks]))
    return float(probe.score(*features([task.test.head(rows) for task in tasks])))


def gates_sheet(suite: str, tasks: Sequence[Task], gates: Gates) -> Sheet:
    columns = ("base", "expert", "merged", "truncated")
    rows = [[task.name, *(shown(getattr(gates, c)[i], task.metric) for c in columns)] for i, task in enumerate(tasks)]
    return Sheet(
        f"{suite}: gates", ["", *columns], rows,
        f"best scale {gates.scale:.3f} recovers {percent(gates.recovered)}%; rank {RANK} under oracle routing keeps "
        f"{percent(gates.kept)}%; task probe {percent(gates.probe)}%",
    )  # fmt: skip


def main(
    suite: str,
    cache_dir: Path,
    experts: str | None = None,
    device: str = "cpu",
    rows: int = 1000,
    tiny: bool = False,
) -> None:
    """Train the experts that are missing, measure, print; exit with 1 where a gate fails."""
    quiet()
    console, found = Console(), find_suite(suite)
    kind = kind_of(found, experts)
    tasks = found.tasks(train=48, validation=24, test=32) if tiny else found.tasks()
    check(tasks, ("train", "validation", "test"))
    reader = found.reader(found.base(cache_dir, device, tiny), device)
    (directories,) = expert_sets(found, tasks, reader, kind, 1, tiny, cache_dir, device, console)
    gates = measure(reader, tasks, directories, rows)
    console.print(gates_sheet(found.name, tasks, gates).rich())
    for verdict, passed in gates.verdicts().items():
        console.print(f"{'pass' if passed else 'FAIL'}  {verdict}", style="green" if passed else "red")
    if not all(gates.verdicts().values()):
        raise SystemExit(1)


if __name__ == "__main__":
    import sys

    import typer

    try:
        typer.run(main)
    except CoterieError as error:
        sys.exit(f"error: {error}")
