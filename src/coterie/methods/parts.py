"""Parameters that trained methods share, and what they make."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..experts.fresh import Fresh

Rank = Annotated[int, Field(ge=1, description="of each expert's low-rank pair, or a bottleneck's width")]
BuiltRank = Annotated[
    Annotated[int, Field(ge=1)] | Literal["full"],
    Field(description="singular directions kept of each delta; full: all, which is exact for adapters"),
]
Temperature = Annotated[float, Field(gt=0, description="scores are divided by it before the softmax")]
Kind = Annotated[
    Literal["lora", "bottleneck"],
    Field(description="lora: a low-rank pair beside a layer; bottleneck: an adapter with a non-linearity behind it"),
]
Alpha = Annotated[float | None, Field(gt=0, description="LoRA's alpha, the scale is alpha / rank; none: scale 1")]
Dropout = Annotated[float, Field(ge=0, lt=1, description="on what experts read, in training")]
ExpertDropout = Annotated[float, Field(ge=0, lt=1, description="share of experts left out of a choice, in training")]
ExamplePool = Annotated[
    Literal["sequence", "prompt", "segment"],
    Field(description="what a decision reads and holds for; causal models need prompt or segment"),
]
AnyPool = Annotated[
    Literal["token", "sequence", "prompt", "segment"],
    Field(description="what a decision reads and holds for; causal models need token, prompt or segment"),
]
LibraryPool = Annotated[
    Literal["token", "sequence", "prompt", "model"],
    Field(
        description="what a decision reads (the mean of so much) and holds for; model: all layers follow their vote in "
        "a pass without experts; causal models: token, prompt or model"
    ),
]
PromptPool = Annotated[
    Literal["sequence", "prompt"],
    Field(description="what a decision reads and holds for; causal models need prompt"),
]
Segment = Annotated[int, Field(ge=1, description="tokens of a segment, where that is the pool")]
TopK = Annotated[int, Field(ge=1, description="experts that answer")]
Weight = Annotated[float, Field(ge=0, description="of this term in the model's loss")]


def fresh(rank: int, expert: Literal["lora", "bottleneck"], alpha: float | None, dropout: float) -> Fresh:
    """Experts to train."""
    return Fresh(rank, expert, alpha, dropout=dropout)
