"""What a mixture costs on a GPU: layers of Llama-7B's shapes, decoding and prefill, eager and as CUDA graphs.

    python benchmarks/gpu.py                               # needs CUDA; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --shrink 32      # the same code on small layers and no graphs; shown only

A figure is the time of a call over that of the dense layer run the same way (eager, or replayed from a CUDA graph),
all alternating in one process. Decoding goes through enough copies of a layer to exceed the GPU's cache. Only the
stacked path waits for nothing, and can be captured. Exit code 1 where an output is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cells import ITEM, Cell, costs
from running import RIGHT, TOLERANCE
from subjects import Subject, inputs_of, right_output, share_right
from timing import Variant, machine, side_by_side, versions

RESULT = Path(__file__).parent / "results" / "gpu.json"
WIDTHS = ((4096, 4096), (4096, 11008), (11008, 4096))
DECODED, PREFILLED = (1, 8, 64), (512, 4096)
DECODING, PREFILL = 1.15, 1.5  # goals: x dense; x the theoretical overhead
MOST_COPIES = 8


def goal(cell: Cell, theory: float) -> float:
    return DECODING if cell.tokens in DECODED else 1 + PREFILL * theory


def copies_of(cell: Cell, device: torch.device) -> int:
    """Copies of the layer that a call goes through: enough to exceed the GPU's cache where tokens are few."""
    if device.type != "cuda" or cell.tokens in PREFILLED:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, 1 + int(1.25 * cache) // (cell.d_in * cell.d_out * ITEM[cell.dtype]))


class Copies:
    """Copies of a layer; a call goes through all of them, each with its own input."""

    def __init__(self, module: nn.Module, xs: list[Tensor]):
        self.modules: list[Any] = [module, *(copy.deepcopy(module) for _ in xs[1:])]
        self.xs = xs

    def __call__(self) -> Tensor:
        for module, x in zip(self.modules, self.xs, strict=True):
            y: Tensor = module((x,))
        return y

    @contextmanager
    def path(self, name: str) -> Iterator[None]:
        """All mixtures take this compute path."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(module.coterie.use_path(name))
            yield


def captured(call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """The call as a CUDA graph, and where that leaves the output."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph.replay, output


def awaited(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


@torch.inference_mode()
def measure(cell: Cell, subject: Subject, device: torch.device) -> dict[str, Any]:
    """One cell's account: for eager calls and for graphs, each variant's figures."""
    inputs = inputs_of(cell)
    # What is right is computed where float64 is: on the CPU, for some of the tokens.
    shown = replace(inputs, arguments={"x": inputs.arguments["x"][:, :64]})
    right = right_output(cell, subject, shown, 0)
    subject.dense.to(device), subject.mixture.to(device)
    copies = copies_of(cell, device)
    xs = [inputs.arguments["x"].to(device) for _ in range(copies)]
    dense, ours = Copies(subject.dense, xs), Copies(subject.mixture, xs)
    agreement = {}

    def agree(name: str, output: Tensor) -> None:
        agreement[name] = share_right(output[:, :64].cpu(), right, TOLERANCE[cell.dtype])

    variants = {"eager": [Variant("dense", awaited(dense, device), nullcontext)]}
    for path in ("stacked", "grouped"):
        with ours.path(path):
            agree(f"{path}, eager", ours())
        variants["eager"].append(Variant(path, awaited(ours, device), partial(ours.path, path)))
    if device.type == "cuda":
        with ours.path("stacked"):
            replay, output = captured(ours)
        awaited(replay, device)()
        agree("stacked, graph", output)
        variants["graph"] = [
            Variant("dense", awaited(captured(dense)[0], device), nullcontext),
            Variant("stacked", awaited(replay, device), nullcontext),
        ]
    figures = {kind: side_by_side(listed, copies)[0] for kind, listed in variants.items()}
    subject.dense.to("cpu"), subject.mixture.to("cpu")
    theory = costs(cell, subject.linears(1))["theory"]
    return {
        "cell": cell.key,
        "copies": copies,
        "theory": round(1 + theory, 3),
        "goal": round(goal(cell, theory), 3),
        "agreement": agreement,
        "right": min(agreement.values()) >= RIGHT[cell.dtype],
        **figures,
    }


def row(account: dict[str, Any]) -> dict[str, Any]:
    """An account as a row of the page's table."""
    kinds = {kind: account[kind] for kind in ("eager", "graph") if kind in account}
    ratios = {f"{name}, {kind}": figures["ratio"] for kind, each in kinds.items() for name, figures in each.items()}
    ratios = {name: value for name, value in ratios.items() if not name.startswith("dense")}
    times = {f"dense, {kind}, ms": each["dense"]["ms"] for kind, each in kinds.items()}
    head = {name: account[name] for name in ("cell", "theory", "goal")}
    # The stacked path is what "auto" takes on a GPU.
    met = {
        f"met, {kind}": "yes" if each["stacked"]["ratio"] <= account["goal"] else "no" for kind, each in kinds.items()
    }
    return {**head, **times, **ratios, **met}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths by this; shown, not written")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells whose name contains it; shown only")
    parser.add_argument("-o", "--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU that torch can use: --device cpu --shrink 32 runs the same code small", file=sys.stderr)
        return 2
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    accounts = []
    for width in WIDTHS:
        d_in, d_out = (each // options.shrink for each in width)
        made = [Cell(d_in, d_out, experts=options.experts, tokens=n, dtype=dtype) for n in (*DECODED, *PREFILLED)]
        cells = [cell for cell in made if options.only in cell.key]
        subject = Subject(made[0], 1) if cells else None
        for cell in cells:
            assert subject is not None
            subject.to(getattr(torch, dtype))
            accounts.append(measure(cell, subject, device))
            print(row(accounts[-1]), flush=True)
    wrong = [account["cell"] for account in accounts if not account["right"]]
    if wrong:
        print(f"wrong, and nothing is written: {', '.join(wrong)}", file=sys.stderr)
    elif device.type == "cuda" and not options.only and options.shrink == 1:
        result = {
            "what": f"layers of Llama-7B's shapes, E = {options.experts}, rank 32, gate rank 16, top-1, {dtype}, on "
            f"{torch.cuda.get_device_name(device)}; ratios to the dense layer run the same way",
            "cells": [row(account) for account in accounts],
            "versions": versions("coterie", "torch"),
            "machine": machine(),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
