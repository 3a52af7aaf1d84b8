"""Retrieval: experts answer for a whole example, by the embedding of its text (`model.coterie.retrieve`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..experts.fit import TruncatedSVD
from ..experts.given import GivenFactors
from ..routing.router import Routing
from .parts import BuiltRank, Temperature
from .registry import Mixture, method

TopK = Annotated[int, Field(ge=1, description="experts that answer; all where there are fewer")]
Composition = Annotated[
    Literal["selection", "mixture", "fusion"],
    Field(description="selection: the nearest expert; mixture: outputs of the top_k averaged; fusion: their factors"),
]


@method("retriever", cite="Zhao et al. 2024, arXiv:2402.09997 (LoraRetriever)")
def retriever(top_k: TopK = 3, combine: Composition = "mixture", rank: BuiltRank = "full") -> Mixture:
    """The experts whose examples' mean embedding is nearest to the text answer alike (`task` embeddings)."""
    routing = Routing(
        "retrieval",
        "shares",
        1 if combine == "selection" else top_k,
        "task",
        "factors" if combine == "fusion" else "outputs",
        select_options={"level": True},
    )
    return Mixture(GivenFactors(gate_rank=0) if combine == "fusion" else TruncatedSVD(rank), routing, statistics="task")


@method("nearest_example", cite="the retrieval baseline of Muqeeth et al. 2024, arXiv:2402.05859")
def nearest_example(rank: BuiltRank = "full") -> Mixture:
    """The expert answers that has the example nearest to the text (`examples` embeddings)."""
    return Mixture(TruncatedSVD(rank), Routing("retrieval", "first", pool="task"), statistics="examples")


@method("task_embedding", cite="Dhasade et al. 2026, arXiv:2601.21795 (LoRAuter)")
def task_embedding(top_k: TopK = 3, temperature: Temperature = 0.2, rank: BuiltRank = "full") -> Mixture:
    """The top_k experts by their tasks' embedding answer, outputs weighed by the softmax of the similarities."""
    routing = Routing("retrieval", "top_k", top_k, "task", select_options={"temperature": temperature})
    return Mixture(TruncatedSVD(rank), routing, statistics="task")
