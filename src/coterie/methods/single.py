"""One expert, no router: the reference at equal compute, or with a rank E times as large at equal parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..experts.fresh import Fresh
from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, Rank
from .registry import Mixture, method


@method("single", cite="the single-expert baselines of Muqeeth et al. 2024, arXiv:2306.03745; LoRA, arXiv:2106.09685")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    stabilised: Annotated[bool, Field(description="scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)")] = False,
) -> Mixture:
    """One expert and no router."""
    return Mixture(
        experts=Fresh(rank, expert, alpha, stabilised, dropout),
        routing=Routing(score="level", select="given", pool="task"),
    )
