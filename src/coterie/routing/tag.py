"""No score at all: the task is known, and its name decides."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import CoterieError


class Tag(nn.Module):
    """The expert is named from outside, for every token of a call (`model.coterie.route`)."""

    reads = "rows"

    def __init__(self, width: int = 0, experts: int = 0):
        super().__init__()

    def forward(self, z: torch.Tensor | None = None) -> torch.Tensor:
        """Refuses: nothing in an input tells its task."""
        raise CoterieError(
            "this mixture holds one model per task, and the call names none",
            "model.coterie.route",
            'name one expert (or one mix) for the whole call: `with model.coterie.route("NAME"): ...`',
        )
