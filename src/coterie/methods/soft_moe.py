"""Soft MoE: experts read mixtures of an example's tokens (Puigcerver et al. 2024, arXiv:2308.00951)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, Rank, fresh
from .registry import Mixture, method


@method("soft_moe", cite="Puigcerver et al. 2024, arXiv:2308.00951")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    slots: Annotated[int, Field(ge=1, description="mixtures of tokens that an expert reads")] = 1,
) -> Mixture:
    """Each expert reads its slots, mixtures of all tokens of an example, and each token a mixture of their outputs."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(score="soft", select="given", k=slots, combine="slots"),
    )
