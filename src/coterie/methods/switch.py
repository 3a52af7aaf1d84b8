"""Top-k routing: the likeliest experts answer, times their probabilities (Fedus et al. 2022, arXiv:2101.03961)."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, AnyPool, Dropout, ExpertDropout, Kind, Rank, Segment, TopK, Weight, fresh
from .registry import Mixture, method


@method("switch", cite="Fedus et al. 2022, arXiv:2101.03961; z-loss: Zoph et al. 2022, arXiv:2202.08906")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    top_k: TopK = 1,
    pool: AnyPool = "token",
    segment: Segment = 256,
    expert_dropout: ExpertDropout = 0.0,
    balance: Weight = 0.01,
    z_loss: Weight = 0.001,
) -> Mixture:
    """The top-k experts answer, each times its probability; load-balancing and z-loss keep all in use."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="linear",
            select="top_k",
            k=top_k,
            pool=pool,
            segment=segment,
            select_options={"renormalise": False, "dropout": expert_dropout},
            losses={"balance": balance, "z": z_loss},
        ),
    )
