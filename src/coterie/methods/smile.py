"""SMILE: zero-shot sparse mixture of low-rank experts (Tang et al. 2024, arXiv:2408.10174)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..errors import CoterieError
from ..experts.fit import TruncatedSVD
from ..routing.router import Routing
from .parts import LibraryPool
from .registry import Mixture, method

if TYPE_CHECKING:
    from torch import nn

Rank = Annotated[int, Field(ge=1)] | Literal["full", "dense"]


@method("smile", cite="Tang et al. 2024, arXiv:2408.10174")
def assemble(
    rank: Annotated[
        Rank, Field(description="singular directions kept per expert; full: all; dense: the delta itself")
    ] = 32,
    gate_rank: Annotated[int, Field(ge=1, description="leading right singular directions that score an expert")] = 16,
    top_k: Annotated[int, Field(ge=1, description="experts that answer a token")] = 1,
    pool: LibraryPool = "token",
) -> Mixture:
    """Experts are truncated SVDs of the deltas; a token goes where its energy lies. No data, no training."""
    return Mixture(
        experts=TruncatedSVD(rank, gate_rank),
        routing=Routing("subspace_energy", "top_k", top_k, pool),
    )


def smile(base: nn.Module, experts: dict[str, nn.Module], **options: Any) -> Any:
    """A SMILE mixture from live modules, in memory; neither the base nor the experts are modified.

    Args:
        base: the base model, any `nn.Module`.
        experts: name -> fine-tuned copy of the base, of the same architecture.
        **options: the method's parameters (`rank`, `gate_rank`, `top_k`, `pool`) and the recipe's `others`, `include`,
            `exclude` and `weights` (name -> factor on the expert's delta).

    Returns:
        A copy of the base with mixture layers, in eval mode, with a `coterie` handle.

    Raises:
        CoterieError: bad parameters, or modules that do not match.
    """
    from transformers import PreTrainedModel

    from ..building.in_memory import build_in_memory

    if options.get("pool", "token") != "token" and not isinstance(base, PreTrainedModel):
        raise CoterieError(
            f"a {type(base).__name__} is no transformers model, whose calls tell examples and prompts apart",
            "pool",
            "leave it out: each token is routed by itself",
        )

    return build_in_memory("smile", base, experts, **options)
