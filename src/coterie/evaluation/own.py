"""A suite of the user's own: a YAML that names a base, experts, and tasks in CSV, JSONL or Parquet files.

base: bert-base-uncased            # directory or Hub id
reader: classifier                 # the models' own heads; anchors: as text8; causal: a language model
experts: {sentiment: you/bert-sst2, toxicity: ./adapters/toxicity}    # by task
tasks:
  sentiment:
    test: data/sentiment.csv       # CSV, JSONL or Parquet; paths are relative to the working directory
    validation: data/sentiment-validation.csv        # what `coterie compare` chooses parameters on
    input: text                    # the column; or a list, joined by a line break
    target: label                  # the column of the class, or of the text that is wanted after the input
    labels: {0: negative, 1: positive}               # value in the data -> the model's name of the class
    metric: accuracy               # accuracy, f1 (macro), exact_match, perplexity
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CoterieError
from ..recipe import nearby, nearest
from ..sources.locate import locate
from .metrics import MOST_CLASSES
from .reader import Reader
from .suite import Split, Suite, Task

FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
Metric = Literal["accuracy", "f1", "exact_match", "perplexity"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OwnTask(_Strict):
    """A task's files and columns; see the module's own words."""

    test: str
    validation: str | None = None
    train: str | None = None
    input: str | list[str]
    target: str | None = None
    labels: list[str] | dict[str | int | bool, str] | None = None
    metric: Metric = "accuracy"


class OwnSuite(_Strict):
    """A suite's YAML."""

    name: str | None = None
    base: Annotated[str, Field(min_length=1)]
    reader: Literal["classifier", "anchors", "causal"] = "classifier"
    max_tokens: Annotated[int, Field(ge=2)] = 128
    experts: dict[str, str] = {}
    tasks: Annotated[dict[str, OwnTask], Field(min_length=1)]


def read(path: Path) -> Suite:
    """The suite of a YAML file.

    Raises:
        CoterieError: the file cannot be read, a key is unknown (names the nearest) or of a wrong kind, or a metric does
            not fit the reader.
    """
    if not path.is_file():
        raise CoterieError("no such file", str(path), nearby(path, Path.is_file) or "give a suite's name, or its YAML")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CoterieError(f"cannot be read ({reason})", str(path), "give a suite's name, or a YAML file") from None
    if not isinstance(content, dict):
        raise CoterieError("is no mapping", str(path), "write base:, tasks: and experts:")
    try:
        given = OwnSuite.model_validate(content)
    except ValidationError as error:
        raise _explained(error, path) from None
    for name, task in given.tasks.items():
        fitting = ("exact_match", "perplexity") if given.reader == "causal" else ("accuracy", "f1")
        if task.metric not in fitting:
            raise CoterieError(
                f"task {name!r}: a {given.reader} reader has no {task.metric}", str(path), f"use {' or '.join(fitting)}"
            )
        if task.target is None and task.metric != "perplexity":
            raise CoterieError(f"task {name!r} names no target column", str(path), "add target: COLUMN")
    for name in given.experts:
        if name not in given.tasks:
            hint = nearest(name, list(given.tasks))
            raise CoterieError(f"experts name {name!r}, which is no task", str(path), hint)
    base = partial(_base, given.base)
    committed = _Located(given.experts)
    return Suite(
        given.name or path.stem, base, partial(_tasks, given, str(path)), _reader(given, committed), {},
        committed=committed, test_rows=None,
    )  # fmt: skip


class _Located(Mapping[str, Path]):
    """Directories of experts, brought from the Hub when they are asked for."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources

    def __getitem__(self, name: str) -> Path:
        if name not in self.sources:
            raise CoterieError(f"task {name!r} has no expert", "suite", f"add one under experts: {{{name}: SOURCE}}")
        return locate(self.sources[name]).path

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def __iter__(self) -> Any:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def _base(source: str, cache: Path, device: str, tiny: bool) -> Path:
    return locate(source).path


def _reader(given: OwnSuite, experts: Mapping[str, Path]) -> Callable[[Path, str], Reader]:
    if given.reader == "anchors":
        from .anchors import AnchorReader

        return partial(AnchorReader, max_tokens=given.max_tokens)
    if given.reader == "causal":
        from .causal import CausalReader

        return partial(CausalReader, max_tokens=given.max_tokens)
    from .classifier import ClassifierReader

    return partial(ClassifierReader, experts=experts, max_tokens=given.max_tokens)


def _tasks(
    given: OwnSuite, file: str, train: int | None = None, validation: int | None = None, test: int | None = None
) -> Any:
    sizes = {"train": train, "validation": validation, "test": test}
    return tuple(_task(name, task, sizes, file) for name, task in given.tasks.items())


def _task(name: str, task: OwnTask, sizes: Mapping[str, int | None], file: str) -> Task:
    columns = {split: _columns(name, task, getattr(task, split), sizes[split]) for split in sizes}
    found = {value for inputs, targets in columns.values() for value in targets}
    labels: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    if task.metric in ("accuracy", "f1"):
        if isinstance(task.labels, dict):
            labels = {written: text for value, text in task.labels.items() for written in _spellings(value)}
        else:
            labels = {value: value for value in task.labels or sorted(found)}
        if not isinstance(task.labels, list) and all(value.isdecimal() for value in labels):  # class numbers
            labels = dict(sorted(labels.items(), key=lambda item: int(item[0])))
        classes = tuple(dict.fromkeys(labels.values()))
        if task.labels is not None and len(classes) < 2:
            raise CoterieError(f"task {name!r}: its labels name but one class", file, "name every class")
        strange = sorted(found - set(labels))
        if strange:
            hint = nearest(strange[0], list(labels))
            raise CoterieError(f"task {name!r}: {strange[0]!r} in column {task.target!r} is no label", file, hint)
        if task.metric == "f1" and len(classes) > MOST_CLASSES:
            raise CoterieError(
                f"task {name!r} has {len(classes)} classes", file, f"f1 reads at most {MOST_CLASSES}; use accuracy"
            )

    def split(which: str) -> Split:
        inputs, targets = columns[which]
        if task.metric == "exact_match":
            return Split(inputs, tuple(target.strip() for target in targets))
        if task.metric == "perplexity" and task.target:
            return Split(inputs, targets)
        numbers = [classes.index(labels[value]) for value in targets] if labels else [0] * len(inputs)
        return Split(inputs, np.array(numbers, dtype=np.int64))

    return Task(name, classes, split("train"), split("validation"), split("test"), task.metric)


def _spellings(value: str | int | bool) -> tuple[str, ...]:
    """A label's value as files have it; the truth values of CSV are texts, in any of three spellings."""
    text = str(value)
    return (text, text.lower(), text.upper()) if isinstance(value, bool) else (text,)


