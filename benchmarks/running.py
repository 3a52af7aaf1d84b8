"""What a mixture costs to run: time beside the dense base, beside its other compute paths and beside its neighbours.

    python benchmarks/running.py                      # the fixed cells; writes benchmarks/results/running.json
    python benchmarks/running.py --only '768->3072'   # those whose name contains it; shown, not written
    python benchmarks/running.py --full               # the whole grid; resumes where it was stopped

All variants of a cell run alternately in one process; a ratio is the median over rounds of time / dense time of the
same round. Every variant's output is compared with the right one first. Few tokens (<= 32) are timed over enough copies
of a layer to exceed the last-level cache, since in a model the weights come from memory. Exit code 1 where an output
is wrong; a missed goal is a finding, not an error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import neighbours
from cells import ITEM, KERNEL, NEIGHBOURS, REFERENCE, Cell, by_bank, code_version, costs, default_cells, goals, grid
from coterie.errors import CoterieError
from subjects import PROMPT, Inputs, Subject, inputs_of, right_output, share_right
from timing import Variant, last_level_cache, machine, native_bfloat16, side_by_side, versions

RESULTS = Path(__file__).resolve().parent / "results"
JOURNAL = RESULTS.parent.parent / "build" / "running-full.jsonl"
PATHS = ("stacked", "grouped", "merged")
FEW = 32  # tokens
BEYOND_CACHE = 1.25
MOST_COPIES = 64
BUILD_MEMORY = 2 * 1024**3  # bytes for base and experts of all copies
MOST_MEMORY = 8 * 1024**3  # the same, where even one copy needs more than the above
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
RIGHT = {"float32": 0.995, "bfloat16": 0.9}  # share of tokens; the rest have scores that tie to rounding
MODEL_TOLERANCE = {"float32": 2e-2, "bfloat16": 0.3}  # a tie in one layer is seen in all tokens after it


class TooLarge(Exception):
    """The cells cannot be measured here, and why."""


class WrongOutput(Exception):
    """A variant does not compute what the cell says."""


def copies_of(cell: Cell, dtype: str) -> int:
    """Copies of the layer that a call must go through: enough to exceed the last-level cache where tokens are few."""
    if cell.model or cell.tokens > FEW:
        return 1
    enough = -(-BEYOND_CACHE * last_level_cache() // (cell.d_in * cell.d_out * ITEM[dtype]))
    fitting = BUILD_MEMORY // ((cell.experts + 2) * cell.d_in * cell.d_out * ITEM["float32"])
    return int(max(1, min(enough, fitting, MOST_COPIES)))


def build(group: list[Cell]) -> Subject:
    """The modules that a group of cells shares, in float32."""
    cell = group[0]
    if (cell.experts + 2) * cell.d_in * cell.d_out * ITEM["float32"] > MOST_MEMORY:
        raise TooLarge("its experts need more than 8 GiB")
    return Subject(cell, max(copies_of(each, each.dtype) for each in group))


# --- variants -------------------------------------------------------------------------------------------------------


def caller(cell: Cell, model: Any, inputs: Inputs, copies: int, extra: dict[str, Any]) -> Callable[[], Tensor]:
    """One call of a model or of a stack of layers, as a function of nothing."""
    if cell.model == "llama":
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        prompt = torch.randint(0, 30000, (cell.batch, PROMPT), generator=torch.Generator().manual_seed(2))
        model(input_ids=prompt, past_key_values=cache, use_cache=True)

        def decode() -> Tensor:
            out: Tensor = model(**inputs.arguments, past_key_values=cache, use_cache=True, **extra).logits
            cache.crop(-1)
            return out

        return decode
    if cell.model:
        return lambda: model(**inputs.arguments, **extra).last_hidden_state
    xs = tuple(inputs.arguments["x"].clone().requires_grad_(cell.backward) for _ in range(copies))
    if not cell.backward:
        return lambda: model(xs, **extra)
    wanted = [*xs, *model.parameters()]
    direction = torch.randn(*xs[0].shape[:-1], cell.d_out, dtype=xs[0].dtype)

    def forward_and_backward() -> Tensor:
        y: Tensor = model(xs)
        torch.autograd.grad(y, wanted, direction, allow_unused=True)
        return y.detach()

    return forward_and_backward


def given_decision(cell: Cell, subject: Subject, inputs: Inputs) -> contextlib.AbstractContextManager[Any]:
    """The decision that the caller gives, for the methods that are given one."""
    route = subject.mixture.coterie.route
    if cell.method == "task":
        return route(subject.names[0])
    if inputs.rows is not None:
        return route([subject.names[i] for i in inputs.rows])
    return contextlib.nullcontext() if inputs.gates is None else route(inputs.gates)


@contextlib.contextmanager
def unshared(mixture: nn.Module) -> Iterator[None]:
    """Layers that read the same input each score for themselves."""
    groups = {layer: layer.siblings for layer in mixture.modules() if getattr(layer, "siblings", None) is not None}
    try:
        for layer in groups:
            layer.siblings = None  # type: ignore[assignment]
        yield
    finally:
        for layer, siblings in groups.items():
            layer.siblings = siblings


def chosen_paths(call: Callable[[], Tensor]) -> dict[str, int]:
    """How many layers of a call took which compute path."""
    from coterie.mixture.layer import _Mixture

    ask, seen = _Mixture._path, Counter[str]()

    def watch(layer: Any, *arguments: Any) -> Any:
        path = ask(layer, *arguments)
        seen[path] += 1
        return path

    with mock.patch.object(_Mixture, "_path", watch):
        call()
    return dict(seen)


@contextlib.contextmanager
def switched_on() -> Iterator[None]:
    """As with COTERIE_NATIVE=1."""
    from coterie.mixture import native

    native.kernel()
    with mock.patch.object(native, "enabled", lambda: True):
        yield


def variants_of(cell: Cell, subject: Subject, inputs: Inputs, copies: int, reference: bool) -> list[Variant]:
    """The dense base, coterie, its forced paths where they apply, and the neighbour."""
    none, handle = contextlib.nullcontext, subject.mixture.coterie
    os.environ.pop("COTERIE_NATIVE", None)  # "coterie" is torch alone
    ours = caller(cell, subject.mixture, inputs, copies, {})
    found = [Variant("dense", caller(cell, subject.dense, inputs, copies, {}), none), Variant("coterie", ours, none)]
    for path in PATHS:
        with contextlib.suppress(ValueError), handle.use_path(path):  # merged needs one decision for the call
            ours()
            found.append(Variant(path, ours, partial(handle.use_path, path)))
    with contextlib.suppress(CoterieError), switched_on():  # where there is no C++ compiler
        if "native" in chosen_paths(ours):
            found.append(Variant(KERNEL, ours, switched_on))
    if cell.model and cell.method == "smile" and cell.experts > 1:
        found.append(Variant("unshared", ours, partial(unshared, subject.mixture)))
    if cell.method in NEIGHBOURS:
        model, extra = neighbours.PEFT[cell.method](cell, subject, inputs)
        found.append(Variant(NEIGHBOURS[cell.method], caller(cell, model, inputs, copies, extra), none))
    elif cell.method == "smile" and reference:
        model = neighbours.fusion_bench(cell, subject)
        found.append(Variant(REFERENCE, caller(cell, model, inputs, copies, {}), none))
    return found


def check(cell: Cell, subject: Subject, inputs: Inputs, variants: list[Variant], copies: int) -> dict[str, float]:
    """Each variant's agreement: for a layer the share of tokens that are right, for a model the relative difference.

    Raises:
        WrongOutput: a variant computes something else.
    """
    outputs = {}
    for variant in variants[1:]:
        with variant.context():
            outputs[variant.name] = variant.call().double()
    if cell.model:
        ours = outputs["coterie"]
        found = {name: float((out - ours).norm() / ours.norm()) for name, out in outputs.items()}
        wrong = [name for name, error in found.items() if not error <= MODEL_TOLERANCE[cell.dtype]]
    else:
        right = right_output(cell, subject, inputs, copies - 1)
        found = {name: share_right(out, right, TOLERANCE[cell.dtype]) for name, out in outputs.items()}
        wrong = [name for name, share in found.items() if not share >= RIGHT[cell.dtype]]
    if wrong:
        raise WrongOutput(f"{cell.key}: {', '.join(f'{name} ({found[name]:.3g})' for name in wrong)}")
    return found


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(cell: Cell, subject: Subject, reference: bool) -> dict[str, Any]:
    """One cell's account."""
    torch.set_num_threads(cell.threads)
    copies = copies_of(cell, cell.dtype)
    inputs = inputs_of(cell)
    with torch.inference_mode(not cell.backward), given_decision(cell, subject, inputs):
        variants = variants_of(cell, subject, inputs, copies, reference)
        agreement = check(cell, subject, inputs, variants, copies)
        paths = chosen_paths(variants[1].call)
        figures, rounds = side_by_side(variants, copies)
    cost = costs(cell, subject.linears(copies))
    if not cell.model:
        cost |= {
            name: cost[name] // copies for name in ("multiply_adds", "extra_multiply_adds", "bytes", "extra_bytes")
        }
    native = cell.dtype != "bfloat16" or native_bfloat16()
    return {
        "cell": cell.to_dict(),
        "copies": copies,
        "rounds": rounds,
        "cost": cost,
        "variants": figures,
        "paths": paths,
        "agreement": agreement,
        "goals": goals(cell, cost, {name: each["ratio"] for name, each in figures.items()}, native),
    }


