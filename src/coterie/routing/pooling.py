"""Over what a router decides: each token, or something that it reads once for many tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .precise import precise

# token: each for itself. sequence: once per example. prompt: once per example, from its prompt alone (MiLoRA,
# arXiv:2410.18035). segment: a segment follows the one before it (Lory, arXiv:2405.03133), what comes after the prompt
# follows the prompt. model: once per example (or prompt) for all layers, which vote in a pass without experts. task:
# nothing of the input enters.
Pool = Literal["token", "sequence", "prompt", "segment", "model", "task"]


@precise
def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of the tokens that count, (batch, d), in float32 at least.

    Args:
        x: (batch, tokens, d).
        valid: (batch, tokens) bool, which tokens count; None for all. A row in which none does gives zeros.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if valid is None:
        return x.sum(1, dtype=dtype) / x.shape[1]  # half of what torch's mean takes
    share = valid.to(dtype)
    # A product of batches: einsum takes eight times as long over it.
    return torch.bmm(share[:, None], x.to(dtype))[:, 0] / share.sum(1, keepdim=True).clamp(min=1)


def segments_of(valid: Tensor, length: int) -> Tensor:
    """The segment that each token belongs to, (batch, tokens) int64: `length` tokens that count make one."""
    return (valid.cumsum(1) - 1).clamp(min=0) // length


@precise
def segment_means(x: Tensor, valid: Tensor, segments: Tensor, count: int) -> Tensor:
    """The mean of each segment's tokens that count, (batch, count, d), in float32 at least; zeros for empty ones."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    belongs = torch.nn.functional.one_hot(segments, count).to(x.dtype) * valid[..., None].to(x.dtype)
    return torch.bmm(belongs.transpose(1, 2), x) / belongs.sum(1).clamp(min=1)[..., None]
