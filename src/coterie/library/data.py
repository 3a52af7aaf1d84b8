"""Rows of an expert's own data, as its model takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from ..errors import CoterieError
from ..recipe import nearest
from ..sources.locate import locate
from ..training.data import encode, read_rows
from ..training.recipe import read_train_recipe
from ..training.train import AUTOS

COLLATORS = {
    "causal-lm": transformers.DataCollatorForSeq2Seq,
    "seq2seq": transformers.DataCollatorForSeq2Seq,
    "text-classification": transformers.DataCollatorWithPadding,
    "token-classification": transformers.DataCollatorForTokenClassification,
}


def read(
    base: str,
    task: str,
    data: Path,
    text: str = "text",
    target: str | None = None,
    labels: list[str] | None = None,
    max_tokens: int = 128,
    batch_size: int = 32,
) -> tuple[Any, DataLoader[Any]]:
    """A base model for a task, and batches of a file with labels, in an order that a seed fixes.

    Args:
        base: directory or Hub id.
        task: of `COLLATORS`.
        data: CSV, JSONL or Parquet.
        text: the column that is read.
        target: the column that is wanted; a language model may have none.
        labels: the classes, in the order of the expert's head; default: those in the data, sorted.
        max_tokens: longer inputs are cut.
        batch_size: rows of a batch.

    Raises:
        CoterieError: an unknown task, a file or column that is missing, or a base that does not load.
    """
    if task not in COLLATORS:
        raise CoterieError(f"unknown task {task!r}", "task", nearest(task, list(COLLATORS)))
    columns = {"train": str(data), "input": text, "target": target, "labels": labels or None, "max_tokens": max_tokens}
    recipe = read_train_recipe({"task": task, "base": base, "data": columns})
    rows, place = read_rows(recipe), locate(base)
    classes = {"id2label": dict(enumerate(rows.labels)), "label2id": {n: i for i, n in enumerate(rows.labels)}}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.path)
        model = getattr(transformers, AUTOS[recipe.task]).from_pretrained(
            place.path, dtype=torch.float32, ignore_mismatched_sizes=True, **(classes if rows.labels else {})
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CoterieError(f"does not load for {task} ({reason})", base, "check the task, and its tokenizer") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    collate, order = COLLATORS[task](tokenizer), torch.Generator().manual_seed(0)
    found: Any = encode(recipe, rows.train, tokenizer)
    return model, DataLoader(found, batch_size, shuffle=True, collate_fn=collate, generator=order)
