"""The gates that a suite must pass before any router runs on it: `python -m coterie.evaluation.gates`.

A suite tells methods apart only if its experts learn, combining them by plain arithmetic loses much of what they
learn, their low-rank deltas keep it, and the task can be seen in the input. Nothing here routes by anything but an
oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..merging.linear import State, average, delta, task_arithmetic
from . import text8
from .anchors import Reader
from .experts import FULL, SCALES, jobs
from .extract import expert_state
from .ladder import linear_deltas, linear_layers, load
from .metrics import accuracies, normalised, recovered_gap
from .suite import Task, weights_sha256
from .train import quiet, train_shown

LEAST_GAIN, MOST_RECOVERED, LEAST_KEPT, LEAST_PROBE, RANK = 0.15, 0.75, 0.97, 0.98, 32


@dataclass(frozen=True)
class Gates:
    """What the gates measure.

    Args:
        base, expert, merged, truncated: accuracy of each task.
        scale: of the best task arithmetic (1 / E is the average), by normalised accuracy on validation rows.
        recovered: the gap that it recovers.
        kept: normalised accuracy of rank-32 linear deltas under oracle routing.
        probe: share of test rows whose task a linear probe on the base's embeddings names.
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
            "every expert gains 15 points": min(np.subtract(self.expert, self.base)) >= LEAST_GAIN,
            "the best merge recovers at most 75%": self.recovered <= MOST_RECOVERED,
            f"oracle routing at rank {RANK} keeps 97%": self.kept >= LEAST_KEPT,
            "a linear probe names the task at 98%": self.probe >= LEAST_PROBE,
        }


def measure(reader: Reader, tasks: tuple[Task, ...], experts: list[Path], rows: int = 1000) -> Gates:
    """Measure the gates on full fine-tunes.

    Args:
        reader: of the base.
        tasks: the suite.
        experts: directory of each task's full fine-tune.
        rows: test rows of each task.
    """
    base = {name: tensor.detach() for name, tensor in reader.model.state_dict().items()}
    deltas = [delta(expert_state(reader, path), base) for path in experts]
    layers = linear_layers(reader.model)
    model = reader.base_model()
    tests = [task.test.head(rows) for task in tasks]

    def everywhere(state: State, validation: bool) -> list[np.ndarray]:
        load(model, state)
        return [
            reader.correct(model, task, task.validation if validation else test)
            for task, test in zip(tasks, tests, strict=True)
        ]

    def own(states: list[dict[str, Tensor]], validation: bool) -> list[np.ndarray]:
        return [
            reader.correct(load(model, state), task, task.validation if validation else test)
            for state, task, test in zip(states, tasks, tests, strict=True)
        ]

    whole = [{name: base[name] + d[name] if name in d else base[name] for name in base} for d in deltas]
    expert, expert_validation = own(whole, False), own(whole, True)
    merges = {1 / len(deltas): average(base, deltas), **{s: task_arithmetic(base, deltas, s) for s in SCALES}}
    scores = {scale: normalised(everywhere(state, True), expert_validation) for scale, state in merges.items()}
    scale = max(scores, key=scores.__getitem__)
    merged, untrained = everywhere(merges[scale], False), everywhere(base, False)
    truncated = own([linear_deltas(base, d, layers, RANK) for d in deltas], False)
    return Gates(
        base=accuracies(untrained).tolist(),
        expert=accuracies(expert).tolist(),
        merged=accuracies(merged).tolist(),
        truncated=accuracies(truncated).tolist(),
        scale=scale,
        recovered=recovered_gap(merged, untrained, expert),
        kept=normalised(truncated, expert),
        probe=task_probe(reader, tasks, rows),
    )


def task_probe(reader: Reader, tasks: tuple[Task, ...], rows: int = 1000) -> float:
    """Share of test rows whose task a logistic regression on the frozen base's embeddings names."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    @cache
    def embedded(split: str) -> tuple[np.ndarray, np.ndarray]:
        parts = [reader.embeddings(reader.model, getattr(task, split).texts[:rows]) for task in tasks]
        return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    probe = LogisticRegression(C=100, max_iter=500).fit(*embedded("train"))
    return float(probe.score(*embedded("test")))


def gates_table(tasks: tuple[Task, ...], gates: Gates) -> Table:
    table = Table(title="text8: gates", title_justify="left")
    for column in ("", *(task.name for task in tasks)):
        table.add_column(column, justify="left" if not column else "right")
    for row in ("base", "expert", "merged", "truncated"):
        table.add_row(row, *(f"{100 * a:.1f}" for a in getattr(gates, row)))
    table.caption = (
        f"best scale {gates.scale:.3f} recovers {100 * gates.recovered:.1f}%; rank {RANK} under oracle routing keeps "
        f"{100 * gates.kept:.1f}%; task probe {100 * gates.probe:.1f}%"
    )
    return table


def main(cache_dir: Path, device: str = "cpu") -> None:
    """Train the experts that are missing, measure, print."""
    quiet()
    reader, tasks, console = Reader(text8.base_dir(), device), text8.load(), Console()
    experts = train_shown(jobs(tasks, FULL, weights_sha256(reader.base)), cache_dir, device, console)
    gates = measure(reader, tasks, experts)
    console.print(gates_table(tasks, gates))
    for verdict, passed in gates.verdicts().items():
        console.print(f"{'pass' if passed else 'FAIL'}  {verdict}", style="green" if passed else "red")
    if not all(gates.verdicts().values()):
        raise SystemExit(1)


if __name__ == "__main__":
    import typer

    typer.run(main)
