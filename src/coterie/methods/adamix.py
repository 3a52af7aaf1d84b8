"""AdaMix: random experts in training, one averaged expert in use (Wang et al. 2022, arXiv:2205.12410)."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, Rank, Weight, fresh
from .registry import Mixture, method


@method("adamix", cite="Wang et al. 2022, arXiv:2205.12410")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    consistency: Weight = 1.0,
) -> Mixture:
    """Training runs two passes through random experts that must agree; use averages all experts into one."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="level",
            select="uniform",
            pool="task",
            combine="factors",
            losses={"consistency": consistency},
        ),
    )
