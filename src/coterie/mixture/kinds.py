"""What kind of model a mixture is, and what routing it can have for that."""

from __future__ import annotations

from typing import Any

from ..errors import CoterieError
from ..routing.router import SCORES


def check_routing(model: Any, routing: Any) -> None:
    """Refuse routing that a model cannot have.

    Args:
        model: the model, or its skeleton.
        routing: of the mixture to be.

    Raises:
        CoterieError: routers would look ahead, or read what an encoder-decoder has two of.
    """
    if routing.couples and (is_causal(model) or (routing.combine == "slots" and is_seq2seq(model))):
        raise CoterieError(
            f"its routers would look ahead in a {type(model).__name__}, which writes token after token",
            "pool" if routing.combine != "slots" else "method",
            'use pool "prompt" (`coterie methods` lists what else a method has)'
            if routing.combine != "slots"
            else "use it in encoders alone",
        )
    by_rows = SCORES[routing.score].reads == "rows" or routing.score == "vectors"
    by_rows = by_rows and routing.pool not in ("token", "task")
    if by_rows and is_seq2seq(model):
        raise CoterieError(
            "its scores read each layer's own input, and a decoder's routers could read the encoder's alone",
            "pool",
            'use pool "token"',
        )
    if routing.decides_before and is_seq2seq(model):
        raise CoterieError(
            "its router reads the hidden states of one stack, and an encoder-decoder has two", "method", "use smear"
        )


def is_seq2seq(model: Any) -> bool:
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")


def decoder_path(model: Any) -> str | None:
    """The path of an encoder-decoder's decoder; None for other models."""
    if not is_seq2seq(model) or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), None)


def is_causal(model: Any) -> bool:
    """Whether each token's output may depend on no later one: a model that writes, or the decoder that it is made of.

    A classifier on a decoder is none: its one answer comes after the last token.
    """
    if is_seq2seq(model):
        return False
    able = getattr(model, "can_generate", None)
    if able and able():
        return True
    from transformers.models.auto import modeling_auto as names

    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    bare = names.MODEL_MAPPING_NAMES.get(kind)
    bare = (bare,) if isinstance(bare, str) else bare or ()
    writes = kind in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    both_ways = kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return type(model).__name__ in bare and writes and not both_ways
