"""Merging here against PyPI's mergekit: CPU time, memory, what becomes of a mixture-of-experts model.

A Llama of 111 million parameters in bfloat16 with three fine-tunes, one shard a layer (benchmarks/memory.py), is merged
by both command lines, each in a process of its own on one thread, taking turns. "gross" is the whole command; "net" is
less the same program's `--help`, which for mergekit imports all of its libraries.

    python benchmarks/merging.py                 # writes benchmarks/results/merging.json
    python benchmarks/merging.py speed tensors   # some parts only: speed, floors, depth, tensors, experts

The floors are what of our commands no merge could save: imports, the hashes of what is read, the deltas themselves,
and for an adapter the Gram matrices that its certificate stands on.

mergekit gets an environment of its own in the user's cache, with the same torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

from environments import environment
from memory import measure, write_checkpoint

PACKAGE = "mergekit==0.1.5"
RESULT = Path(__file__).parent / "results" / "merging.json"
WIDTH, DEPTH, EXPERTS = 1024, 8, 3
NAMES = [f"expert{index}" for index in range(EXPERTS)]
COTERIE = [sys.executable, "-m", "coterie"]

# What a user would write for either program: (mergekit's method, its parameters, ours, our parameters, experts).
MERGES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], int]] = {
    "linear": ("linear", {"weight": 1.0}, "average", {}, EXPERTS),
    "task arithmetic": ("task_arithmetic", {"weight": 0.4, "lambda": 1.0}, "task_arithmetic", {"scale": 0.4}, EXPERTS),
    "slerp": ("slerp", {"t": 0.5}, "slerp", {"t": 0.5}, 2),
    "TIES, per tensor": (
        "ties", {"weight": 1.0, "density": 0.2, "lambda": 1.0}, "ties_per_tensor", {"density": 0.2}, EXPERTS,
    ),
    "TIES, global": ("ties", {"weight": 1.0, "density": 0.2, "lambda": 1.0}, "ties", {"density": 0.2}, EXPERTS),
}  # fmt: skip
EXTRACT_RANK = 64
# Programs that do one thing; %s is the folder of the sources.
FLOORS = {
    "import torch": "import torch",
    "import the names of architectures": "import coterie.sources.names",
    "hash": """
import hashlib, pathlib
for path in pathlib.Path(%s).rglob("*.safetensors"):
    hashlib.sha256(path.read_bytes())
""",
    "deltas": """
import pathlib, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
base, *experts = sorted(pathlib.Path(%s).iterdir())
for shard in sorted(base.glob("*.safetensors")):
    weights = load_file(shard)
    for expert in experts:
        for name, tensor in load_file(expert / shard.name).items():
            tensor.float().sub_(weights[name])
""",
    "Gram matrices": """
import pathlib, torch
from safetensors.torch import load_file
from coterie.experts.subspace import _gram
torch.set_num_threads(1)
for shard in sorted((pathlib.Path(%s) / "expert0").glob("*.safetensors")):
    for name, tensor in load_file(shard).items():
        if "proj" in name:
            _gram((tensor if tensor.shape[0] >= tensor.shape[1] else tensor.T).float())
