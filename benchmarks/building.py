"""What a build costs: start-up, jobs, the disk's share, a billion parameters, and a projection.

Synthetic Llama-like sources (benchmarks/memory.py). Each part is written to benchmarks/results/building.json under its
name, beside what other runs left there.

    python benchmarks/building.py                              # startup, jobs and disk: under three minutes
    python benchmarks/building.py billion                      # 1 B parameters, four full experts: 12 GB of scratch
    python benchmarks/building.py projection                   # one fit per shape of a Llama-70B layer
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from memory import VOCABULARY, measure, write_checkpoint

RESULT = Path(__file__).parent / "results" / "building.json"
RANK, EXPERTS = 32, 4
# (d_out, d_in) -> how many of them a layer has: Llama-70B, 80 layers of width 8192 with 8 key-value heads.
LLAMA_70B = {(8192, 8192): 2, (1024, 8192): 2, (28672, 8192): 2, (8192, 28672): 1}
LAYERS_70B, EXPERTS_70B = 80, 8
BUILD = """
import json, sys
import coterie
recipe, out, jobs, report = sys.argv[1:]
built = coterie.build(json.loads(recipe), out=out, jobs=int(jobs))
open(report, "w").write(json.dumps([built.seconds, built.peak_memory, len(built.layers)]))
"""
IDLE = "import coterie, torch, transformers, time\nfrom coterie.building.build import build\ntime.sleep(0.5)"


def write_sources(folder: Path, width: int, depth: int, adapters: bool = False) -> dict[str, Any]:
    """A base and four experts; the recipe."""
    write_checkpoint(folder / "base", width, depth, None)
    for index in range(EXPERTS):
        if adapters:
            write_adapter(folder / f"expert{index}", width, depth, index)
        else:
            write_checkpoint(folder / f"expert{index}", width, depth, index)
    experts = {f"expert{index}": str(folder / f"expert{index}") for index in range(EXPERTS)}
    parameters = {"rank": RANK, "gate_rank": 16, "top_k": 1}
    return {"method": "smile", "base": str(folder / "base"), "experts": experts, "parameters": parameters}


def write_adapter(folder: Path, width: int, depth: int, seed: int) -> None:
    """A LoRA adapter of every linear layer of `write_checkpoint`'s model."""
    import torch
    from safetensors.torch import save_file

    wide, noise = width * 11 // 4, torch.Generator().manual_seed(seed)
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (wide, width), "mlp.up_proj": (wide, width), "mlp.down_proj": (width, wide)}
    tensors = {}
    for layer in range(depth):
        for name, (d_out, d_in) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, d_in, generator=noise) / d_in**0.5
            tensors[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(d_out, RANK, generator=noise)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def clock(work: Any) -> dict[str, float]:
    """Wall and CPU seconds (of this process) of a call."""
    wall, cpu = time.monotonic(), time.process_time()
    work()
    return {"wall_s": round(time.monotonic() - wall, 3), "cpu_s": round(time.process_time() - cpu, 3)}


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(median(run[key] for run in runs), 3) for key in runs[0]}


def startup(options: argparse.Namespace) -> dict[str, Any]:
    """Wall time of fresh interpreters: bare, `import coterie`, `coterie --help`; median of fifteen, interleaved."""
    commands = {
        "bare python": ["-c", "pass"],
        "import coterie": ["-c", "import coterie"],
        "coterie --help": ["-m", "coterie", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(15):
        for name, command in commands.items():
            start = time.monotonic()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.monotonic() - start)
    found = {name: round(median(values), 3) for name, values in seconds.items()}
    beyond = {name: round(s - found["bare python"], 3) for name, s in found.items() if name != "bare python"}
    return {"repeats": 15, "seconds": found, "seconds_beyond_bare_python": beyond}


def jobs(options: argparse.Namespace) -> dict[str, Any]:
    """Wall time with one job and with two, interleaved; and the steps alone in threads and in processes."""
    import coterie
    from coterie.building import engines
    from coterie.building.prepare import prepare
    from coterie.building.steps import Options, make, steps_of
    from coterie.recipe import read_recipe

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = write_sources(folder, options.width, options.depth)
        whole: dict[int, list[Any]] = {1: [], 2: []}
        for _ in range(options.repeats):
            for count, runs in whole.items():
                runs.append(
                    clock(lambda count=count: coterie.build(recipe, out=folder / "out", jobs=count, force=True))
                )
        ready = prepare(read_recipe(recipe))
        steps, run_step = steps_of(ready), partial(make, ready, Options())
        told = engines._Job(read_recipe(recipe).model_dump_json(), None, Options(), files="")
        alone: dict[str, list[Any]] = {"1 thread": [], "2 threads": [], "2 processes": []}
        with engines.one_thread(), ProcessPoolExecutor(2, get_context("spawn")) as pool:
            pool.submit(engines._make_elsewhere, told, steps[0]).result()

            def in_processes() -> None:
                for made in [pool.submit(engines._make_elsewhere, told, step) for step in steps]:
                    made.result()

            in_processes()  # the workers import and open their sources
            for _ in range(options.repeats):
                for count in (1, 2):
                    run = clock(lambda count=count: list(engines.in_threads(run_step, count, steps)))
                    alone[f"{count} thread{'s' * (count > 1)}"].append(run)
                alone["2 processes"].append({"wall_s": clock(in_processes)["wall_s"]})
    one, two = (middle(runs) for runs in whole.values())
    steps_alone = {name: middle(runs) for name, runs in alone.items()}
    return {
        "width": options.width, "depth": options.depth, "experts": EXPERTS, "repeats": options.repeats,
        "build": {"1": one, "2": two}, "speedup": round(one["wall_s"] / two["wall_s"], 2),
        "steps_alone": steps_alone,
    }  # fmt: skip


def disk(options: argparse.Namespace) -> dict[str, Any]:
    """A build against reading every byte of its inputs and writing every byte of its output, page cache warm."""
    import coterie

    found: dict[str, Any] = {"width": options.width, "depth": options.depth, "repeats": options.repeats}
    for kind in ("full", "adapters"):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            recipe = write_sources(folder, options.width, options.depth, kind == "adapters")
            inputs = list(folder.rglob("*.safetensors"))
            runs: dict[str, list[Any]] = {"copy": [], "build": []}

            def build(recipe: Any = recipe, folder: Path = folder) -> None:
                coterie.build(recipe, out=folder / "out", jobs=options.jobs, force=True)

            build()
            written = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))

            def copy(inputs: Any = inputs, folder: Path = folder, written: int = written) -> None:
                block = bytearray(1 << 22)
                for file in inputs:
                    with file.open("rb", buffering=0) as source:
                        while source.readinto(block):
                            pass
                with (folder / "copy").open("wb") as target:
                    for start in range(0, written, len(block)):
                        target.write(memoryview(block)[: written - start])
                    target.flush()
                    os.fsync(target.fileno())

            for _ in range(options.repeats):
                runs["copy"].append(clock(copy))
                runs["build"].append(clock(build))
            cost = {name: middle(each) for name, each in runs.items()}
        ratios = {key: round(cost["build"][key] / cost["copy"][key], 1) for key in ("wall_s", "cpu_s")}
        read = sum(1 for _ in inputs)
        found[kind] = {"files_read": read, "bytes_written": written, **cost, "build_over_copy": ratios}
    return found | {"jobs": options.jobs}


