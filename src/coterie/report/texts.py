"""Texts of the user's as tasks: lines of files, tokenised by the mixture's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CoterieError

# Of longer files, as many lines are taken, evenly spaced; of longer lines, as many tokens.
ROWS, TOKENS, BATCH = 256, 128, 16


@dataclass
class Texts:
    """Lines that belong together.

    Attributes:
        task: what to call them.
        expert: the expert that was made for such texts, if that is known.
        lines: the texts.
    """

    task: str
    expert: str | None
    lines: list[str]


def read_texts(given: Sequence[str], experts: Sequence[str]) -> list[Texts]:
    """What `--text` names: `FILE`, `EXPERT=FILE`, or a text itself; texts given one by one are gathered into one task.

    Args:
        given: the options' values.
        experts: the mixture's experts.

    Raises:
        CoterieError: a file that cannot be read or holds no text, or a name before `=FILE` that is no expert.
    """
    found: list[Texts] = []
    loose: dict[str | None, list[str]] = {}
    for item in given:
        name, equals, rest = item.partition("=")
        if _is_file(item):
            found.append(Texts(Path(item).stem, None, _lines(Path(item))))
        elif equals and name in experts:
            if _is_file(rest):
                found.append(Texts(name, name, _lines(Path(rest))))
            else:
                loose.setdefault(name, []).append(_no_file(rest, item))
        elif equals and _is_file(rest):
            raise CoterieError(f"no expert {name!r}", "--text", f"known: {', '.join(experts)}; or give the file alone")
        else:
            loose.setdefault(None, []).append(_no_file(item, item))
    found += [Texts(name or "texts", name, [line for line in lines if line.strip()]) for name, lines in loose.items()]
    empty = [texts.task for texts in found if not texts.lines]
    if empty:
        raise CoterieError(f"{empty[0]!r} holds no text", "--text", "give a file with a text on each line, or a text")
    return found


def numbered(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again: two files of one expert are two tasks, as are a suite's and a file."""
    return [name if (n := names[:i].count(name)) == 0 else f"{name} ({n + 1})" for i, name in enumerate(names)]


def batches(model: Any, tokenizer: Any, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the model is called with: padded `input_ids`, their `attention_mask`, and what else the tokenizer gives; and
    the rows' `texts`.

    An encoder-decoder model gets the start of an answer to decode from.
    """
    import torch

    from ..evaluation.reader import most_tokens

    most = most_tokens(model, TOKENS)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in range(0, len(lines), BATCH):
        rows = list(lines[start : start + BATCH])
        batch = dict(tokenizer(rows, padding=True, truncation=True, max_length=most, return_tensors="pt"))
        if model.config.is_encoder_decoder:
            begin = model.config.decoder_start_token_id
            batch["decoder_input_ids"] = torch.full((len(batch["input_ids"]), 1), begin)
        yield {**batch, "texts": rows}


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a text too long for a name
        return False


def _no_file(text: str, item: str) -> str:
    """A text, unless it is one word that ends as the names of files do: a slip would be routed as a text."""
    if re.fullmatch(r"\S+\.(txt|csv|tsv|jsonl?|md)", text):
        raise CoterieError("no such file", f"--text {item}", "give the path of a file, or a text")
    return text


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CoterieError(f"cannot be read ({error})", str(path), "give a text file in UTF-8") from None
    return [lines[i * len(lines) // ROWS] for i in range(ROWS)] if len(lines) > ROWS else lines