""",
}


class Bench:
    """Both programs, and where they work.

    Args:
        theirs: the Python of mergekit's environment.
        folder: scratch.
        repeats: how often each command runs.
    """

    def __init__(self, theirs: Path, folder: Path, repeats: int):
        self.bin, self.folder, self.repeats = theirs.parent, folder, repeats
        self._count = 0

    def out(self) -> Path:
        """A path that does not exist yet."""
        self._count += 1
        return self.folder / f"out{self._count}"

    def their_merge(self, sources: Path, name: str) -> list[Any]:
        method, parameters, _, _, experts = MERGES[name]
        recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
        recipe["models"] = [{"model": str(sources / e)} for e in NAMES[:experts]]
        recipe["parameters"] = parameters
        if method in ("task_arithmetic", "ties"):
            recipe["base_model"] = str(sources / "base")
        elif method == "slerp":
            recipe["base_model"] = str(sources / NAMES[0])
        file = self.out().with_suffix(".yml")
        file.write_text(json.dumps(recipe))
        return [self.bin / "mergekit-yaml", file, self.out(), "--no-copy-tokenizer"]

    def our_merge(self, sources: Path, name: str) -> list[Any]:
        _, _, method, parameters, experts = MERGES[name]
        recipe = {"method": method, "base": str(sources / "base"), "parameters": parameters}
        recipe["experts"] = {e: str(sources / e) for e in NAMES[:experts]}
        file = self.out().with_suffix(".yaml")
        file.write_text(json.dumps(recipe))
        return [*COTERIE, "merge", file, "-o", self.out(), "--jobs", "1"]

    def pair(self, theirs: Callable[[], list[Any]], ours: Callable[[], list[Any]]) -> dict[str, Any]:
        """Medians of both commands, taking turns."""
        runs: dict[str, list[dict[str, float]]] = {"mergekit": [], "coterie": []}
        for _ in range(self.repeats):
            runs["mergekit"].append(measure(*theirs()))
            runs["coterie"].append(measure(*ours()))
        return {who: {k: round(median(run[k] for run in each), 2) for k in each[0]} for who, each in runs.items()}

    def speed(self) -> dict[str, Any]:
        """Every merge, and the extraction of an adapter."""
        sources = self.folder / "sources"
        write_sources(sources, WIDTH, DEPTH)
        found = {"--help": self.pair(lambda: [self.bin / "mergekit-yaml", "--help"], lambda: [*COTERIE, "--help"])}
        for name in MERGES:
            found[name] = self.pair(
                lambda n=name: self.their_merge(sources, n), lambda n=name: self.our_merge(sources, n)
            )
        base, expert, rank = sources / "base", sources / NAMES[0], EXTRACT_RANK
        found[f"extract, rank {rank}"] = self.pair(
            lambda: [
                self.bin / "mergekit-extract-lora", "--model", expert, "--base-model", base, "--out-path", self.out(),
                "--max-rank", str(rank),
            ],
            lambda: [*COTERIE, "extract", base, expert, "-o", self.out(), "--rank", str(rank), "--jobs", "1"],
        )  # fmt: skip
        idle = found["--help"]
        for name, each in found.items():
            if name == "--help":
                continue
            each["cpu_ratio_gross"] = round(each["mergekit"]["cpu_s"] / each["coterie"]["cpu_s"], 2)
            net = {who: each[who]["cpu_s"] - idle[who]["cpu_s"] for who in ("mergekit", "coterie")}
            each["cpu_ratio_net"] = round(net["mergekit"] / net["coterie"], 2)
            each["memory_ratio"] = round(each["coterie"]["anon_mib"] / each["mergekit"]["anon_mib"], 3)
            print(
                f"{name:20s} mergekit {each['mergekit']['cpu_s']:7.2f} CPU-s {each['mergekit']['anon_mib']:7.1f} MiB   "
                f"coterie {each['coterie']['cpu_s']:6.2f} CPU-s {each['coterie']['anon_mib']:6.1f} MiB   "
                f"{each['cpu_ratio_gross']:.1f} x gross, {each['cpu_ratio_net']:.1f} x net, "
                f"memory {each['memory_ratio']:.2f}",
                flush=True,
            )
        return found

    def floors(self) -> dict[str, Any]:
        """CPU seconds of what cannot be saved; those that import torch less its import."""
        sources = self.folder / "floors"
        write_sources(sources, WIDTH, DEPTH)
        found = {}
        for name, program in FLOORS.items():
            text = program.replace("%s", repr(str(sources)))
            runs = [measure(sys.executable, "-c", text)["cpu_s"] for _ in range(self.repeats)]
            found[name] = median(runs) - (found["import torch"] if name in ("deltas", "Gram matrices") else 0)
        found = {name: round(seconds, 2) for name, seconds in found.items()}
        print(json.dumps(found), flush=True)
        return found

    def depth(self) -> dict[str, Any]:
        """Peak anonymous memory of merges of 4 and of 16 layers."""
        found: dict[str, Any] = {}
        for depth in (4, 16):
            sources = self.folder / f"depth{depth}"
            write_sources(sources, WIDTH, depth)
            for name in ("linear", "TIES, global"):
                found.setdefault(name, {})[str(depth)] = measure(*self.our_merge(sources, name))["anon_mib"]
        for name, each in found.items():
            each["ratio"] = round(each["16"] / each["4"], 3)
            print(f"{name:20s} 4 layers {each['4']} MiB, 16 layers {each['16']} MiB: {each['ratio']}", flush=True)
        return found

    def tensors(self) -> dict[str, Any]:
        """CPU time of task arithmetic of two experts with many tiny tensors (Qwen3-MoE on disk), two sizes."""
        found: dict[str, Any] = {}
        for layers in (16, 48):
            sources = self.folder / f"tensors{layers}"
            count = write_experts(sources, "qwen3_moe", layers, experts=128)
            row: dict[str, Any] = {"tensors": count, "coterie": measure(*self.our_merge(sources, "task arithmetic"))}
            if layers == 16:
                row["mergekit"] = measure(*self.their_merge(sources, "task arithmetic"))
            found[str(count)] = row
            print(json.dumps({count: row}), flush=True)
        return found

    def experts(self) -> dict[str, Any]:
        """What becomes of a model's routed experts: tensors in, tensors out, names that differ."""
        found: dict[str, Any] = {}
        for kind in ("qwen3_moe", "deepseek_v3"):
            sources = self.folder / kind
            write_experts(sources, kind, layers=2, experts=8)
            into = stored(sources / NAMES[0])
            row: dict[str, Any] = {"in": len(into)}
            for who, command in (
                ("mergekit", self.their_merge(sources, "task arithmetic")),
                ("coterie", self.our_merge(sources, "task arithmetic")),
            ):
                try:
                    measure(*command)
                except SystemExit as error:
                    row[who] = {"error": str(error).strip().splitlines()[-1][:300]}
                    continue
                out = stored(command[2] if who == "mergekit" else command[-3])
                row[who] = {"out": len(out), "lost": len(into - out), "renamed or new": len(out - into)}
            found[kind] = row
            print(json.dumps({kind: row}), flush=True)
        return found