def _columns(name: str, task: OwnTask, file: str | None, rows: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and targets (none without a target column) of one file, as texts."""
    if file is None:
        return (), ()
    table = load_table(Path(file).expanduser())
    wanted = [task.input] if isinstance(task.input, str) else task.input
    for column in [*wanted, *([task.target] if task.target else [])]:
        if column not in table.column_names:
            hint = nearest(column, table.column_names)
            raise CoterieError(f"task {name!r}: no column {column!r}", file, hint)
    table = table.select(range(min(rows, len(table)))) if rows is not None else table
    cells = {column: [_text(v, column, file, i) for i, v in enumerate(table[column])] for column in set(wanted)}
    inputs = tuple("\n".join(parts) for parts in zip(*(cells[column] for column in wanted), strict=True))
    if task.target is None:
        return inputs, ()
    return inputs, tuple(_text(v, task.target, file, i) for i, v in enumerate(table[task.target]))


def _text(value: Any, column: str, file: str, row: int) -> str:
    if value is None:
        raise CoterieError(f"row {row + 1} has nothing in column {column!r}", file, "fill it in, or leave the row out")
    return str(value)


def load_table(path: Path) -> Any:
    """A `datasets.Dataset` of a CSV, JSONL or Parquet file, in memory; texts are as the file has them.

    All values of CSV are texts, and an empty one is None.

    Raises:
        CoterieError: no such file, another kind of file, one that cannot be parsed, or `datasets` is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise CoterieError("is no CSV, JSONL or Parquet file", str(path), f"known: {', '.join(FORMATS)}")
    if not path.is_file():
        hint = nearby(path, Path.is_file) or "check the path; it is relative to the working directory"
        raise CoterieError("no such file", str(path), hint)
    try:
        import datasets
    except ImportError:
        raise CoterieError("the package `datasets` is missing", "suite", "run: pip install 'coterie[eval]'") from None
    import tempfile

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if FORMATS[path.suffix.lower()] != "parquet":
                path.read_bytes().decode()
            return _loaded(path, folder)
        except Exception as error:  # the parsers of three formats raise many kinds
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:200]
            # an empty JSONL, or any table without a row; in Parquet
            if not reason or "corresponds to no data" in reason or "BatchSize" in reason:
                raise CoterieError("has no rows", str(path), "give some") from None
            mend = "save it as UTF-8" if isinstance(cause, UnicodeDecodeError) else "mend the file"
            raise CoterieError(f"cannot be read ({reason})", str(path), mend) from None


def _loaded(path: Path, folder: str) -> Any:
    """The table of a file, with what `datasets` writes on the way in a folder; left alone, it would make numbers and
    dates of texts."""
    from datasets import Features, Json, Value, load_dataset

    kind = FORMATS[path.suffix.lower()]
    load = partial(load_dataset, kind, data_files=str(path), split="train", cache_dir=folder, keep_in_memory=True)
    if kind == "csv":
        from pandas import read_csv  # type: ignore[import-untyped]

        texts = Features(dict.fromkeys(read_csv(path, nrows=0, index_col=False).columns, Value("string")))
        return load(features=texts, keep_default_na=False, na_values=[""], index_col=False)
    if kind == "parquet":
        return load()
    load = partial(load, chunksize=path.stat().st_size + 1)  # in one, else the first chunk's kinds are the others' too
    table = load()
    dated = {name: Json() for name, kind in table.features.items() if "timestamp" in str(kind)}
    return load(features=Features({**table.features, **dated})) if dated else table


def _explained(error: ValidationError, path: Path) -> CoterieError:
    """The first thing that is wrong in a suite's YAML, in one sentence."""
    first = error.errors()[0]
    *where, key = first["loc"]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model = OwnTask if "tasks" in map(str, where) else OwnSuite
        return CoterieError(f"unknown key {place!r}", str(path), nearest(str(key), list(model.model_fields)))
    if first["type"] == "missing":
        return CoterieError(f"{place} is missing", str(path), "add it")
    if first["type"] == "literal_error":
        known = re.findall("'([^']+)'", first["ctx"]["expected"])
        return CoterieError(
            f"unknown {key} {first['input']!r} ({place})", str(path), nearest(str(first["input"]), known)
        )
    if where[2:3] == ["labels"]:
        given = first["input"]
        strange = [n for n in (given.values() if isinstance(given, dict) else [given]) if not isinstance(n, str)]
        if strange:
            what = f"the class {strange[0]!r} is no text (YAML reads no, yes, on and off as truth values)"
            return CoterieError(f"tasks.{where[1]}.labels: {what}", str(path), 'quote the names: "no"')
    return CoterieError(f"{place}: {first['msg']}", str(path), "mend it")
