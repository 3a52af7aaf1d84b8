"""`coterie eval`: models, mixtures and adapters on a suite's test rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import coterie

from ..errors import CoterieError
from ..sources.locate import Location, locate
from . import tables
from .classifier import ClassifierReader
from .compare import check, find_suite
from .extract import expert_state
from .ladder import load
from .metrics import METRICS, skills
from .reader import Reader
from .suite import Inputs, Suite, Task, one_class
from .tables import Sheet
from .train import quiet


def evaluate(
    suite: str | Path | Suite,
    models: Sequence[str] = (),
    *,
    rows: int | None = None,
    cache: Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Evaluate models on every task of a suite.

    Args:
        suite: a name, a YAML file (see `own`), or a suite.
        models: directories or Hub ids: mixtures, fine-tunes of the base, or PEFT adapters of it, and the base itself
            (read, where heads are the experts', through those). Default: the suite's base and each of its experts.
        rows: test rows of each task, at most.
        cache: where a base that the suite trains is kept.
        device: torch device.

    Returns:
        `tasks` (name -> metric and rows) and `models`: for each, the value on each task by the task's metric. A mixture
        whose experts bear the tasks' names has two entries: with the task not known, and known. `notes`: on the rows.

    Raises:
        CoterieError: a suite or its only model cannot be read, or no model has a value on any task.
    """
    quiet()
    found = suite if isinstance(suite, Suite) else find_suite(suite)
    tasks = found.tasks(test=found.test_rows)
    check(tasks, ("test",))
    reader = found.reader(found.base(cache, device, False), device)
    if not models:
        named = {"base": str(reader.base), **{name: str(path) for name, path in found.committed.items()}}
    else:
        named = {source: source for source in models}
    answers: list[dict[str, Any]] = []
    model: Any
    for name, place in {name: locate(source) for name, source in named.items()}.items():
        try:
            if not place.is_adapter:
                config = place.json("config.json") or {}
                _check_kind(found, reader.base, config, place.id, "give a fine-tune or a mixture of the suite's base")
            headless = place.path.resolve() == reader.base.resolve() and bool(getattr(reader, "experts", None))
            read, model = (reader, reader.model) if headless else open_model(reader, place, tasks)
        except CoterieError as error:  # the other models have their values
            if len(named) == 1:
                raise
            lacking = dict.fromkeys((task.name for task in tasks), _said(error))
            answers.append({"model": name, "task": "", "values": dict.fromkeys(lacking), "notes": lacking})
            continue
        routed = hasattr(model, "coterie") and set(model.coterie.expert_names) >= {task.name for task in tasks}
        one_per_task = hasattr(model, "coterie") and model.coterie.spec.routing.score == "tag"
        for known in (True,) if one_per_task else (False, True) if routed else (False,):
            values: dict[str, float | None] = {}
            notes: dict[str, str] = {}
            for task in tasks:
                try:
                    values[task.name] = _value(read, model, task, rows, known)
                except CoterieError as error:  # a head for other classes: the other tasks have their values
                    values[task.name], notes[task.name] = None, _said(error)
            answers.append({"model": name, "task": "known" if known else "not known", "values": values, "notes": notes})
    if all(len(each["notes"]) == len(tasks) for each in answers):
        raise CoterieError("; ".join(dict.fromkeys(answers[0]["notes"].values())), answers[0]["model"])
    described = {task.name: {"metric": task.metric, "rows": len(task.test.head(rows))} for task in tasks}
    told = [note for task in tasks for note in one_class(task, "test", task.test.head(rows))]
    return tables.plain({"suite": found.name, "tasks": described, "models": answers, "notes": told})


def routed_tasks(
    suite: str | Path, config: Mapping[str, Any], experts: Sequence[str], rows: int, cache: Path, device: str = "cpu"
) -> list[tuple[str, str | None, Iterator[dict[str, Any]]]]:
    """What `coterie inspect --suite` routes: (task, the expert of its name or None, batches of its first test rows).

    Args:
        suite: a name or a YAML file.
        config: of the mixture's model.
        experts: of the mixture.
        rows: test rows of each task.
        cache: where a base that the suite trains is kept.
        device: torch device.

    Raises:
        CoterieError: a suite that cannot be read, or whose base is another kind of model, or of other widths.
    """
    found = find_suite(suite)
    # Before a base is trained: the tiny one is of its architecture, if not of its widths.
    _check_kind(found, found.base(cache, device, True), config, "--suite", "give texts", ())
    reader = found.reader(found.base(cache, device, False), device)
    _check_kind(found, reader.base, config, "--suite", "give texts")
    return [
        (
            task.name,
            task.name if task.name in experts else None,
            _with_texts(reader, task.test.head(rows).inputs),
        )
        for task in found.tasks(test=found.test_rows)
    ]


