"""SMILE's parameters one at a time, and how the ways of combining experts decay as there are more of them.

    python benchmarks/sweeps.py                # all; hours on two cores, for what the cache lacks is trained first
    python benchmarks/sweeps.py --only full    # the suite text8, full fine-tunes; or lora, adapters of rank 16
    python benchmarks/sweeps.py --only decay   # the first 4, 8, 14 and 20 tasks of text20, LoRA adapters of rank 16

Everything finished is kept in the cache: what is stopped goes on. The figures go to benchmarks/results/sweeps.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from coterie.evaluation.cells import Cells
from coterie.evaluation.compare import TITLES, expert_sets
from coterie.evaluation.comparer import Comparer, Comparison, Result
from coterie.evaluation.suite import Suite, Task
from coterie.evaluation.suites.text8 import SUITE as TEXT8
from coterie.evaluation.suites.text20 import SUITE as TEXT20
from coterie.evaluation.train import quiet
from coterie.options import cache_directory
from routers import RESULTS, compact
from timing import machine, versions

CENTRE = {"full": {"rank": 32, "gate_rank": 16, "top_k": 1}, "lora": {"rank": 16, "gate_rank": 16, "top_k": 1}}
AXES = {
    "full": {
        "rank": (4, 8, 16, 32, 64, 128),
        "gate_rank": (1, 2, 4, 8, 16, 32, 64, 128, 384),  # 384: the full rank of every layer here
        "top_k": (1, 2, 4, 8),
    },
    "lora": {"rank": (2, 4, 8, 16), "gate_rank": (1, 2, 4, 8, 16), "top_k": (1, 2, 4, 8)},  # the adapters have rank 16
}
COUNTS = (4, 8, 14, 20)
METHODS = ("average", "task_arithmetic", "ties", "tsv_m", "smile", "arrow", "average_activation", "retriever")
SCALES = [{"scale": scale} for scale in (0.1, 0.2, 0.3, 0.6, 1.0)]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "task_arithmetic": SCALES,
    "ties": SCALES,
    "tsv_m": SCALES,
    "smile": [{"rank": 16, "gate_rank": gate} for gate in (2, 4, 8, 16)],
    "retriever": [{"combine": "selection"}],
}
"""What each method chooses from on validation rows, for every number of experts anew."""
VOTED = "smile by vote"
"""SMILE by the layers' vote, and else at its defaults: nothing is chosen."""


class Bench:
    """What both experiments share.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.cache, self.rows, self.validation_rows = options.cache, options.rows, options.validation_rows
        self.cells = Cells(options.cache / "cells", lambda text: print(f"! {text}", file=sys.stderr))

    def experts(self, suite: Suite, tasks: tuple[Task, ...], kind: str) -> tuple[Any, dict[str, Path]]:
        """The suite's reader, and each task's expert, trained where the cache lacks it."""
        reader = suite.reader(suite.base(self.cache, "cpu", False), "cpu")
        console = Console(stderr=True)
        return reader, expert_sets(suite, tasks, reader, kind, 1, False, self.cache, "cpu", console)[0]

    def comparer(self, reader: Any, tasks: tuple[Task, ...]) -> Comparer:
        return Comparer(reader, tasks, self.cells, self.rows, self.validation_rows)


def account(comparison: Comparison, method: str) -> dict[str, Any]:
    """A method's row, as JSON values, with the share of token-layers that it routes to their task's expert."""
    result: Result = next(r for r in comparison.results if r.method == method)
    if result.skill is None:
        raise RuntimeError(f"{method}: {result.note}")
    routing = comparison.routing.get(method)
    row = asdict(result)
    kept = ("parameters", "task", "skill", "normalised", "recovered_gap", "ratio", "seconds")
    return {**{name: row[name] for name in kept}, "routing": mean(routing) if routing else None}


def parameters(bench: Bench, kind: str) -> dict[str, Any]:
    """SMILE with one of its parameters changed at a time, on one kind of experts of text8."""
    tasks = TEXT8.tasks(test=TEXT8.test_rows)
    reader, directories = bench.experts(TEXT8, tasks, kind)
    comparer = bench.comparer(reader, tasks)

    def at(**changed: int) -> Comparison:
        given = CENTRE[kind] | changed
        return comparer.compare(TITLES[kind], directories, ["smile"], {"smile": [given]}, 0, whole=False)

    points: dict[str, list[dict[str, Any]]] = {axis: [] for axis in AXES[kind]}
    ladder: dict[str, list[float]] = {}
    for axis, values in AXES[kind].items():
        for value in values:
            comparison = at(**{axis: value})
            points[axis].append({"value": value, **account(comparison, "smile")})
            ladder |= {rung: skill for rung, skill in comparison.ladder.items() if "own routing" not in rung}
            print(f"{kind}, {axis} {value}: {points[axis][-1]['normalised']['value']:.3f}", flush=True)
    base, expert = comparison.results[0].skill, comparison.ladder["expert"]
    kept = {"tasks": comparison.tasks, "base": base, "expert": expert, "points": points, "ladder": ladder}
    return {"centre": CENTRE[kind], **kept}


def decay(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every method on the first tasks of text20, for each number of them."""
    every = TEXT20.tasks(test=TEXT20.test_rows)
    reader, directories = bench.experts(TEXT20, every, "lora")
    for count in COUNTS:
        tasks = every[:count]
        some = {task.name: directories[task.name] for task in tasks}
        comparer = bench.comparer(reader, tasks)
        comparison = comparer.compare(TITLES["lora"], some, METHODS, GRIDS, 0, whole=False)
        voted = comparer.compare(TITLES["lora"], some, ["smile"], {"smile": [{"pool": "model"}]}, 0, whole=False)
        found = {name: account(comparison, name) for name in ("base", *METHODS)} | {VOTED: account(voted, "smile")}
        for name, row in found.items():
            print(f"{count} experts, {name}: {row['normalised']['value']:.3f}", flush=True)
        yield {"count": count, "tasks": comparison.tasks, "expert": comparison.ladder["expert"], "methods": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("full", "lora", "decay"), help="one part; the others are kept as they are")
    parser.add_argument("--rows", type=int, default=1000, help="test rows of each task")
    parser.add_argument("--validation-rows", type=int, default=100)
    parser.add_argument("--cache", type=Path, default=cache_directory())
    parser.add_argument("--out", type=Path, default=RESULTS / "sweeps.json")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    about = {"rows": options.rows, "validation_rows": options.validation_rows, "machine": machine()}
    about["versions"] = versions("torch", "transformers", "peft")
    bench = Bench(options)
    for part in [options.only] if options.only else ["full", "lora", "decay"]:
        found = (
            {"points": list(decay(bench))} if part == "decay" else {**parameters(bench, part), "centre": CENTRE[part]}
        )
        result[part] = {**about, **found}
        options.out.write_text(compact(result) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
