"""Which linear layers does a forward pass really call? A probe on the meta device, before any weight is read."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .layer import MIXTURE_OF


def probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Meta tensors that a transformers model of any modality takes: ids, pixels, audio features."""
    config = model.config
    text = config.get_text_config()
    vision = getattr(config, "vision_config", config)
    accepted = inspect.signature(model.forward).parameters
    meta: dict[str, Any] = {"device": "meta"}
    inputs: dict[str, torch.Tensor] = {}
    if "pixel_values" in accepted:
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width, **meta)
    if "input_features" in accepted:
        bins = getattr(config, "num_mel_bins", 80)
        inputs["input_features"] = torch.zeros(1, bins, 2 * getattr(config, "max_source_positions", 100), **meta)
    if "input_values" in accepted:
        inputs["input_values"] = torch.zeros(1, 16000, **meta)
    if "input_ids" in accepted:
        inputs["input_ids"] = torch.zeros(
            1, min(8, getattr(text, "max_position_embeddings", 8) or 8), dtype=torch.long, **meta
        )
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = torch.zeros(1, 4, dtype=torch.long, **meta)
    return inputs


class _Answers(TorchDispatchMode):
    """Lets checks of the data pass on the meta device: a truth value is true, a number zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool
        return func(*args, **(kwargs or {}))


@dataclass
class Probe:
    """What a probe forward saw.

    Attributes:
        calls: every call of a linear layer, in order: its path and its input.
        broke: why the probe broke off, or None.
    """

    calls: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    broke: str | None = None

    @property
    def called(self) -> set[str] | None:
        """Paths of the linear layers that were called; None where the probe broke off."""
        return None if self.broke else {path for path, _, _ in self.calls}

    def siblings(self) -> list[list[str]]:
        """Groups of layers that are always given the same tensor, unchanged, in the order of their calls."""
        readers: dict[tuple[int, int], list[str]] = {}
        for path, x, version in self.calls:
            readers.setdefault((id(x), version), []).append(path)
        groups = list(dict.fromkeys(tuple(group) for group in readers.values()))
        return [
            list(group)
            for group in groups
            if len(set(group)) == len(group) > 1 and not any(set(group) & set(g) for g in groups if g != group)
        ]


def probe(model: Any) -> Probe:
    """Run a forward pass of a meta-device model and see which linear layers it calls, and on what.

    Args:
        model: a transformers model on the meta device.
    """
    seen = Probe()
    model = copy.deepcopy(model).to(torch.bfloat16)  # on the meta device, grouped matrix products know no float32
    hooks = [
        module.register_forward_pre_hook(lambda _m, a, path=path: seen.calls.append((path, a[0], a[0]._version)))
        for path, module in model.named_modules()
        if type(module) in MIXTURE_OF
    ]
    try:
        with torch.inference_mode(False), torch.no_grad(), _Answers():
            model(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in probe_inputs(model).items()})
    except Exception as error:  # any architecture may refuse to run without data; the caller reports it
        seen.broke = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def reads_weights_directly(ancestors: list[nn.Module]) -> str | None:
    """Modules whose fast paths read their linears' weights, so that experts there would be ignored."""
    for module in ancestors:
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return f"torch's {type(module).__name__} reads its weight directly"
    return None
