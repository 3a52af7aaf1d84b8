"""The rows that a training reads: checked before a model is loaded, then made into what its class takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CoterieError
from ..evaluation.own import load_table
from ..recipe import nearest
from .recipe import Data, TrainRecipe

IGNORED = -100
"""A label that does not count."""


@dataclass
class Split:
    """One split's rows, as read.

    Attributes:
        inputs: texts, lists of tokens, or paths of images.
        targets: class numbers, lists of them, or texts; empty where there are none.
        tasks: each row's task, by number; empty where none are named.
    """

    inputs: list[Any]
    targets: list[Any]
    tasks: list[int]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass
class Rows:
    """What a recipe's `data` holds.

    Attributes:
        train, validation: the splits.
        labels: the classes' names, in order; none for texts as targets.
        tasks: the tasks' names, in the order of their numbers.
        files: file -> sha256.
    """

    train: Split
    validation: Split | None
    labels: list[str]
    tasks: list[str]
    files: dict[str, str]


def read_rows(recipe: TrainRecipe) -> Rows:
    """The rows of a recipe, checked.

    Raises:
        CoterieError: a file or column is missing or empty, a label is none of the classes, or there is but one class.
    """
    data, kind = recipe.data, recipe.task
    files: dict[str, str] = {}
    tables = {"train": _table(data, data.train, kind, files)}
    if data.validation is not None:
        tables["validation"] = _table(data, data.validation, kind, files)
    tasks = list(dict.fromkeys(task for each in tables.values() for task in each["task"]))
    labels: list[str] = []
    if kind.endswith("classification"):
        values = _classes(data, kind, tables["train"]["target"])
        labels = list(values.values())
        order = {value: i for i, value in enumerate(values)}
        for which, table in tables.items():
            table["target"] = [_numbers(v, order, data.target, which, i) for i, v in enumerate(table["target"])]
    elif kind == "seq2seq" or data.target is not None:
        tables = {k: {**t, "target": [str(v) for v in t["target"]]} for k, t in tables.items()}
    splits = {
        which: Split(table["input"], table["target"], [tasks.index(task) for task in table["task"]])
        for which, table in tables.items()
    }
    return Rows(splits["train"], splits.get("validation"), labels, tasks, files)


def _table(data: Data, source: str | Mapping[str, str], kind: str, files: dict[str, str]) -> dict[str, list[Any]]:
    """Columns `input`, `target` and `task` of a file, or of a file for each task."""
    found: dict[str, list[Any]] = {"input": [], "target": [], "task": []}
    for task, file in source.items() if isinstance(source, Mapping) else [(None, source)]:
        path = Path(file).expanduser()
        table = load_table(path)
        files[file] = hashlib.sha256(path.read_bytes()).hexdigest()
        wanted = [data.input] if isinstance(data.input, str) else data.input
        for column in [*wanted, *(c for c in (data.target, data.task) if c is not None)]:
            if column not in table.column_names:
                raise CoterieError(f"no column {column!r}", file, nearest(column, table.column_names))
        if not len(table):
            raise CoterieError("holds no row", file, "give at least one")
        columns = [_cells(table[column], column, file) for column in wanted]
        if kind == "token-classification" or kind == "image-classification":
            found["input"] += columns[0]
        else:
            found["input"] += ["\n".join(map(str, parts)) for parts in zip(*columns, strict=True)]
        if data.target is not None:
            found["target"] += _cells(table[data.target], data.target, file)
        if data.task is not None:
            found["task"] += [str(v) for v in _cells(table[data.task], data.task, file)]
        elif task is not None:
            found["task"] += [task] * len(table)
        if kind == "token-classification":
            _check_tokens(found, data, file)
    return found


def _cells(column: Any, name: str, file: str) -> list[Any]:
    cells = list(column)
    for i, value in enumerate(cells):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise CoterieError(f"row {i + 1} has nothing in column {name!r}", file, "fill it in, or leave the row out")
    return cells


def _check_tokens(found: Mapping[str, list[Any]], data: Data, file: str) -> None:
    for i, (tokens, tags) in enumerate(zip(found["input"], found["target"], strict=True)):
        if not isinstance(tokens, list) or not isinstance(tags, list) or len(tokens) != len(tags):
            raise CoterieError(
                f"row {i + 1} has no tag for each token",
                file,
                f"give lists of one length in {data.input} and {data.target}",
            )


def _classes(data: Data, kind: str, targets: list[Any]) -> dict[str, str]:
    """Value in the data -> the class's name, in order."""
    flat = [tag for tags in targets for tag in tags] if kind == "token-classification" else targets
    found = {str(value) for value in flat}
    if isinstance(data.labels, dict):
        return {str(value): name for value, name in data.labels.items()}
    if data.labels is not None:
        return {name: name for name in data.labels}
    if len(found) < 2:
        raise CoterieError(
            f"column {data.target!r} holds one class alone ({next(iter(found))!r})", "data.train", "two are needed"
        )
    numbers = all(value.isdigit() for value in found)
    return {value: value for value in sorted(found, key=int if numbers else None)}


