"""Write what a full fine-tune changed in its linear layers as a LoRA adapter, and say what that leaves out.

`python -m coterie.evaluation.extract --help` trains the suite's experts where the cache lacks them and writes the
adapters that the package carries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from ..experts.factorise import thin_svd
from ..merging.linear import delta
from .anchors import Reader
from .experts import COMMITTED, FULL, jobs
from .ladder import linear_deltas, linear_layers, load
from .suite import Task, weights_sha256
from .text8 import base_dir
from .text8 import load as load_tasks
from .train import LORA_TARGETS, RECORD, quiet, train_shown

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PROVENANCE = "provenance.json"
WEIGHTS = "adapter_model.safetensors"


def expert_state(reader: Reader, directory: Path) -> dict[str, Tensor]:
    """Tensors of the base with an expert in it, whether the directory holds a full fine-tune or an adapter."""
    if (directory / WEIGHTS).exists():
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(reader.base_model(), directory).merge_and_unload()
    else:
        model = AutoModel.from_pretrained(directory, dtype=torch.float32)
    return {name: tensor.detach().to(reader.device) for name, tensor in model.state_dict().items()}


def extract_adapter(
    reader: Reader, task: Task, expert: Path, out: Path, rank: int = 16, rows: int | None = None
) -> dict[str, Any]:
    """Write the leading `rank` singular directions of every linear layer's delta as a PEFT LoRA adapter in float16.

    With the delta U S V^T: B = U S, A = V^T, alpha = rank (scale 1).

    Args:
        reader: of the base.
        task: the expert's task.
        expert: directory of the full fine-tune, as `train` writes it.
        out: directory of the adapter.
        rank: of the adapter.
        rows: test rows to measure on; default: all.

    Returns:
        The provenance that is written beside the adapter: training, residuals, accuracies, what is left out.
    """
    from peft import LoraConfig, TaskType

    base = {name: tensor.detach() for name, tensor in reader.model.state_dict().items()}
    full = expert_state(reader, expert)
    change, layers = delta(full, base), linear_layers(reader.model)
    tensors, residuals = {}, {}
    for layer in layers:
        factors = thin_svd(change[f"{layer}.weight"], rank)
        prefix = f"base_model.model.{layer}"
        tensors[f"{prefix}.lora_A.weight"] = factors.vt.half().contiguous().cpu()
        tensors[f"{prefix}.lora_B.weight"] = (factors.u * factors.s).half().contiguous().cpu()
        residuals[layer] = round(factors.residual, 4)
    out.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, task_type=TaskType.FEATURE_EXTRACTION,
        base_model_name_or_path=BASE_NAME, inference_mode=True,
    ).save_pretrained(str(out))  # fmt: skip
    sort_targets(out / "adapter_config.json")
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})

    test = task.test if rows is None else task.test.head(rows)
    model = reader.base_model()
    states = {
        "base": base, "full fine-tune": full, "linear deltas": linear_deltas(base, change, layers),
        "adapter": expert_state(reader, out),
    }  # fmt: skip
    accuracy = {name: float(reader.correct(load(model, s), task, test).mean()) for name, s in states.items()}
    carried = {f"{layer}.weight" for layer in layers}
    provenance = {
        "training": json.loads((expert / RECORD).read_text()),
        "rank": rank,
        "test_rows": len(test),
        "accuracy": accuracy,
        "sha256": weights_sha256(out),
        "residual": residuals,
        "relative_delta": {
            "linear weights": _relative(change, base, lambda name: name in carried),
            "not carried: biases of linears": _relative(change, base, lambda n: _is_bias(n) and "LayerNorm" not in n),
            "not carried: layer norms": _relative(change, base, lambda name: "LayerNorm" in name),
        },
    }
    (out / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
    return provenance


def sort_targets(path: Path) -> None:
    """Sort an adapter configuration's target modules: a set in PEFT, written in an order that changes with each run."""
    config = json.loads(path.read_text())
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n")


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _relative(change: dict[str, Tensor], base: dict[str, Tensor], among: Any) -> float:
    """|delta| / |base| over the tensors of the encoder's layers that are among the named ones."""
    names = [name for name in base if name.startswith("encoder.layer.") and among(name)]
    norms = [
        torch.linalg.vector_norm(torch.cat([source[n].flatten() for n in names if n in source])).item()
        for source in (change, base)
    ]
    return round(norms[0] / norms[1], 4)


def main(cache: Path, out: Path = COMMITTED, device: str = "cpu") -> None:
    """Train the full fine-tunes of text8 that the cache lacks and write their rank-16 adapters.

    Args:
        cache: directory of the full fine-tunes.
        out: directory of the adapters, one directory for each task.
        device: torch device.
    """
    quiet()
    reader, tasks, console = Reader(base_dir(), device), load_tasks(), Console()
    trainings = jobs(tasks, FULL, weights_sha256(reader.base))
    for task, expert in zip(tasks, train_shown(trainings, cache, device, console), strict=True):
        provenance = extract_adapter(reader, task, expert, out / task.name)
        accuracy = ", ".join(f"{name} {100 * value:.1f}" for name, value in provenance["accuracy"].items())
        console.print(f"{task.name}: {accuracy}")


if __name__ == "__main__":
    import typer

    typer.run(main)
