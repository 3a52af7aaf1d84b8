"""The suites, measured: the gates that each passes, and the headline methods on its experts.

    python benchmarks/suites.py                       # all; what the cache lacks is trained first: hours
    python benchmarks/suites.py --only vision8-lora   # one part; the others are kept as they are
    python benchmarks/suites.py --only vision8-lora --routers smile,phatgoose   # of it these routers; all else is kept
    python benchmarks/suites.py --only vision8-lora --gates   # of it the gates; all else is kept

Everything finished is kept in the cache: what is stopped goes on. The figures go to benchmarks/results/suites.json, and
the reports of `coterie compare` to build/suites.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from coterie.evaluation import gates
from coterie.evaluation.cells import Cells
from coterie.evaluation.combine import BY_TOKEN
from coterie.evaluation.compare import compare, expert_sets, find_suite
from coterie.evaluation.comparer import Comparer
from coterie.evaluation.suite import Suite, Task
from coterie.evaluation.tables import plain
from coterie.evaluation.train import quiet
from coterie.options import cache_directory
from routers import RESULTS, compact
from sweeps import VOTED, account
from timing import machine, versions

HEADLINE = ("average", "task_arithmetic", "ties", "tsv_m", "smile")
SPECTRAL = ("iso_c", "svc", "subspace_boosting")
OF_ADAPTERS = ("core_space", "knots")
ROUTERS = ("smile", VOTED, "average_activation", "nearest_example", "retriever")
POOLED = [{"pool": pool, "gate_rank": gate_rank} for pool in ("sequence", "model") for gate_rank in (4, 16, 32)]
"""SMILE with one decision for an example, in each layer or by the layers' vote, as the other routers may choose."""


@dataclass(frozen=True)
class Part:
    """A suite with one kind of experts.

    Args:
        suite: its name, or a group's.
        experts: full or lora (all from one seed).
        methods: mixtures and merges.
        routers: SMILE pooled, and those that read the experts' data: on the first set, the task not known, at what is
            best on validation rows.
        seeds: sets of experts.
        rows, validation_rows: of each task, at most.
        gated: whether it has gates to pass: what only a known task can solve has not.
    """

    suite: str
    experts: str
    methods: tuple[str, ...] = HEADLINE
    routers: tuple[str, ...] = ROUTERS
    seeds: int = 1
    rows: int = 2000
    validation_rows: int = 200
    gated: bool = True


PARTS = {
    "text8-full": Part("text8", "full", (*HEADLINE, *SPECTRAL), (*ROUTERS, "phatgoose"), seeds=3),
    "text8-lora": Part("text8", "lora", (*HEADLINE, *OF_ADAPTERS)),
    "vision8-full": Part("vision8", "full", routers=(*ROUTERS, "phatgoose")),
    "vision8-lora": Part("vision8", "lora", routers=(*ROUTERS, "phatgoose")),
    "lm4-full": Part("lm4", "full", routers=ROUTERS[2:], rows=300, validation_rows=50),
    "stress-full": Part("text8:stress", "full"),
    "control-full": Part("text8:control", "full", gated=False),
}


def measured(name: str, part: Part, cache: Path) -> dict[str, Any]:
    """The gates of a part's first set of experts, what `coterie compare` finds on all sets, and the routers' worth."""
    found: dict[str, Any] = {"part": asdict(part), "machine": machine()}
    found["versions"] = versions("torch", "transformers", "peft")
    suite, *_ = opened(part, cache)
    if part.gated:
        found["gates"] = passed(part, cache)
    results = compare(
        suite, part.methods, Path("build") / "suites" / name, experts=part.experts, seeds=part.seeds, rows=part.rows,
        validation_rows=part.validation_rows, cache=cache, grids={"smile": BY_TOKEN},
    )  # fmt: skip
    return found | {name: results[name] for name in ("comparisons", "summary")} | {"routers": routed(part, cache)}


def passed(part: Part, cache: Path) -> dict[str, Any]:
    """The gates, measured on the first set of experts."""
    _, tasks, reader, experts = opened(part, cache)
    found = gates.measure(reader, tasks, experts, part.rows)
    account: dict[str, Any] = plain({**asdict(found), "verdicts": found.verdicts()})
    return account


def routed(part: Part, cache: Path) -> dict[str, Any]:
    """What the routers keep of the first set of experts."""
    _, tasks, reader, experts = opened(part, cache)
    comparer = Comparer(reader, tasks, Cells(cache / "cells"), part.rows, part.validation_rows)

    def routers(names: tuple[str, ...], grid: list[dict[str, Any]]) -> dict[str, Any]:
        found = comparer.compare(part.experts, experts, names, {"smile": grid}, whole=False)
        return {name: account(found, name) for name in names}

    own = routers(tuple(name for name in part.routers if name != VOTED), POOLED)
    return own | ({VOTED: routers(("smile",), [{"pool": "model"}])["smile"]} if VOTED in part.routers else {})


def opened(part: Part, cache: Path) -> tuple[Suite, tuple[Task, ...], Any, dict[str, Path]]:
    """A part's suite, tasks, reader and first set of experts, which is trained where the cache lacks it."""
    suite = find_suite(part.suite)
    tasks = suite.tasks(test=suite.test_rows)
    reader = suite.reader(suite.base(cache, "cpu", False), "cpu")
    (experts,) = expert_sets(suite, tasks, reader, part.experts, 1, False, cache, "cpu", Console(stderr=True))
    return suite, tasks, reader, experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), help="one part; the others are kept as they are")
    amend = parser.add_mutually_exclusive_group()
    amend.add_argument("--routers", help="with --only: names, comma-separated; all else is kept as it is")
    amend.add_argument("--gates", action="store_true", help="with --only: its gates; all else is kept as it is")
    parser.add_argument("--cache", type=Path, default=cache_directory())
    parser.add_argument("--out", type=Path, default=RESULTS / "suites.json")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)

    def stored() -> dict[str, Any]:
        return json.loads(options.out.read_text()) if options.out.exists() else {}

    if (options.routers or options.gates) and options.only not in stored():
        parser.error("--routers and --gates amend a part that was measured: name it with --only")
    for name in [options.only] if options.only else PARTS:
        part = PARTS[name]
        if options.routers:
            found = {"routers": routed(replace(part, routers=tuple(options.routers.split(","))), options.cache)}
        else:
            found = {"gates": passed(part, options.cache)} if options.gates else measured(name, part, options.cache)
        result = stored()  # as it is by now
        if options.routers:
            found["routers"] = {**result[name].get("routers", {}), **found["routers"]}
        if options.routers or options.gates:
            found = {**result[name], **found}
        options.out.write_text(compact({**result, name: found}) + "\n")
        print(f"{name} written: {options.out}", flush=True)


if __name__ == "__main__":
    main()
