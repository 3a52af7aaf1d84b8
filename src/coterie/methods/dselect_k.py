"""DSelect-k: sparse gates that are smooth in training (Hazimeh et al. 2021, arXiv:2106.03760)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, Dropout, ExamplePool, Kind, Rank, Segment, Weight, fresh
from .registry import Mixture, method


@method("dselect_k", cite="Hazimeh et al. 2021, arXiv:2106.03760")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    top_k: Annotated[int, Field(ge=1, description="single-expert selectors that are mixed")] = 1,
    gamma: Annotated[float, Field(gt=0, description="width of the smooth step")] = 1.0,
    entropy: Weight = 0.1,
    pool: ExamplePool = "sequence",
    segment: Segment = 256,
) -> Mixture:
    """Experts under binary codes with smooth bits: gates turn one-hot as bits saturate; training runs all experts."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="dselect",
            select="given",
            pool=pool,
            segment=segment,
            score_options={"selectors": top_k, "gamma": gamma},
            losses={"entropy": entropy},
        ),
    )
