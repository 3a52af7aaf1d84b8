"""CAT: a learned share of each LoRA in each layer (Prabhakar et al. 2024, LoRA Soups, arXiv:2410.13025)."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, Dropout, Rank, fresh
from .registry import Mixture, method


@method("cat", cite="Prabhakar et al. 2024, arXiv:2410.13025, section 3")
def assemble(rank: Rank = 16, alpha: Alpha = None, dropout: Dropout = 0.0) -> Mixture:
    """`sum_i softmax(a)_i B_i A_i`: one learned scalar for each expert in each layer, the same for every input.

    The experts are trained before, each on its own task, and only the scalars on a little of all tasks:
    `coterie.wrap(mixture, MixtureConfig(method="cat"), train="routers")`.
    """
    return Mixture(
        experts=fresh(rank, "lora", alpha, dropout), routing=Routing(score="scalars", select="softmax", pool="task")
    )
