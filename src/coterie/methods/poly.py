"""Polytropon: each task is a learned mixture of latent skills (Ponti et al. 2023, arXiv:2202.13914)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, Rank, fresh
from .registry import Mixture, method


@method("poly", cite="Ponti et al. 2023, arXiv:2202.13914")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    tasks: Annotated[int, Field(ge=1, description="tasks that `task_ids` count")] = 8,
    relaxed: Annotated[bool, Field(description="training samples a task's skills from a relaxed Bernoulli")] = True,
) -> Mixture:
    """A task's share of every skill is learned, and the skills' parameters are averaged by it; the task is known."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="skills",
            select="given",
            pool="task",
            combine="factors",
            score_options={"tasks": tasks, "relaxed": relaxed},
        ),
    )