def write_sources(folder: Path, width: int, depth: int) -> None:
    """A base and three fine-tunes of it."""
    write_checkpoint(folder / "base", width, depth, None)
    for index, name in enumerate(NAMES):
        write_checkpoint(folder / name, width, depth, index)


def write_experts(folder: Path, kind: str, layers: int, experts: int) -> int:
    """A tiny mixture-of-experts base and three fine-tunes, under the names that the Hub has.

    Returns:
        the number of tensors of each.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 256,
    }  # fmt: skip
    if kind == "deepseek_v3":
        small |= {
            "n_routed_experts": experts, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "qk_nope_head_dim": 8,
        }  # fmt: skip
    else:
        small |= {"num_experts": experts, "num_experts_per_tok": 2, "head_dim": 16, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    for index, name in enumerate(NAMES):
        torch.manual_seed(index + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder / name)
    return len(stored(folder / "base"))


def stored(folder: Path) -> set[str]:
    """Names of the tensors of a directory."""
    names: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            names |= set(handle.keys())
    return names


def main() -> None:
    parts = ("speed", "floors", "depth", "tensors", "experts")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=cache, help="where mergekit's environment lives")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    theirs = environment(options.cache, PACKAGE)
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts or parts:
        with tempfile.TemporaryDirectory() as folder:
            result[part] = getattr(Bench(theirs, Path(folder), options.repeats), part)()
    result |= {
        "what": "coterie merge and extract against mergekit, one thread, bfloat16; medians, taking turns",
        "settings": {"width": WIDTH, "depth": DEPTH, "experts": EXPERTS, "repeats": options.repeats},
        "versions": {"python": platform.python_version(), "mergekit": PACKAGE.partition("==")[2]}
        | {name: version(name) for name in ("coterie", "torch", "transformers", "safetensors")},
        "machine": {"cpus": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