def billion(options: argparse.Namespace) -> dict[str, Any]:
    """A build of a base of a billion parameters with four full experts: its memory against the plan's."""
    import coterie

    width, depth = 2048, options.billion_depth
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = write_sources(folder, width, depth)
        planned = coterie.plan(recipe, jobs=options.jobs)
        told = folder / "report.json"
        run = measure(
            sys.executable, "-c", BUILD, json.dumps(recipe), str(folder / "out"), str(options.jobs), str(told)
        )
        seconds, _, layers = json.loads(told.read_text())
        idle = measure(sys.executable, "-c", IDLE)["anon_mib"]
        sizes = {
            name: sum(f.stat().st_size for f in folder.glob(pattern))
            for name, pattern in (("bytes_read", "[be]*/*.safetensors"), ("bytes_written", "out/*.safetensors"))
        }
    own = run["anon_mib"] - idle
    return {
        "width": width, "depth": depth, "vocabulary": VOCABULARY, "experts": EXPERTS, "jobs": options.jobs,
        "base_parameters": planned.base_parameters, "layers": layers, "seconds": round(seconds, 1), **sizes,
        "planned_mib": round(planned.memory / 2**20), "peak_anon_mib": run["anon_mib"], "interpreter_anon_mib": idle,
        "beyond_the_interpreter_mib": round(own, 1), "within_plan": own <= planned.memory / 2**20,
    }  # fmt: skip


def projection(options: argparse.Namespace) -> dict[str, Any]:
    """PROJECTED, not run: 70 B parameters, eight experts, from one measured fit per shape of its layers."""
    import torch

    from coterie.experts.factorise import factorise
    from coterie.sources.delta import Dense, LowRank

    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(0)
    costs: dict[str, Any] = {}
    hours = {"full": 0.0, "adapters": 0.0}
    for (d_out, d_in), count in LLAMA_70B.items():
        down, up = torch.randn(RANK, d_in, generator=noise), torch.randn(d_out, RANK, generator=noise)
        costs[f"{d_in} -> {d_out}"] = cost = {"adapters": clock(lambda: factorise(LowRank(up, down), RANK))["cpu_s"]}  # noqa: B023
        if d_out * d_in <= options.largest:
            matrix = Dense(torch.randn(d_out, d_in, generator=noise) + up @ down)
            cost["full"] = clock(lambda: factorise(matrix, RANK))["cpu_s"]  # noqa: B023
        else:  # with the number of entries: both have the same smaller width
            known = costs["8192 -> 8192"]["full"]
            cost["full"] = round(known * d_out * d_in / 8192**2, 3)
            cost["full_is_scaled"] = True
        for kind in hours:
            hours[kind] += cost[kind] * count * LAYERS_70B * EXPERTS_70B / 3600
    return {
        "what": "PROJECTED from single factorisations, one thread each; reading, hashing and writing not counted",
        "layers": LAYERS_70B, "experts": EXPERTS_70B, "rank": RANK, "cpu_s_per_factorisation": costs,
        "core_hours": {kind: round(value, 2) for kind, value in hours.items()},
    }  # fmt: skip


PARTS = {"startup": startup, "jobs": jobs, "disk": disk, "billion": billion, "projection": projection}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["startup", "jobs", "disk"], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--billion-depth", type=int, default=20, help="fewer layers for a trial")
    parser.add_argument(
        "--largest", type=int, default=8192 * 8192, help="largest matrix that the projection factorises"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        result[part] = PARTS[part](options)
        result[part]["versions"] = {"python": platform.python_version()} | {
            name: version(name) for name in ("coterie", "torch", "transformers", "safetensors")
        }
        result[part]["cpus"] = os.cpu_count()
        print(part, json.dumps(result[part], indent=1))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
