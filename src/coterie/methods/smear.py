"""SMEAR: soft merging of experts with adaptive routing (Muqeeth et al. 2024, arXiv:2306.03745)."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, Dropout, ExamplePool, ExpertDropout, Kind, Rank, Segment, fresh
from .registry import Mixture, method


@method("smear", cite="Muqeeth et al. 2024, arXiv:2306.03745, section 3")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    expert_dropout: ExpertDropout = 0.1,
    pool: ExamplePool = "sequence",
    segment: Segment = 256,
) -> Mixture:
    """One merged expert for each example: the experts' parameters, averaged by the router's gates, then applied."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="linear",
            select="softmax",
            pool=pool,
            combine="factors",
            segment=segment,
            select_options={"dropout": expert_dropout},
        ),
    )
