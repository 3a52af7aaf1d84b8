"""A tiny base and what people have of it: adapters of unequal ranks and targets, and a full fine-tune."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

import coterie
from zoo import base_model, fine_tune, make_adapter, save


def fill(root: Path) -> SimpleNamespace:
    """The drawer's directories, by what they hold."""
    base = base_model("bert")
    save(base, root / "base")
    save(base_model("bert", seed=7), root / "other")
    save(fine_tune(base, 3), root / "full")
    make = dict(arch="bert", lora_alpha=6)
    make_adapter(root / "base", root / "task", 1, 4, task_type="SEQ_CLS", **make)
    make_adapter(root / "base", root / "general", 2, 6, ["query", "output.dense"], use_rslora=True, **make)
    make_adapter(root / "base", root / "same", 3, 4, rank_pattern={"layer.1.*query": 2}, **make)
    make_adapter(root / "base", root / "twin", 6, 4, arch="bert", lora_alpha=10)  # of the ranks and layers of `task`
    make_adapter(root / "base", root / "dora", 4, 4, use_dora=True, **make)
    make_adapter(root / "other", root / "elsewhere", 5, 4, **make)
    return SimpleNamespace(**{path.name: path for path in root.iterdir()})


def library(drawer: SimpleNamespace, path: Path, *names: str) -> coterie.library.Library:
    """A library of some of the drawer's adapters."""
    made = coterie.library.create(path, drawer.base)
    for name in names:
        made.add(name, getattr(drawer, name))
    return made


def raw(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Module -> B, A (float64) and scale of an adapter without patterns of scale, straight from its files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert a.shape[0] == config["r"] or config["rank_pattern"]
            rank = config["r"] if not config["rank_pattern"] else a.shape[0]
            alpha = config["lora_alpha"]
            if config["alpha_pattern"]:
                alpha = rank
            scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
            found[path] = b.double().numpy(), a.double().numpy(), scale
    return found


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Module -> its delta, (out, in) float64."""
    return {path: scale * (b @ a) for path, (b, a, scale) in raw(folder).items()}


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A model's tensors, float64."""
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
