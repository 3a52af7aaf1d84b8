"""Write what a full fine-tune changed in its linear layers as a LoRA adapter, and say what that leaves out.

`python -m coterie.evaluation.extract --help` trains the suite's experts where the cache lacks them and writes the
adapters that the package carries.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from coterie.evaluation.anchors import Reader
from coterie.evaluation.ladder import linear_deltas, linear_layers, load
from coterie.evaluation.suite import Task
from coterie.evaluation.train import LORA_TARGETS, RECORD
from coterie.experts.factorise import thin_svd
from coterie.merging.linear import delta

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PROVENANCE = "provenance.json"
WEIGHTS = "adapter_model.safetensors"


def expert_state(reader: Reader, directory: Path) -> dict[str, Tensor]:
    """Tensors of the base with an expert in it, whether the directory holds a full fine-tune or an adapter."""
    if (directory / WEIGHTS).exists():
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(reader.base_model(), directory).merge_and_unload()
    else:
        model = type(reader.model).from_pretrained(directory, dtype=torch.float32)
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
        "sha256": hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest(),
        "residual": residuals,
        "relative_delta": {
            "linear weights": _relative(change, base, lambda name: name in carried),
            "not carried: biases of linears": _relative(change, base, lambda n: _is_bias(n) and "LayerNorm" not in n),
            "not carried: layer norms": _relative(change, base, lambda name: "LayerNorm" in name),
        },
    }
    (out / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
    return provenance


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
