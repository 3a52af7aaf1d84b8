"""One expert of a mixture, as a plain PEFT LoRA adapter of its base."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import CoterieError
from ..mixture.heads import PerExpert
from ..mixture.layer import MixtureConv1D
from ..mixture.sites import outside_base
from ..sources.checkpoint import Checkpoint
from ..sources.experts import same
from ..sources.locate import Location, locate
from ..sources.names import Skeleton, View
from .directory import whole_directory
from .extract_adapter import peft_targets, peft_task
from .finish import copy_inputs

BOTTLENECK = "a bottleneck adapter behind the layer, with a non-linearity, and no delta of its weight"


def write_adapter(model: Any, expert: int | None, base: str | None, out: Path, force: bool, token: str | None) -> None:
    """Write the adapter of an expert.

    Args:
        model: a mixture that was loaded; its heads per expert are taken apart.
        expert: its position; None for the mix that the mixture is for every input.
        base: where the base is; None for what the mixture names.
        out: the directory to make.
        force: replace an existing directory.
        token: Hub token.

    Raises:
        CoterieError: the expert is no low-rank pair everywhere, or nobody says what the base is.
    """
    handle, folder = model.coterie, Path(model.name_or_path)
    name = "mix" if expert is None else handle.expert_names[expert]
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    tensors: dict[str, torch.Tensor] = {}
    for path, shape in handle.spec.layers.items():
        bank = model.get_submodule(path).bank
        why = None
        if not bank.linear:
            raise CoterieError(f"expert {name!r} is {BOTTLENECK} (at {path!r})", str(folder), "keep the mixture")
        if bank.whole or shape.ranks is None or shape.bias:
            why = "has a bias of its own" if shape.bias else "is no low-rank pair"
            raise CoterieError(f"expert {name!r} {why} (at {path!r})", str(folder), "take it dense: without --adapter")
        if expert is None:
            weights = [model.get_submodule(path).router.score.weights[i] for i in shape.experts]
            down, up = (mixed(stack.detach(), weights) for stack in (bank.down, bank.up))
        elif expert in shape.experts:
            rows = bank.rows(shape.experts.index(expert))
            down, up = bank.down[rows].detach(), bank.up[rows].detach()
        else:
            continue
        if not len(down):
            continue
        ranks[path], scales[path] = len(down), shape.scale
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = down, up.T
    named = _base(folder, base, token)
    if expert is not None:
        handle.use_head(name)
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if isinstance(child, PerExpert):
                parent._modules[leaf] = child.answering
    skeleton, saved = _differing(model, named, handle.spec)
    for path in saved:
        module = model.get_submodule(path)
        tensors |= {f"{path}.{leaf}": tensor.detach() for leaf, tensor in module.state_dict().items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(scales.values()).most_common(1)[0][0]
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    config = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": scale * usual,
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != scale * usual},
        "target_modules": peft_targets(skeleton.model, set(ranks)),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(model.get_submodule(path), MixtureConv1D) for path in ranks),
        "task_type": peft_task(skeleton.model, any(path in saved for path in outside_base(skeleton.model))),
        "base_model_name_or_path": named.id if named.revision else str(named.path.resolve()),
        "revision": named.revision,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    with whole_directory(out, force, sources=[folder, named.path]) as made:
        whole = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        save_file(whole, made / "adapter_model.safetensors", metadata={"format": "pt"})
        (made / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        copy_inputs(folder, made)
        record = {"mixture": str(folder), "expert": name, "method": handle.spec.method}
        (made / "extracted.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        hub = f"base_model: {named.id}\n" if named.revision else ""
        title = f"Expert {name} of a {handle.spec.method} mixture"
        card = f"---\nlibrary_name: peft\n{hub}tags: [coterie, lora]\n---\n\n# {title}\n"
        (made / "README.md").write_text(card, encoding="utf-8")


def mixed(stack: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """`sum_i w_i` of the experts' blocks of a stack (R, d): (rank, d)."""
    blocks = stack.view(len(weights), -1, stack.shape[-1])
    return torch.einsum("e,erd->rd", torch.tensor(weights).to(blocks), blocks)


def _base(folder: Path, base: str | None, token: str | None) -> Location:
    """The base model's place.

    Raises:
        CoterieError: nobody says where it is.
    """
    if base is None:
        spec = Location(folder, str(folder)).json("config.json") or {}
        record = Location(folder, str(folder)).json("mixture.json") or {}
        named = spec.get("quantization_config", {}).get("base") or record.get("base") or {}
        if not named.get("id"):
            raise CoterieError(
                "does not say what its base is, which an adapter is of", str(folder), "give it: --base PATH_OR_HUB_ID"
            )
        base = f"{named['id']}@{named['revision']}" if named.get("revision") else str(named["id"])
    return locate(base, token)


def _differing(model: Any, named: Location, spec: Any) -> tuple[Skeleton, list[str]]:
    """A skeleton of the dense model, and paths of the modules whose tensors are not the base's.

    Raises:
        CoterieError: one of them is a layer that gets an adapter.
    """
    import transformers

    cls = getattr(transformers, type(model).__name__)
    config = cls.config_class.from_pretrained(named.path)
    config.id2label, config.label2id = model.config.id2label, model.config.label2id
    skeleton = Skeleton(cls, config)
    view = View(Checkpoint.open(named), skeleton)
    own = model.state_dict()
    heads = outside_base(skeleton.model)
    saved: dict[str, None] = {}
    for name in skeleton.tensors:
        if name in skeleton.tied:
            continue
        path, _, leaf = name.rpartition(".")
        mixed = path in spec.layers
        value = own[f"{path}.base_weight" if mixed and leaf == "weight" else name]
        if name in view and view.get(name).shape == value.shape and same(value, view.get(name)):
            continue
        if mixed:
            raise CoterieError(
                f"{name!r} was trained beside its experts, and no adapter holds both",
                named.id,
                "take it dense: without --adapter",
            )
        saved[next((head for head in heads if name.startswith(f"{head}.")), path)] = None
    return skeleton, list(saved)