def _check_kind(
    suite: Suite,
    base: Path,
    config: Mapping[str, Any],
    where: str,
    mend: str,
    widths: Sequence[str] = ("hidden_size", "num_hidden_layers"),
) -> None:
    """Refuse a model of another architecture than the suite's base, or of other widths; more tokens may be added."""
    own = locate(str(base)).json("config.json") or {}
    kinds = own.get("model_type"), config.get("model_type")
    if kinds[1] and kinds[0] != kinds[1]:
        raise CoterieError(f"{suite.name} is read by {kinds[0]} models, and this is a {kinds[1]}", where, mend)
    for name in (*widths, "vocab_size") if widths else ():
        theirs, ours = config.get(name), own.get(name)
        if theirs and ours and (theirs < ours if name == "vocab_size" else theirs != ours):
            what = f"{suite.name} is read by models of {name} {ours:,}, and this is of {theirs:,}"
            raise CoterieError(what, where, mend)


def _with_texts(reader: Reader, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """Batches, with what their rows are read from, and the encoder of what is no text."""
    encoder = getattr(reader, "encoder", None)
    for rows, batch in reader.batches(inputs):
        yield {**batch, "texts": [inputs[row] for row in rows], "encoder": encoder}


def open_model(reader: Reader, location: Location, tasks: Sequence[Task]) -> tuple[Reader, Any]:
    """A model, and the reader that reads it: an adapter of a classifier brings its own head.

    Raises:
        CoterieError: it cannot be loaded as what the suite's base is.
    """
    config = location.json("config.json") or {}
    if (config.get("quantization_config") or {}).get("quant_method") == "coterie":
        return reader, coterie.load(str(location.path)).to(reader.device)
    try:
        if location.is_adapter:
            if isinstance(reader, ClassifierReader):
                reader = replace(reader, experts=dict.fromkeys((task.name for task in tasks), location.path))
            return reader, load(reader.base_model(), expert_state(reader, location.path))
        kind: Any = type(reader.model)
        model, found = kind.from_pretrained(location.path, dtype=torch.float32, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"it lacks {sorted(found['missing_keys'])[0]}")
        return reader, model.eval().to(reader.device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CoterieError(
            f"cannot be read as a {type(reader.model).__name__} ({' '.join(str(error).split())[:200]})",
            location.id,
            "give a mixture, a fine-tune of the suite's base, or an adapter of it",
        ) from None


def _value(reader: Reader, model: Any, task: Task, rows: int | None, known: bool) -> float:
    with torch.no_grad(), model.coterie.route(task.name) if known else nullcontext():
        scores = reader.scores(model, task, task.test.head(rows))
    strange = int((~np.isfinite(scores)).sum())
    if strange:
        raise CoterieError(f"{strange:,} of {len(scores):,} answers on {task.name} are no numbers")
    return METRICS[task.metric].shown(float(skills([scores], [task.metric])[0]))


def _said(error: CoterieError) -> str:
    """What is wrong and how to mend it, of a model that is named beside it."""
    return "; ".join(part for part in (error.what, error.mend) if part)


def sheet(results: dict[str, Any]) -> Sheet:
    """The results as a table."""
    tasks = results["tasks"]
    rows = [
        [each["model"], each["task"], *(_shown(each["values"][name], tasks[name]["metric"]) for name in tasks)]
        for each in results["models"]
    ]
    columns = ["model", "task", *(f"{name} ({tasks[name]['metric'].replace('_', ' ')})" for name in tasks)]
    counts = ", ".join(f"{name} {each['rows']:,}" for name, each in tasks.items())
    notes = [f"{each['model']}: {note}" for each in results["models"] for note in each["notes"].values()]
    caption = [f"test rows: {counts}", *results["notes"], *dict.fromkeys(notes)]
    return Sheet(results["suite"], columns, rows, "\n".join(caption))


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return tables.percent(value) if METRICS[metric].percent else f"{value:.3f}"
