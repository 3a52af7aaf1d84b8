"""Hash routing: each example has one expert in each layer, at random and for good."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, PromptPool, Rank, fresh
from .registry import Mixture, method


@method(
    "hash",
    cite="the hash baseline of Muqeeth et al. 2024, arXiv:2306.03745; after Roller et al. 2021, arXiv:2106.04426",
)
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    pool: PromptPool = "sequence",
) -> Mixture:
    """A random expert for each example and layer, fixed by its content: what routing adds is measured from here."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(score="hash", select="first", pool=pool),
    )
