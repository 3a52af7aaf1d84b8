"""X-LoRA: the model's own hidden states weigh its experts (Buehler & Buehler 2024, arXiv:2402.07148)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ..routing.router import Routing
from .parts import Alpha, Dropout, Rank, fresh
from .registry import Mixture, method

Depth = Annotated[int, Field(ge=1, description="linear layers of the classifier")]
Inner = Annotated[int, Field(ge=1, description="width between the classifier's layers")]
Layerwise = Annotated[bool, Field(description="gates of its own for each layer; else one set for all")]
ClassifierDropout = Annotated[float, Field(ge=0, lt=1, description="between the classifier's layers, in training")]
Temperature = Annotated[float, Field(gt=0, description="the classifier's logits are divided by it")]
Kept = Annotated[int | None, Field(ge=1, description="gates of a token that are kept, as they are; none: all")]


@method("xlora", cite="Buehler & Buehler 2024, arXiv:2402.07148")
def xlora(
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    depth: Depth = 1,
    inner: Inner = 2048,
    layerwise: Layerwise = True,
    classifier_dropout: ClassifierDropout = 0.2,
    temperature: Temperature = 1.0,
    keep: Kept = None,
) -> Mixture:
    """A pass without experts, then a classifier of its last hidden states weighs each token's experts: exact."""
    options = _options(depth, inner, layerwise, classifier_dropout, temperature, keep)
    return Mixture(fresh(rank, "lora", alpha, dropout), Routing("prepass", "given", score_options=options))


@method(
    "xlora_frozen",
    cite="Buehler & Buehler 2024, arXiv:2402.07148; gates frozen after the prompt as in arXiv:2410.18035",
)
def xlora_frozen(
    rank: Rank = 16,
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    depth: Depth = 1,
    inner: Inner = 2048,
    layerwise: Layerwise = True,
    classifier_dropout: ClassifierDropout = 0.2,
    temperature: Temperature = 1.0,
    keep: Kept = None,
) -> Mixture:
    """As xlora on the prompt; every later token keeps the gates of the prompt's last one, so decoding runs one pass."""
    options = _options(depth, inner, layerwise, classifier_dropout, temperature, keep)
    return Mixture(
        fresh(rank, "lora", alpha, dropout), Routing("prepass", "given", pool="prompt", score_options=options)
    )


def _options(
    depth: int, inner: int, layerwise: bool, dropout: float, temperature: float, keep: int | None
) -> dict[str, Any]:
    return {
        "layerwise": layerwise,
        "depth": depth,
        "inner": inner,
        "dropout": dropout,
        "temperature": temperature,
        "top_k": keep,
    }
