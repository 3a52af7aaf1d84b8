"""Straight-through Gumbel-softmax routing to one expert."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, AnyPool, Dropout, Kind, Rank, Segment, fresh
from .registry import Mixture, method


@method("st_gumbel", cite="Jang et al. 2017, arXiv:1611.01144; as in Muqeeth et al. 2024, arXiv:2306.03745")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    pool: AnyPool = "sequence",
    segment: Segment = 256,
    temperature: Annotated[float, Field(gt=0, description="of the relaxed sample, at first")] = 10.0,
    anneal: Annotated[float, Field(ge=0, description="the temperature falls as exp(-anneal * step)")] = 1e-4,
) -> Mixture:
    """One expert answers, sampled in training; its gate is 1 with the gradient of the relaxed sample."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="linear",
            select="gumbel",
            pool=pool,
            segment=segment,
            select_options={"temperature": temperature, "anneal": anneal},
        ),
    )
