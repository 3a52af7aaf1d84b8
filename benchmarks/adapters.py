"""The drawer that `library_routers.py` routes over: a LoRA of rank 16 for each of fourteen tasks of the suite text20.

They are committed under benchmarks/adapters, in half precision, each with the record of its training: data, recipe,
validation accuracy on the way (of the full-precision weights). Six tasks of the suite get none.

    python benchmarks/adapters.py     # trains what the cache lacks (about 25 minutes on two cores), writes them anew
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

from coterie.evaluation.extract import BASE_NAME, sort_targets
from coterie.evaluation.suite import weights_sha256
from coterie.evaluation.suites.text20 import SUITE
from coterie.evaluation.train import RECORD, jobs, quiet, train_shown
from coterie.options import cache_directory

ADAPTERS = Path(__file__).parent / "adapters"
HELD_OUT = ("airports", "definitions", "dates", "pronunciations", "quantities", "foods")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def halve(trained: Path, out: Path) -> None:
    """Copy an adapter, its weights in float16, its base under the name that it has on the Hub.

    Args:
        trained: PEFT directory, with the record of its training.
        out: directory of the copy.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = load_file(trained / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, out / WEIGHTS, {"format": "pt"})
    config = json.loads((trained / CONFIG).read_text()) | {"auto_mapping": None, "base_model_name_or_path": BASE_NAME}
    (out / CONFIG).write_text(json.dumps(config))
    sort_targets(out / CONFIG)
    record = json.loads((trained / RECORD).read_text()) | {"sha256": weights_sha256(out), "dtype": "float16"}
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def main(cache: Path, out: Path = ADAPTERS, workers: int | None = None) -> None:
    """Train the adapters that the cache lacks, and write all.

    Args:
        cache: directory that keeps what is trained.
        out: directory of the adapters, one for each task.
        workers: trainings at a time, each with one thread; default: one for each core.
    """
    quiet()
    reader = SUITE.reader(SUITE.base(cache, "cpu", False), "cpu")
    tasks = tuple(task for task in SUITE.tasks() if task.name not in HELD_OUT)
    trainings = jobs(SUITE, tasks, SUITE.recipes["lora"], reader)
    trained = train_shown(trainings, cache, "cpu", Console(stderr=True), workers)
    for task, directory in zip(tasks, trained, strict=True):
        halve(directory, out / task.name)
        print(f"written: {out / task.name}")


if __name__ == "__main__":
    main(cache_directory())
