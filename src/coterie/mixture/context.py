"""The routing context: what mixture layers must know beyond their input, shared by all layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CoterieError
from ..routing.decision import Decision


@dataclass
class Context:
    """Set through `model.coterie`, read by every mixture layer.

    Attributes:
        path: the compute path that is forced, or "auto".
        weights: one decision for every call: a weight per expert of the mixture; None where layers decide.
        gates: decisions given from outside, (batch, tokens or 1, experts of the mixture), float32; else None.
        active: how many experts `gates` gives a token at most.
        recorders: called with (layer, gates (..., candidates)) for each layer of a call.
    """

    path: str = "auto"
    weights: tuple[float, ...] | None = None
    gates: torch.Tensor | None = None
    active: int = 1
    recorders: list[Callable[[Any, torch.Tensor], None]] = field(default_factory=list)

    def given(self, leading: torch.Size, candidates: tuple[int, ...], device: torch.device) -> Decision:
        """The decision that was given from outside, for a layer's tokens.

        Args:
            leading: the shape of the layer's input without its width.
            candidates: the layer's experts.
            device: where the layer computes.

        Raises:
            CoterieError: the layer's tokens do not belong to the examples that gates were given for.
        """
        assert self.gates is not None
        batch, tokens, _ = self.gates.shape
        first, rest = leading[0] if leading else 1, leading[1:].numel()
        if first != batch or (tokens > 1 and rest != tokens):
            given = f"{batch} rows" + (f" of {tokens} tokens" if tokens > 1 else "")
            seen = " x ".join(map(str, leading)) or "1"
            raise CoterieError(
                f"experts were given for {given}, and a layer's input has {seen} rows and tokens",
                "model.coterie.route",
                "give one expert per row that the model sees (with beams: per beam); models whose layers do not see "
                "examples first take one decision for all",
            )
        gates = self.gates[..., list(candidates)].to(device)
        return Decision(len(candidates), None, gates.expand(batch, rest, -1).reshape(batch * rest, -1))
