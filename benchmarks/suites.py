"""The suites, measured: the gates that each passes, and the headline methods on its experts.

    python benchmarks/suites.py                       # all; what the cache lacks is trained first: hours
    python benchmarks/suites.py --only vision8-lora   # one part; the others are kept as they are

Everything finished is kept in the cache: what is stopped goes on. The figures go to benchmarks/results/suites.json, and
the reports of `coterie compare` to build/suites.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from coterie.evaluation import gates
from coterie.evaluation.compare import compare, expert_sets, find_suite
from coterie.evaluation.tables import plain
from coterie.evaluation.train import quiet
from coterie.options import cache_directory
from routers import RESULTS, compact
from timing import machine, versions

HEADLINE = ("average", "task_arithmetic", "ties", "tsv_m", "smile")
SPECTRAL = ("iso_c", "svc", "subspace_boosting")
OF_ADAPTERS = ("core_space", "knots")


@dataclass(frozen=True)
class Part:
    """A suite with one kind of experts.

    Args:
        suite: its name, or a group's.
        experts: full or lora (all from one seed).
        methods: mixtures and merges.
        seeds: sets of experts.
        rows, validation_rows: of each task, at most.
        gated: whether it has gates to pass: what only a known task can solve has not.
    """

    suite: str
    experts: str
    methods: tuple[str, ...] = HEADLINE
    seeds: int = 1
    rows: int = 2000
    validation_rows: int = 200
    gated: bool = True


PARTS = {
    "text8-full": Part("text8", "full", (*HEADLINE, *SPECTRAL), seeds=3),
    "text8-lora": Part("text8", "lora", (*HEADLINE, *OF_ADAPTERS)),
    "vision8-full": Part("vision8", "full"),
    "vision8-lora": Part("vision8", "lora"),
    "lm4-full": Part("lm4", "full", rows=300, validation_rows=50),
    "stress-full": Part("text8:stress", "full", rows=1000),
    "control-full": Part("text8:control", "full", rows=1000, gated=False),
}


def measured(name: str, part: Part, cache: Path) -> dict[str, Any]:
    """The gates of a part's first set of experts, and what `coterie compare` finds on all sets."""
    found: dict[str, Any] = {"part": asdict(part), "machine": machine()}
    found["versions"] = versions("torch", "transformers", "peft")
    suite, console = find_suite(part.suite), Console(stderr=True)
    if part.gated:
        tasks = suite.tasks(test=suite.test_rows)
        reader = suite.reader(suite.base(cache, "cpu", False), "cpu")
        (experts,) = expert_sets(suite, tasks, reader, part.experts, 1, False, cache, "cpu", console)
        passed = gates.measure(reader, tasks, experts, part.rows)
        found["gates"] = plain({**asdict(passed), "verdicts": passed.verdicts()})
    results = compare(
        suite, part.methods, Path("build") / "suites" / name, experts=part.experts, seeds=part.seeds, rows=part.rows,
        validation_rows=part.validation_rows, cache=cache,
    )  # fmt: skip
    return found | {"comparisons": results["comparisons"], "summary": results["summary"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="one part; the others are kept as they are")
    parser.add_argument("--cache", type=Path, default=cache_directory())
    parser.add_argument("--out", type=Path, default=RESULTS / "suites.json")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    for name in [options.only] if options.only else PARTS:
        found = measured(name, PARTS[name], options.cache)
        result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(compact({**result, name: found}) + "\n")
        print(f"{name} written: {options.out}", flush=True)


if __name__ == "__main__":
    main()
