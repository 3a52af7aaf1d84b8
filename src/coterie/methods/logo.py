"""LoGo: what experts say of a prompt in one layer weighs them everywhere (Lee et al. 2025, arXiv:2511.07129)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..experts.fit import TruncatedSVD
from ..routing.router import Routing
from .parts import BuiltRank
from .registry import Mixture, method


@method("logo", cite="Lee et al. 2025, arXiv:2511.07129, section 3")
def assemble(
    rank: BuiltRank = "full",
    top_k: Annotated[int, Field(ge=1, description="experts that answer; all where there are fewer")] = 20,
    signal: Annotated[
        Literal["norm", "entropy"],
        Field(description="of an expert's output o: its norm, or the inverse entropy of softmax(o)"),
    ] = "norm",
    layer: Annotated[
        str, Field(description="glob of the layer that is listened to, the last that matches; the paper: q_proj")
    ] = "*",
) -> Mixture:
    """A pass without experts, then each example's experts are weighed by what they would give for its last token."""
    routing = Routing(
        "signal", "shares", top_k, pool="prompt", score_options={"signal": signal, "layer": layer, "weights": []}
    )
    return Mixture(TruncatedSVD(rank), routing)
