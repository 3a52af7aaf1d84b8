"""Arrow: tokens go to the experts whose leading direction they lie along (Ostapenko et al. 2024, arXiv:2405.11157)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..experts.fit import TruncatedSVD
from ..experts.given import GivenFactors
from ..routing.router import Routing
from .parts import BuiltRank, LibraryPool, Temperature
from .registry import Mixture, method

TopK = Annotated[int, Field(ge=1, description="experts that answer; all where there are fewer")]


@method("arrow", cite="Ostapenko et al. 2024, arXiv:2405.11157, section 4; outputs mixed as PEFT does")
def arrow(
    rank: BuiltRank = "full", top_k: TopK = 4, temperature: Temperature = 1.0, pool: LibraryPool = "token"
) -> Mixture:
    """Experts are scored by `|x . v_i|`, v_i their deltas' top right singular vector, exactly; outputs are mixed."""
    return Mixture(
        experts=TruncatedSVD(rank, gate_rank=1),
        routing=Routing("subspace_energy", "top_k", top_k, pool, select_options={"temperature": temperature}),
    )


@method(
    "arrow_factors", cite="Ostapenko et al. 2024, arXiv:2405.11157, and the authors' code (factors mixed per token)"
)
def arrow_factors(top_k: TopK = 4, temperature: Temperature = 1.0, pool: LibraryPool = "token") -> Mixture:
    """As arrow, but the experts' A and B are averaged before they are applied, as the authors' code does."""
    return Mixture(
        experts=GivenFactors(gate_rank=1),
        routing=Routing(
            "subspace_energy", "top_k", top_k, pool, "factors", select_options={"temperature": temperature}
        ),
    )
