"""Known tasks: each example goes to the expert of its task."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, Rank, fresh
from .registry import Mixture, method


@method("tag", cite="the metadata baseline of Muqeeth et al. 2024, arXiv:2306.03745")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    share: Annotated[
        list[int] | None, Field(description="the expert of each task, where tasks share experts; none: one each")
    ] = None,
) -> Mixture:
    """One expert for each task, chosen by the example's task, which is known."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(score="task", select="first", pool="task", score_options={"share": share}),
    )