def measured(cells: list[Cell], reference: bool) -> Iterator[dict[str, Any]]:
    """Each cell's account, or the reason why there is none."""
    for group in by_bank(cells):
        try:
            subject = build(group)
        except TooLarge as reason:
            yield from ({"cell": cell.to_dict(), "skipped": str(reason)} for cell in group)
            continue
        dtype = "float32"
        for cell in group:
            if cell.dtype != dtype:
                dtype = cell.dtype
                subject.to(getattr(torch, dtype))
            try:
                account = measure(cell, subject, reference)
            except WrongOutput as reason:
                account = {"cell": cell.to_dict(), "wrong": str(reason)}
            yield account
        del subject
        gc.collect()


def show(account: dict[str, Any]) -> None:
    cell = account["cell"]
    key = Cell(**{name: cell[name] for name in Cell.__dataclass_fields__}).key
    if "variants" not in account:
        print(f"{key}: {account.get('skipped') or 'WRONG ' + account['wrong']}", flush=True)
        return
    figures = account["variants"]
    ratios = "  ".join(f"{name} {each['ratio']:.2f}" for name, each in figures.items() if name != "dense")
    missed = [f"{g['goal']}: {g['measured']:.2f} > {g['limit']:.2f}" for g in account["goals"] if not g["met"]]
    print(f"{key}: dense {figures['dense']['ms']:.3g} ms, theory {1 + account['cost']['theory']:.2f}; {ratios}"
          f"  [{', '.join(account['paths'])}; {account['rounds']} rounds]"
          + (f"  MISSED {'; '.join(missed)}" if missed else ""), flush=True)  # fmt: skip


