"""What is worth a word where sources differ and the result takes the base's."""

from __future__ import annotations

from typing import Any

from ..sources.locate import Location

# Fields of a configuration that do not change what the body of a model computes in evaluation.
_HARMLESS = (
    "dropout",
    "drop_path",
    "_token_id",
    "initializer",
    "label",
    "problem_type",
    "dtype",
    "version",
    "name_or_path",
    "architectures",
    "use_cache",
    "vocab_size",
    "output_",
    "return_dict",
    "task_specific",
    "finetuning_task",
    "gradient_checkpointing",
    "_attn_implementation",
    "_experts_implementation",
    "tie_word_embeddings",
)


# Files of a tokenizer, and what notes call what of them counts.
_FILES = {
    "tokenizer.json": "tokenizer.json",
    "tokenizer_config.json": "chat_template",
    "chat_template.jinja": "chat_template.jinja",
}


def config_notes(
    base: dict[str, Any], experts: dict[str, dict[str, Any]], result: str = "the mixture", of: str = "the base"
) -> list[str]:
    """Settings in which an expert's model differs from the base's: the result computes with the base's.

    Args:
        base: configuration of the base.
        experts: of each expert.
        result: what the notes call what is made.
        of: what they call the base.
    """
    notes = []
    for name, theirs in experts.items():
        differ = [
            f"{key} ({theirs.get(key)!r}, {of}'s {base.get(key)!r})"
            for key in sorted({*base, *theirs})
            if base.get(key) != theirs.get(key) and not any(part in key for part in _HARMLESS)
        ]
        if differ:
            notes.append(f"expert {name!r} was configured differently: {'; '.join(differ)}; {result} runs as {of}")
    return notes


def tokenizer_notes(
    base: Location, places: dict[str, Location], result: str = "the mixture", of: str = "the base"
) -> list[str]:
    """Tokenizers and chat templates that differ from the base's: the result takes the base's; as `config_notes`."""
    notes = []
    for name, place in places.items():
        for file, what in _FILES.items():
            if (place.path / file).is_file() and _read(base, file) != _read(place, file):
                notes.append(f"{what} of expert {name!r} differs from {of}'s; {result} takes {of}'s")
    return notes


def _read(place: Location, file: str) -> Any:
    """What of a tokenizer's file says how texts become tokens."""
    if file == "chat_template.jinja":
        return (place.path / file).read_bytes() if (place.path / file).is_file() else None
    content = place.json(file) or {}
    if file == "tokenizer_config.json":
        return content.get("chat_template")
    # How it padded and cut when it was called last is kept, too.
    return {key: value for key, value in content.items() if key not in ("padding", "truncation")}
