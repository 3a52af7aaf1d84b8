"""Suites: a base, tasks with deterministic splits that never share an item, a reader, and how experts are trained."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CoterieError

if TYPE_CHECKING:
    from .reader import Reader

Row = tuple[str, str, str]
"""A text, its label (a key of the task's labels) and the group of rows that stay in one split."""

Inputs = tuple[str, ...] | np.ndarray
"""N texts, or an array whose first axis is the rows (images)."""


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        inputs: N texts, or an array (N, ...).
        targets: (N,) int64, indices into the task's labels; or the N texts that are wanted; or N zeros where the input
            itself is what is predicted (perplexity).
    """

    inputs: Inputs
    targets: Inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def head(self, rows: int | None) -> Split:
        """The first `rows` rows; None for all."""
        return Split(self.inputs[:rows], self.targets[:rows])

    def take(self, rows: np.ndarray) -> Split:
        """The rows of these numbers, in this order."""
        return Split(_take(self.inputs, rows), _take(self.targets, rows))

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of every row, in order."""
        return digest(_content(self.inputs), _content(self.targets))


def _take(values: Inputs, rows: np.ndarray) -> Inputs:
    return values[rows] if isinstance(values, np.ndarray) else tuple(values[row] for row in rows)


def _content(values: Inputs) -> list[object]:
    if isinstance(values, np.ndarray):
        return [str(values.dtype), list(values.shape), hashlib.sha256(values.tobytes()).hexdigest()]
    return list(values)


@dataclass(frozen=True)
class Task:
    """A task: what goes in, what the classes are called, three disjoint splits, and how answers are scored.

    Args:
        name: in words that suit a column's head.
        labels: one text for each class; none where the task has no classes.
        train, validation, test: the splits.
        metric: "accuracy", "f1", "exact_match" or "perplexity"; see `metrics`.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    metric: str = "accuracy"

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of what an expert is made from: the labels and every row of `train` and `validation`."""
        return digest(self.labels, self.train.key, self.validation.key)


def one_class(task: Task, name: str, rows: Split) -> Iterator[str]:
    """A note, where a classification's rows cannot tell anything."""
    if task.metric in ("accuracy", "f1") and len(np.unique(np.asarray(rows.targets))) == 1:
        yield f"the {name} rows of {task.name} are all of one class: any constant answer is right"


def distinct(rows: Split) -> set[object]:
    """The inputs, each once."""
    return {row.tobytes() if isinstance(row, np.ndarray) else row for row in rows.inputs}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one expert.

    Args:
        kind: "full" trains every weight of the base's blocks (norms and biases too; embeddings and heads stay as they
            are); "lora" trains a LoRA adapter on every linear of the blocks.
        steps: optimizer steps; the learning rate warms up for 6% of them and then follows a cosine to zero.
        learning_rate: peak, of AdamW with weight decay 0.01.
        batch: rows a step; rows of similar length come together.
        rank: of the adapter; its alpha is the same, so its scale is 1. Full fine-tunes ignore it.
        seed: of the order of the rows, and of the adapter's initialisation.
    """

    kind: str = "full"
    steps: int = 800
    learning_rate: float = 2e-4
    batch: int = 32
    rank: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Suite:
    """What a comparison runs on.

    Args:
        name: what the command line calls it.
        base: (cache, torch device, tiny) -> directory of the base: a package's own, or trained by the suite's script
            into the cache, once. `tiny` asks for the smallest that works, for tests.
        tasks: (train=, validation=, test=), the most rows of each split -> the tasks.
        reader: (directory of the base, torch device) -> the reader of its models.
        recipes: how experts are trained: "full", "lora".
        groups: further tasks on the same base, by name ("control", "stress"); `text8:control` names such a suite.
        committed: experts that the package carries, by task.
        test_rows: the most test rows of a task; None for all.
    """

    name: str
    base: Callable[[Path, str, bool], Path]
    tasks: Callable[..., tuple[Task, ...]]
    reader: Callable[[Path, str], Reader]
    recipes: Mapping[str, Recipe]
    groups: Mapping[str, Callable[..., tuple[Task, ...]]] = field(default_factory=dict)
    committed: Mapping[str, Path] = field(default_factory=dict)
    test_rows: int | None = 4000

    def group(self, name: str) -> Suite:
        """The suite of another group of tasks."""
        return replace(self, name=f"{self.name}:{name}", tasks=self.groups[name], groups={}, committed={})


@dataclass(frozen=True)
class TaskSource:
    """Where a task's rows come from.

    Args:
        name: the task's name.
        labels: the row's label -> the text whose embedding is the class anchor.
        rows: yields (text, label, group); the same text may come more than once.
        max_characters: longer texts are left out.
    """

    name: str
    labels: dict[str, str]
    rows: Callable[[], Iterator[Row]]
    max_characters: int = 80

    def load(self, train: int = 8000, validation: int = 500, test: int = 2000) -> Task:
        """Build the task: unambiguous texts, split by group (30% test, 10% validation), classes levelled.

        Args:
            train, validation, test: the most rows that a split holds.
        """
        label_names = list(self.labels)
        splits: list[list[tuple[str, int]]] = [[], [], []]
        for text, label, group in self._unambiguous():
            share = int(digest(self.name, "group", group)[:8], 16) / 16**8
            splits[0 if share >= 0.4 else 1 if share >= 0.3 else 2].append((text, label_names.index(label)))
        sizes = (train, validation, test)
        first, second, third = (self._levelled(rows, size) for rows, size in zip(splits, sizes, strict=True))
        return Task(self.name, tuple(self.labels.values()), first, second, third)

    def _unambiguous(self) -> Iterator[Row]:
        seen: dict[str, Row | None] = {}
        for text, label, group in self.rows():
            text = " ".join(text.split())
            if label not in self.labels or not 0 < len(text) <= self.max_characters:
                continue
            folded = text.casefold()
            known = seen.get(folded, (text, label, group))
            seen[folded] = known if known is not None and known[1] == label else None
        return (row for row in seen.values() if row is not None)

    def _levelled(self, rows: Iterable[tuple[str, int]], size: int) -> Split:
        """At most `size` rows in hash order, with one quota for all classes: as large as `size` allows."""
        ordered = sorted(rows, key=lambda row: digest(self.name, "order", row[0]))
        counts = np.bincount([target for _, target in ordered], minlength=len(self.labels))
        quota = next((q for q in range(1, len(ordered) + 1) if np.minimum(counts, q).sum() >= size), len(ordered))
        taken = np.zeros_like(counts)
        kept: list[tuple[str, int]] = []
        for text, target in ordered:
            if taken[target] < quota and len(kept) < size:
                taken[target] += 1
                kept.append((text, target))
        kept.sort(key=lambda row: digest(self.name, "row", row[0]))  # else the frequent classes would come first
        return Split(tuple(text for text, _ in kept), np.array([target for _, target in kept], dtype=np.int64))


def package_dir(package: str, extra: str = "demo") -> Path:
    """Directory of an installed package, found without importing it.

    Args:
        package: its import name.
        extra: of coterie, that brings it.

    Raises:
        CoterieError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CoterieError(f"the suite needs the package {package!r}", mend=f"run: pip install 'coterie[{extra}]'")
    return Path(spec.submodule_search_locations[0])


def digest(*parts: object) -> str:
    """sha256 (hex) of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


DESCRIBED = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
             "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip
"""Files that say how weights are read."""


def fingerprint(directory: Path) -> str:
    """sha256 (hex) of what a model's or adapter's directory answers by: weights, configuration, tokenizer."""
    total = hashlib.sha256(weights_sha256(directory).encode())
    for name in DESCRIBED:
        if (directory / name).is_file():
            total.update(name.encode() + (directory / name).read_bytes())
    return total.hexdigest()


def weights_sha256(directory: Path) -> str:
    """sha256 (hex) of the weights in a model's or adapter's directory: its safetensors files, one after the other."""
    total = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()