def _numbers(value: Any, order: Mapping[str, int], column: str | None, which: str, row: int) -> Any:
    if isinstance(value, list):
        return [_numbers(each, order, column, which, row) for each in value]
    text = str(value)
    if text not in order and text.lower() in ("true", "false"):  # the truth values of CSV are texts
        text = text.capitalize()
    if text not in order:
        raise CoterieError(
            f"row {row + 1}: {text!r} in column {column!r} is no label",
            f"data.{which}",
            nearest(text, list(order)),
        )
    return order[text]


def encode(recipe: TrainRecipe, split: Split, processor: Any) -> Any:
    """A `datasets.Dataset` of what the model's forward takes.

    Args:
        recipe: says the task and the most tokens.
        split: its rows.
        processor: the base's tokenizer, or image processor.
    """
    from datasets import Dataset

    columns: dict[str, Any] = {"input": split.inputs}
    columns |= {"target": split.targets} if split.targets else {}
    columns |= {"task_ids": split.tasks} if split.tasks else {}
    table = Dataset.from_dict(columns)
    make = _ENCODERS[recipe.task]
    drop = [name for name in columns if name != "task_ids"]
    return table.map(
        lambda rows: make(rows, processor, recipe.data.max_tokens), batched=True, remove_columns=drop, batch_size=256
    )


def _sequence(rows: Mapping[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
    return {**tokenizer(rows["input"], truncation=True, max_length=most), "labels": rows["target"]}


def _tokens(rows: Mapping[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
    """A word's first token bears its tag."""
    words = [[str(token) for token in tokens] for tokens in rows["input"]]
    found = tokenizer(words, is_split_into_words=True, truncation=True, max_length=most)
    labels = []
    for i, tags in enumerate(rows["target"]):
        ids = found.word_ids(i)
        firsts = [word is not None and (at == 0 or ids[at - 1] != word) for at, word in enumerate(ids)]
        labels.append([tags[word] if first else IGNORED for word, first in zip(ids, firsts, strict=True)])
    return {**found, "labels": labels}


def _continuation(rows: Mapping[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
    """Prompt and continuation, of which the loss counts the latter; or a text alone, of which it counts all."""
    prompts = tokenizer(rows["input"])["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "target" not in rows:
        ids = [(each + end)[:most] for each in prompts]
        labels = [list(each) for each in ids]
    else:
        targets = tokenizer(rows["target"], add_special_tokens=False)["input_ids"]
        pairs = [(p, t + end) for p, t in zip(prompts, targets, strict=True)]
        ids = [(p + t)[:most] for p, t in pairs]
        labels = [([IGNORED] * len(p) + t)[:most] for p, t in pairs]
    return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids], "labels": labels}


def _translation(rows: Mapping[str, Any], tokenizer: Any, most: int) -> dict[str, Any]:
    found = tokenizer(rows["input"], truncation=True, max_length=most)
    targets = tokenizer(text_target=rows["target"], truncation=True, max_length=most)
    return {**found, "labels": targets["input_ids"]}


def _pixels(rows: Mapping[str, Any], processor: Any, most: int) -> dict[str, Any]:
    from PIL import Image

    images = []
    for each in rows["input"]:
        try:
            images.append(Image.open(str(each)).convert("RGB"))
        except OSError as error:
            raise CoterieError(f"cannot be read as an image ({error})", str(each), "check the path") from None
    pixels = processor(images, return_tensors="np")["pixel_values"]
    return {"pixel_values": np.asarray(pixels, dtype=np.float32), "labels": rows["target"]}


_ENCODERS: dict[str, Callable[[Mapping[str, Any], Any, int], dict[str, Any]]] = {
    "text-classification": _sequence,
    "token-classification": _tokens,
    "causal-lm": _continuation,
    "seq2seq": _translation,
    "image-classification": _pixels,
}
