"""Multi-head routing: skills are mixed for each block of the dimensions (Caccia et al. 2023, arXiv:2211.03831)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, Dropout, Rank, fresh
from .registry import Mixture, method


@method("mhr", cite="Caccia et al. 2023, arXiv:2211.03831")
def assemble(
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    tasks: Annotated[int, Field(ge=1, description="tasks that `task_ids` count")] = 8,
    splits: Annotated[int, Field(ge=2, description="blocks of the dimensions with shares of their own")] = 4,
) -> Mixture:
    """As poly, with a share of its own for each block of the input's and output's dimensions."""
    return Mixture(
        experts=fresh(rank, "lora", alpha, dropout),
        routing=Routing(
            score="skills",
            select="given",
            pool="task",
            combine="factors",
            score_options={"tasks": tasks, "splits": splits, "relaxed": False},
        ),
    )
