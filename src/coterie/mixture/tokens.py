"""What the inputs of a call say of its examples: which tokens count, and what identifies the content."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..errors import CoterieError
from ..routing.pooling import masked_mean


def counting(mask: Any, cache: Any, tokens: int) -> Tensor | None:
    """(batch, tokens at least) bool, the tokens that count under a model's attention mask; None where it says nothing.

    A mask (batch, 1, tokens, keys), as `generate` makes for caches of a fixed size, lets a token see itself if it
    counts. A dictionary holds such masks of several kinds of layers.
    """
    if isinstance(mask, dict):
        mask = next((each for each in mask.values() if isinstance(each, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = mask[:, 0, -tokens:].diagonal(past, dim1=1, dim2=2)
        return mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()


def unless_all(valid: Tensor) -> Tensor | None:
    """None where all count, as far as that can be told without waiting for a device."""
    told = valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all())
    return None if told else valid


def mean_of(states: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of an encoder's states (batch, tokens, d) that count; of all, where the mask is of other tokens."""
    return masked_mean(states, valid if valid is not None and valid.shape == states.shape[:2] else None)


def by_example(name: str, values: Any, main: Tensor) -> Tensor:
    """(batch,) int64, a number for each example.

    Raises:
        CoterieError: another shape or dtype.
    """
    try:
        values = torch.as_tensor(values, device=main.device)
    except (TypeError, ValueError, RuntimeError):
        raise CoterieError(f"{name} is {str(values)[:80]!r}", "forward", f"give ({len(main)},) int64") from None
    if values.shape != (len(main),) or values.is_floating_point():
        raise CoterieError(
            f"{name} has shape {tuple(values.shape)} and dtype {values.dtype}", "forward", f"give ({len(main)},) int64"
        )
    return values.long()


def content_hash(values: Tensor, valid: Tensor | None) -> Tensor:
    """(batch,) int64 hash of each example's content; padding does not enter.

    Args:
        values: (batch, tokens) ids, or (batch, ...) numbers.
        valid: (batch, tokens) bool, which tokens count; None for all.
    """
    flat = values.flatten(1)
    flat = flat.float().contiguous().view(torch.int32).long() if flat.is_floating_point() else flat.long()
    if valid is None or valid.shape != flat.shape:
        valid = torch.ones_like(flat, dtype=torch.bool)
    place = valid.long().cumsum(1)
    mixed = (flat + 0x51ED27) * (place * 2 + 1) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 31)) * 0x2545F4914F6CDD1D
    return (mixed * valid).sum(1)


def counted(model: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """(batch, tokens) bool, the tokens of a model's layers that count under the mask of its inputs.

    Of a model that makes frames of raw samples, the frames that are made of samples alone.

    Args:
        model: any; one for speech has transformers' `_get_feat_extract_output_lengths`.
        inputs: of its forward.
        mask: (batch, inputs) bool.
    """
    count = getattr(model, "_get_feat_extract_output_lengths", None)
    if count is None or not isinstance(inputs.get("input_values"), Tensor):
        return mask
    adapter = "add_adapter" in inspect.signature(count).parameters  # what shortens once more, behind all layers
    squeezed = getattr(model.config, "squeeze_factor", 1)

    def made(samples: Tensor) -> Tensor:
        return (count(samples, add_adapter=False) if adapter else count(samples)) // squeezed

    total = int(made(torch.tensor(mask.shape[1])))
    return torch.arange(total, device=mask.device) < made(mask.sum(1))[:, None]
