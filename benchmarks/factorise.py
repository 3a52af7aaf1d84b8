"""Truncated factorisation: CPU time against the SVD and against fusion-bench, and the excess error over a sweep.

All times are CPU seconds of one thread, sides taking turns in one process; ratios are medians over the repeats.

- layers: `TruncatedSVD.fit` of four experts, a delta at a time, against `torch.linalg.svd(full_matrices=True)` in
  float32 (what fusion-bench runs for each delta) and the thin SVD. Deltas are Gaussian noise, which has no gap
  anywhere and is the slowest to certify, or low-rank factors, which are compared with the SVD of their product.
- models: a whole ViT, upscaled in memory: `coterie.smile` against fusion-bench's SmileUpscalingAlgorithm; and what of
  ours no iteration could save, since the certificate stands on it: each delta's Gram matrix and one Cholesky.
- sweep: |D - D_r| / |D - best D_r| - 1 over spectra, shapes and ranks, measured against the float64 SVD (above 1536
  wide: the eigenvalues of the float64 Gram matrix).

    python benchmarks/factorise.py              # under four minutes; fusion-bench is installed the first time
    python benchmarks/factorise.py --full       # with shapes up to 4096 x 4096
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import coterie
from coterie.experts.factorise import thin_svd
from coterie.experts.fit import TruncatedSVD
from coterie.experts.subspace import TOLERANCE, _gram
from coterie.sources.delta import Delta, Dense, LowRank
from fusionbench import PACKAGE, tuned
from neighbours import find_fusion_bench
from timing import machine, versions

RESULT = Path(__file__).parent / "results" / "factorise.json"
RANK, GATE_RANK, EXPERTS = 32, 16, 4
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]  # (d_out, d_in)
SWEEP = [(384, 384), (1536, 384), (384, 1536), (768, 768)]
FULL_SWEEP = [*SWEEP, (3072, 768), (1024, 1024), (1536, 1536), (4096, 1024), (4096, 4096)]
RANKS = (16, 32, 64)


def take_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side's calls, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            start = process_time()
            call()
            seconds[name].append(process_time() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    return round(median(x / y for x, y in zip(a, b, strict=True)), 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- layers -------------------------------------------------------------------------------------------------------


def layer(m: int, n: int, repeats: int, adapter_rank: int | None = None) -> dict[str, Any]:
    """One shape's row: milliseconds a delta, and how many times less than the SVD."""
    weight = noise(m, n)
    deltas: list[Delta | None] = []
    for i in range(EXPERTS):
        if adapter_rank is None:
            deltas.append(Dense(noise(m, n, seed=i + 1)))
        else:
            deltas.append(LowRank(noise(m, adapter_rank, seed=i + 1), noise(adapter_rank, n, seed=i + 9)))
    dense = next(delta for delta in deltas if delta is not None).dense()
    experts = TruncatedSVD(RANK, GATE_RANK)
    sides = {
        "fit": lambda: experts.fit("layer", weight, deltas, [None] * EXPERTS, [1.0] * EXPERTS),
        "full": lambda: torch.linalg.svd(dense, full_matrices=True),
        "thin": lambda: torch.linalg.svd(dense, full_matrices=False),
    }
    take_turns(sides, 1)
    seconds = take_turns(sides, repeats)
    fit = [each / EXPERTS for each in seconds["fit"]]
    return {
        "d_out x d_in": f"{m} x {n}",
        "delta": "dense" if adapter_rank is None else f"adapter of rank {adapter_rank}",
        "fit, ms a delta": round(1e3 * median(fit), 2),
        "full SVD, ms": round(1e3 * median(seconds["full"]), 1),
        "thin SVD, ms": round(1e3 * median(seconds["thin"]), 1),
        "full SVD / fit": ratio(seconds["full"], fit),
        "thin SVD / fit": ratio(seconds["thin"], fit),
    }


# --- models -------------------------------------------------------------------------------------------------------


def vit(layers: int, width: int) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def proof(base: nn.Module) -> None:
    """What a certificate stands on, for matrices of the shapes of a model's linear layers."""
    for module in base.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            gram = _gram(weight if weight.shape[0] >= weight.shape[1] else weight.T)
            torch.linalg.cholesky_ex(gram)


def model(layers: int, width: int, repeats: int, goal: int) -> dict[str, Any]:
    """A ViT's row: CPU seconds of both upscalings."""
    from fusion_bench.method.smile_upscaling.smile_upscaling import SmileUpscalingAlgorithm

    base = vit(layers, width)
    experts = [tuned(base, seed) for seed in range(1, EXPERTS + 1)]
    named = {f"expert{i}": expert for i, expert in enumerate(experts)}

    def theirs() -> None:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress bars
            algorithm = SmileUpscalingAlgorithm(
                device="cpu", upscaling_accelerator=None, gate_k=GATE_RANK, k=RANK, top_k=1, full_matrices=True
            )
            algorithm.merge(copy.deepcopy(base), [copy.deepcopy(expert) for expert in experts])

    def ours() -> None:
        coterie.smile(base, named, rank=RANK, gate_rank=GATE_RANK, top_k=1)

    coterie.smile(vit(1, 64), {"warm": tuned(vit(1, 64), 1)}, rank=2)  # imports

    def proofs() -> None:
        for _ in range(EXPERTS):
            proof(base)

    seconds = take_turns({"coterie": ours, "Gram and Cholesky": proofs, "fusion-bench": theirs}, repeats)
    return {
        "model": f"ViT, {layers} layers of width {width}, {EXPERTS} experts",
        "coterie, CPU s": round(median(seconds["coterie"]), 2),
        "Gram and Cholesky alone, CPU s": round(median(seconds["Gram and Cholesky"]), 2),
        "fusion-bench, CPU s": round(median(seconds["fusion-bench"]), 1),
        "fusion-bench / coterie": ratio(seconds["fusion-bench"], seconds["coterie"]),
        "goal": f"≥ {goal}",
        "repeats": repeats,
    }


