"""The rungs between an expert and a mixture of truncated experts, each the previous one with one thing taken away.

expert -> only the deltas of its linear layers (norms and the rest as in the base), by an oracle that knows the task ->
those deltas truncated to the mixture's rank -> the mixture's own routing in place of the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..experts.factorise import thin_svd
from ..merging.linear import State


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers of an encoder's blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.layer.")
    ]


def linear_deltas(base: State, delta: State, layers: list[str], rank: int | None = None) -> dict[str, Tensor]:
    """The base with one expert's deltas of the given linear layers, truncated or whole; biases follow whole.

    Args:
        base: tensors of the base.
        delta: the expert's delta.
        layers: paths of linear layers.
        rank: singular directions kept of each weight's delta; None for all.
    """
    state = dict(base)
    for name in (f"{layer}.{part}" for layer in layers for part in ("weight", "bias")):
        if name in delta:
            change = delta[name]
            if rank is not None and change.ndim == 2:
                change = truncated(change, rank)
            state[name] = base[name] + change
    return state


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The matrix's leading `rank` singular directions, in its own dtype."""
    f = thin_svd(matrix, rank)
    return ((f.u * f.s) @ f.vt).to(matrix.dtype)


def load(model: nn.Module, state: State) -> nn.Module:
    """The model with these tensors copied into it."""
    with torch.no_grad():
        model.load_state_dict(dict(state))
    return model
