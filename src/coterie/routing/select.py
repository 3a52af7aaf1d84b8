"""Selections: from scores to gates."""

from __future__ import annotations

import torch


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Softmax over the experts, keep the k largest, renormalise over them.

    Renormalising makes this the softmax over the k kept scores; with k = 1 the gate is exactly 1.

    Args:
        scores: (..., E) float32.
        k: how many experts answer; at least 1, at most E.

    Returns:
        (..., E) float32 gates that sum to 1, zero for the experts that are not chosen.
    """
    if scores.shape[-1] == 1:
        return torch.ones_like(scores)
    values, index = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, values.softmax(-1))
