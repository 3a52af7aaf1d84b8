"""A library of ten, a hundred and a thousand adapters: what list, open, add and verify take; and retrieval.

The adapters are of rank 8, on the queries and values of a BERT of 4 layers and width 128, each written once and added
under many names. Commands are timed in this process, without the seconds that importing torch and transformers takes.
Retrieval is among vectors of width 384 around 1,000 centres, and, for the worst case, among vectors without any
structure; "recall" is the share of the 8 nearest that the index finds.

    python benchmarks/library.py     # writes benchmarks/results/library.json, in under two minutes

One thread; medians.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from coterie import library
from coterie.library.index import EXACT, PROBED, Index

RESULT = Path(__file__).parent / "results" / "library.json"
SIZES = (10, 100, 1000)
LAYERS, WIDTH, RANK, ADAPTERS = 4, 128, 8, 10
VECTORS = (1_000, 10_000, 100_000)
DIMENSION, NEAREST, QUERIES = 384, 8, 50


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load": os.getloadavg()[0],  # of other programs, as it begins
            "versions": {name: version(name) for name in ("torch", "safetensors", "faiss-cpu", "numpy")},
            "library": libraries(Path(folder)),
            "retrieval": [row for structured in (True, False) for row in retrieval(structured)],
        }
    for row in [*result["library"], *result["retrieval"]]:
        row |= {key: float(f"{value:.3g}") for key, value in row.items() if isinstance(value, float)}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for part in ("library", "retrieval"):
        print(part)
        for row in result[part]:
            print("  ", ", ".join(f"{k} {v}" for k, v in row.items()))


def libraries(folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of each operation on libraries that grow."""
    base, sources = material(folder)
    shelf = library.create(folder / "library", base)
    shelf.add("warm", sources[0])  # imports, and the architecture's skeleton
    shelf.remove("warm")
    rows = []
    for size in SIZES:
        spent = [timed(partial(shelf.add, str(i), sources[i % ADAPTERS])) for i in range(len(shelf), size)]
        rows.append(
            {
                "experts": size,
                "add_ms": median(spent[-10:]),
                "open_ms": often(lambda: library.open(shelf.path)),
                "list_ms": often(lambda: library.open(shelf.path).entries()),
                "show_ms": often(partial(shown, shelf.path, str(size - 1))),
                "verify_ms": timed(shelf.verify),
                "prototypes_ms": timed(lambda: [shelf.statistics(name, "prototype") for name in shelf]),
                "prototypes_again_ms": timed(lambda: [shelf.statistics(name, "prototype") for name in shelf]),
                "manifest_kb": (shelf.path / "library.json").stat().st_size / 1e3,
            }
        )
    return rows


def material(folder: Path) -> tuple[Path, list[Path]]:
    """A base and its adapters, as files."""
    torch.manual_seed(0)
    base = folder / "base"
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=2 * WIDTH, vocab_size=1000
    )
    BertModel(config).save_pretrained(base)
    sources = []
    for i in range(ADAPTERS):
        source = folder / f"adapter{i}"
        source.mkdir()
        tensors = {}
        for layer in range(LAYERS):
            for target in ("query", "value"):
                path = f"base_model.model.encoder.layer.{layer}.attention.self.{target}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, WIDTH) / WIDTH**0.5
                tensors[f"{path}.lora_B.weight"] = torch.randn(WIDTH, RANK) / WIDTH**0.5
        save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
        facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": str(base)}
        (source / "adapter_config.json").write_text(json.dumps({**facts, "target_modules": ["query", "value"]}))
        sources.append(source)
    return base, sources


def retrieval(structured: bool) -> list[dict[str, Any]]:
    """Microseconds of a query, by the index and by looking at all, and what the index misses."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, DIMENSION), dtype=np.float32)
    rows = []
    for n in VECTORS:
        count = n + QUERIES
        drawn = rng.standard_normal((count, DIMENSION), dtype=np.float32)
        if structured:
            drawn = centres[rng.integers(len(centres), size=count)] + 0.7 * drawn
        vectors, queries = drawn[:n], drawn[n:]
        owners = [str(i) for i in range(n)]
        built = perf_counter()
        index = Index(vectors, owners, exact=False)
        built = perf_counter() - built
        exact = Index(vectors, owners, exact=True)
        found = [{name for name, _ in index.nearest(q, NEAREST)} for q in queries]
        wanted = [{name for name, _ in exact.nearest(q, NEAREST)} for q in queries]
        rows.append(
            {
                "vectors": n,
                "structure": "1,000 clusters" if structured else "none",
                "build_s": built,
                "index_us": 1e3 * median(timed(partial(index.nearest, q, NEAREST)) for q in queries),
                "exact_us": 1e3 * median(timed(partial(exact.nearest, q, NEAREST)) for q in queries),
                "recall": float(np.mean([len(a & b) / NEAREST for a, b in zip(found, wanted, strict=True)])),
                "by_default": "exact" if n <= EXACT else f"index, {PROBED} cells",
            }
        )
    return rows


def shown(path: Path, name: str) -> dict[str, Any]:
    """What `coterie library show` asks for."""
    return library.open(path)[name].to_dict()


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = perf_counter()
    work()
    return 1e3 * (perf_counter() - start)


def often(work: Callable[[], Any]) -> float:
    return median(timed(work) for _ in range(9))


if __name__ == "__main__":
    main()
