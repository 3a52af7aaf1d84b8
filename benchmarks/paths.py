"""Where does the grouped path overtake the stacked one? Measures both, and fits the prices of the cost rule to it.

The shapes are none of those that benchmarks/running.py measures.

    python benchmarks/paths.py            # writes benchmarks/results/paths.json, prints the prices and the regret
    python benchmarks/paths.py --judge    # after a change of the rule: what it loses on the times of the last run
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from coterie.experts.bank import BankShape
from coterie.mixture import cost
from coterie.mixture.layer import add_experts
from coterie.routing.router import Routing
from timing import machine, versions

RESULT = Path(__file__).parent / "results" / "paths.json"
WIDTHS = ((512, 512), (640, 2560), (1280, 1280))
BANKS = ((3, 4), (3, 64), (6, 24), (16, 12), (48, 24))  # experts, rank
TOKENS = (1, 8, 48, 192, 768, 2304)
LAST_LEVEL_CACHE = 32e6  # bytes


def mixture(d_in: int, d_out: int, experts: int, rank: int, dtype: torch.dtype) -> Any:
    """A random mixture layer; its score reads half of each expert's rows."""
    tensors = {"down": torch.randn(experts * rank, d_in) / d_in**0.5, "up": torch.randn(experts * rank, d_out)}
    shape = BankShape(tuple(range(experts)), (rank,) * experts, max(rank // 2, 1), False, False)
    layer = nn.Linear(d_in, d_out).to(dtype)
    return add_experts(layer, shape, Routing("subspace_energy", "top_k", 1), tensors).eval()


def measure(layers: list[Any], x: torch.Tensor, seconds: float) -> dict[str, float]:
    """Median seconds of a call by path, alternating; a call takes the next layer, so that weights come from memory."""
    times: dict[str, list[float]] = {"stacked": [], "grouped": []}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or len(times["grouped"]) < 7:
        layer = layers[turn % len(layers)]
        for path, taken in times.items():
            layer.context.path = path
            start = time.perf_counter()
            layer(x)
            taken.append(time.perf_counter() - start)
        turn += 1
    return {path: statistics.median(taken[2:]) for path, taken in times.items()}


def fit(rows: list[dict[str, Any]]) -> cost.Prices:
    """Prices by non-negative least squares, relative to the time of the faster path."""
    counts = np.array([row["difference"] for row in rows])
    scale = np.array([min(row["stacked"], row["grouped"]) for row in rows])
    wanted = np.array([row["grouped"] - row["stacked"] for row in rows])
    (flop, read, moved, expert), _ = nnls(counts / scale[:, None], wanted / scale)
    return cost.Prices(*(float(f"{price / flop:.2g}") for price in (read, moved, expert)))


def measured(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Every shape's times."""
    rows = []
    for (d_in, d_out), (experts, rank), tokens in product(WIDTHS, BANKS, TOKENS):
        bytes_each = dtype.itemsize * (d_in * d_out + experts * rank * (d_in + d_out))
        copies = 1 if tokens > 64 else int(LAST_LEVEL_CACHE / bytes_each) + 1
        layers = [mixture(d_in, d_out, experts, rank, dtype) for _ in range(copies)]
        with torch.inference_mode():
            times = measure(layers, torch.randn(tokens, d_in, dtype=dtype), seconds)
        rows.append({"tokens": tokens, "d_in": d_in, "d_out": d_out, "experts": experts, "rank": rank, **times})
    return rows


def judged(dtype: torch.dtype, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The prices that suit the times best, and what the rule in use loses by its choices."""
    for row in rows:
        layer = mixture(row["d_in"], row["d_out"], row["experts"], row["rank"], dtype)
        case = (row["tokens"], layer.bank.shape, 1, row["d_in"], row["d_out"])
        row |= {"difference": cost.difference(*case), "picked": cost.cheapest(*case, dtype)}
    regrets = [row[row["picked"]] / min(row["stacked"], row["grouped"]) - 1 for row in rows]
    return {
        "fitted": vars(fit(rows)),
        "in_use": vars(cost.SINGLE if dtype.itemsize >= 4 else cost.HALF),
        "regret": {"mean": statistics.mean(regrets), "worst": max(regrets)},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="per shape")
    parser.add_argument("--judge", action="store_true", help="judge the rule in use by the times of the last run")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(RESULT.read_text()) if options.judge else {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        result[name] = judged(dtype, result[name]["rows"] if options.judge else measured(dtype, options.seconds))
        print(name, *(result[name][key] for key in ("fitted", "in_use", "regret")), sep="\n  ")
    if not options.judge:
        result |= {"threads": 1, "seconds": options.seconds}
        result |= {"versions": versions("coterie", "torch"), "machine": machine()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
