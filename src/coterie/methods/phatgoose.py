"""PHATGOOSE and average activation: an expert answers what looks like its own data, by one vector for each layer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..experts.fit import TruncatedSVD
from ..routing.router import Routing
from .parts import BuiltRank, LibraryPool, Temperature
from .registry import Mixture, method

TopK = Annotated[int, Field(ge=1, description="experts that answer; all where there are fewer")]


@method("phatgoose", cite="Muqeeth et al. 2024, arXiv:2402.05859, section 3")
def phatgoose(
    rank: BuiltRank = "full", top_k: TopK = 2, temperature: Temperature = 1.0, pool: LibraryPool = "token"
) -> Mixture:
    """Experts are scored by their gates, which were trained on their own data after them (`gate` statistics)."""
    return _by_vectors("gate", rank, top_k, temperature, pool)


@method("average_activation", cite="the average-activation baseline of Muqeeth et al. 2024, arXiv:2402.05859")
def average_activation(
    rank: BuiltRank = "full", top_k: TopK = 2, temperature: Temperature = 1.0, pool: LibraryPool = "token"
) -> Mixture:
    """As phatgoose, by the mean of what a layer reads of each expert's own examples (`activation` statistics)."""
    return _by_vectors("activation", rank, top_k, temperature, pool)


def _by_vectors(kind: str, rank: BuiltRank, top_k: int, temperature: float, pool: LibraryPool) -> Mixture:
    routing = Routing("vectors", "top_k", top_k, pool, select_options={"temperature": temperature})
    return Mixture(TruncatedSVD(rank), routing, statistics=kind)
