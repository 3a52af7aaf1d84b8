"""SpectR: experts are scored by the norm of what they would give (Fleshman & Van Durme 2025, arXiv:2504.03454)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..experts.fit import TruncatedSVD
from ..routing.router import Routing
from .parts import BuiltRank, LibraryPool, Temperature
from .registry import Mixture, method


@method("spectr", cite="Fleshman & Van Durme 2025, arXiv:2504.03454, section 3")
def assemble(
    rank: BuiltRank = "full",
    top_k: Annotated[int, Field(ge=1, description="experts that answer; all where there are fewer")] = 4,
    temperature: Temperature = 1.0,
    pool: LibraryPool = "token",
) -> Mixture:
    """Experts are scored by `|S_i V_i^T x| = |B_i A_i x|`: all of a delta's directions count, weighted."""
    return Mixture(
        experts=TruncatedSVD(rank, energies=True),
        routing=Routing("subspace_energy", "top_k", top_k, pool, select_options={"temperature": temperature}),
    )
