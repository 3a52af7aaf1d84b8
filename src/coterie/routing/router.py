"""The router of a layer: a score and a selection, each chosen by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .energy import SubspaceEnergy
from .select import TopK

SCORES = {"subspace_energy": SubspaceEnergy}
SELECTIONS = {"top_k": TopK}


@dataclass(frozen=True)
class Routing:
    """How a mixture's layers route, in plain data.

    Attributes:
        score: how well an expert suits an input (a name in `SCORES`).
        select: which experts answer, how strongly (a name in `SELECTIONS`).
        k: how many experts answer.
    """

    score: str
    select: str
    k: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def router(self, widths: list[int], gate_rank: int) -> Router:
        """The router of a layer whose bank projects to `widths` rows per candidate."""
        return Router(SCORES[self.score](widths, gate_rank), SELECTIONS[self.select](self.k), len(widths))


class Router(nn.Module):
    """Gates from what the bank projects: scored, selected, all in float32; a lone candidate needs no score.

    Args:
        score: projections -> scores (..., E).
        select: scores -> gates (..., E).
        experts: E, the layer's candidates.
    """

    def __init__(self, score: nn.Module, select: nn.Module, experts: int):
        super().__init__()
        self.score, self.select, self.experts = score, select, experts

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Gates (..., E), float32, from the bank's projections (..., rows)."""
        if self.experts == 1:
            return torch.ones(*z.shape[:-1], 1, dtype=torch.float32, device=z.device)
        gates: torch.Tensor = self.select(self.score(z))
        return gates
