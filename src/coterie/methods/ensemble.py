"""Dense soft routing: every expert answers, and the outputs are averaged by the gates."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, AnyPool, Dropout, ExpertDropout, Kind, Rank, Segment, fresh
from .registry import Mixture, method


@method(
    "ensemble",
    cite="the ensemble baseline of Muqeeth et al. 2024, arXiv:2306.03745; per token MoLoRA, arXiv:2309.05444",
)
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    expert_dropout: ExpertDropout = 0.0,
    pool: AnyPool = "sequence",
    segment: Segment = 256,
) -> Mixture:
    """Every expert answers, weighted by the router's gates: the compute of all of them."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="linear",
            select="softmax",
            pool=pool,
            segment=segment,
            select_options={"dropout": expert_dropout},
        ),
    )