def write(accounts: list[dict[str, Any]], path: Path, reference: bool) -> None:
    packages = ["coterie", "torch", "transformers", "peft"]
    result = {
        "what": "time to run a mixture as a ratio to its dense base, all variants alternating in one process",
        "cells": accounts,
        "code": code_version(),
        "versions": versions(*packages) | ({"fusion-bench": neighbours.FUSION_BENCH} if reference else {}),
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Accounts by the key of their cell, of a run that may have been stopped in the middle of a line."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["code"] == code_version():
                found[entry["key"]] = entry["account"]
    return found


def run_full(cells: list[Cell], journal: Path, reference: bool) -> list[dict[str, Any]]:
    """Every cell's account; those of the journal are not measured again."""
    done = finished(journal)
    left = [cell for cell in cells if cell.key not in done]
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished", flush=True)
    journal.parent.mkdir(parents=True, exist_ok=True)
    order = (cell for group in by_bank(left) for cell in group)
    with journal.open("a") as log:
        log.write("\n")  # ends a line that was cut off
        for cell, account in zip(order, measured(left, reference), strict=True):
            show(account)
            done[cell.key] = account
            log.write(json.dumps({"key": cell.key, "code": code_version(), "account": account}) + "\n")
            log.flush()
    return [done[cell.key] for cell in cells]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains it")
    parser.add_argument("--out", type=Path, help="where to write; with --only, nothing is written without it")
    parser.add_argument("--full", action="store_true", help="the whole grid, resumable (hours)")
    parser.add_argument("--list", action="store_true", help="list the cells")
    parser.add_argument("--no-reference", action="store_true", help="leave fusion-bench out")
    parser.add_argument("--cache", type=Path, default=cache, help="where fusion-bench's environment lives")
    parser.add_argument("--journal", type=Path, default=JOURNAL, help="where --full notes finished cells")
    options = parser.parse_args()
    cells = [cell for cell in (grid() if options.full else default_cells()) if options.only in cell.key]
    if options.list:
        print("\n".join(cell.key for cell in cells))
        return 0
    warnings.filterwarnings("ignore")
    reference = not options.no_reference
    if reference:
        neighbours.find_fusion_bench(options.cache)
    if options.full:
        accounts = run_full(cells, options.journal, reference)
    else:
        accounts = []
        for account in measured(cells, reference):
            show(account)
            accounts.append(account)
    out = options.out or RESULTS / ("running-full.json" if options.full else "running.json")
    if options.out or not options.only:
        write(accounts, out, reference)
    return 1 if any("wrong" in account for account in accounts) else 0


if __name__ == "__main__":
    sys.exit(main())