# --- the sweep ----------------------------------------------------------------------------------------------------


def spectra(n: int) -> dict[str, Tensor | None]:
    """Singular values by name; None for Gaussian noise."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    one = torch.ones_like(i)
    return {
        "Gaussian noise": None,
        "i^-0.5": i**-0.5,
        "i^-1": i**-1,
        "i^-2": i**-2,
        "i^-3": i**-3,
        "0.8^i": 0.8**i,
        "rank 16 + slow noise": torch.where(i <= 16, 10 * 0.9**i, 0.3 * (1 - 0.9 * i / n)),
        "plateau across the cut": torch.where(i <= 96, one, 0.2 * one),
        "all equal": one,
        "cluster at the cut": torch.where(i <= 20, 5 * one, torch.where(i <= 45, 1 + 1e-3 * torch.sin(7 * i), 0.9)),
        "gaps at 16, 32 and 64": 0.5 ** torch.bucketize(i, torch.tensor([16.0, 32.0, 64.0])) * (1 - 0.3 * i / n),
        "rank 4": torch.where(i <= 4, one / i, 0 * one),
        "i^-0.5 in bfloat16": i**-0.5,
    }


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(m, k, seed=seed).double())[0]


class Worst:
    """What a sweep found of one spectrum."""

    def __init__(self) -> None:
        self.cases, self.certified = 0, 0
        self.excess, self.overlap = 0.0, 1.0
        self.ms: list[float] = []

    def add(self, delta: Tensor, rank: int, values: Tensor, vectors: Tensor | None) -> None:
        """One factorisation, measured against the exact squared singular values (all, descending)."""
        start = process_time()
        found = thin_svd(delta, rank)
        took = process_time() - start
        best = float(values[rank:].clamp_min(0).sum().sqrt())
        left = float(torch.linalg.matrix_norm(delta.double() - (found.u * found.s) @ found.vt))
        self.cases += 1
        self.certified += found.excess > 0
        if best > 1e-6 * found.norm:  # below, the matrix is of that rank to rounding
            self.excess = max(self.excess, left / best - 1)
        elif left > 1e-5 * found.norm:
            self.excess = float("inf")
        if vectors is not None:
            overlap = float((found.vt[:GATE_RANK] @ vectors[:, :GATE_RANK]).square().sum()) / GATE_RANK
            self.overlap = min(self.overlap, overlap)
        if delta.shape == (768, 768) and rank == RANK:
            self.ms.append(1e3 * took)


def sweep(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """One row per spectrum: the worst over shapes and ranks."""
    found: dict[str, Worst] = {}
    for m, n in shapes:
        k = min(m, n)
        left, right = orthonormal(m, k, 1), orthonormal(n, k, 2)
        for name, s in spectra(k).items():
            delta = noise(m, n) if s is None else ((left * s) @ right.T).float()
            if "bfloat16" in name:
                delta = delta.bfloat16().float()
            tall = (delta if m >= n else delta.T).double()
            gap = name.startswith("gaps") and m >= n
            if gap:
                values, vectors = torch.linalg.eigh(tall.T @ tall)
                values, exact = values.flip(0), vectors.flip(1)
            elif k > 1536:
                values, exact = torch.linalg.eigvalsh(tall.T @ tall).flip(0), None
            else:
                values, exact = torch.linalg.svdvals(tall).square(), None
            worst = found.setdefault(name, Worst())
            for rank in RANKS:
                worst.add(delta, rank, values, exact)
        print(f"  {m} x {n}", flush=True)
    return [
        {
            "spectrum": name,
            "cases": worst.cases,
            "certified": worst.certified,
            "exact": worst.cases - worst.certified,
            "largest excess": f"{max(worst.excess, 0):.1e}",
            "768 x 768, rank 32, ms": round(median(worst.ms), 1),
        }
        | ({"gate subspace overlap": round(worst.overlap, 6)} if name.startswith("gaps") else {})
        for name, worst in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    parser.add_argument("--cache", type=Path, default=cache, help="where fusion-bench's environment lives")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--full", action="store_true", help="sweep shapes up to 4096 x 4096, and repeat models more")
    options = parser.parse_args()
    torch.set_num_threads(1)

    repeats = 15 if options.full else 7
    layers = []
    for shape in SHAPES:
        layers.append(layer(*shape, repeats))
        layers += [layer(*shape, repeats, adapter_rank) for adapter_rank in (8, 32)]
        for row in layers[-3:]:
            print(row, flush=True)
    find_fusion_bench(options.cache)
    models = [model(6, 384, 5 if options.full else 3, 10), model(2, 768, 3, 20)]
    for row in models:
        print(row, flush=True)
    shapes = FULL_SWEEP if options.full else SWEEP
    rows = sweep(shapes)
    for row in rows:
        print(row)
    result = {
        "what": f"Rank {RANK}, gate rank {GATE_RANK}; CPU time of one thread, medians. Models: coterie.smile against "
        f"{PACKAGE} (SmileUpscalingAlgorithm), in memory. Sweep: how far |D - D_r| is above the best of rank r in "
        f"{', '.join(map(str, RANKS))}; certified are at most {TOLERANCE}",
        "threads": 1,
        "repeats": repeats,
        "layers": layers,
        "models": models,
        "sweep_shapes": [f"{m} x {n}" for m, n in shapes],
        "sweep": rows,
        "versions": versions("coterie", "torch", "transformers") | {"fusion-bench": PACKAGE.partition("==")[2]},
        "machine": machine(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {options.out}")
    worst = max(float(row["largest excess"]) for row in rows)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
