"""Classification tasks over short texts, with deterministic splits that never share an item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

Row = tuple[str, str, str]
"""A text, its label (a key of the task's labels) and the group of rows that stay in one split."""


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Args:
        texts: N inputs.
        targets: (N,) int64, indices into the task's labels.
    """

    texts: tuple[str, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, rows: int) -> Split:
        return Split(self.texts[:rows], self.targets[:rows])


@dataclass(frozen=True)
class Task:
    """A classification task: what goes in, what the classes are called, and three disjoint splits."""

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the labels and of every row of every split, in order."""
        splits = [[list(s.texts), s.targets.tolist()] for s in (self.train, self.validation, self.test)]
        return digest(self.labels, splits)


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
        sized = [self._levelled(rows, size) for rows, size in zip(splits, (train, validation, test), strict=True)]
        return Task(self.name, tuple(self.labels.values()), *sized)

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


def digest(*parts: object) -> str:
    """sha256 (hex) of the parts as canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def weights_sha256(directory: Path) -> str:
    """sha256 (hex) of the weights in a model's or adapter's directory: its safetensors files, one after the other."""
    total = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()
