"""Runs every way of combining one set of experts on their tasks, and keeps what each scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import coterie

from ..errors import CoterieError
from . import tables
from .cells import Cells
from .combine import Experts, Way, combined, is_mixture, meaning, ways
from .ladder import delta, linear_deltas, linear_layers
from .metrics import Interval, Scores, bootstrap, normalised, skills
from .reader import Reader, as_prompts, told
from .suite import Split, Task, digest, distinct, fingerprint, one_class

ORACLE = "expert of the task"


@dataclass(frozen=True)
class Result:
    """One way of answering all tasks.

    Args:
        method: its name.
        setting: "default", "best on validation" (of the parameters tried), "default and best on validation"; empty
            where there is nothing to choose.
        parameters: as run.
        others: of a mixture: what everything that is no mixture layer follows.
        task: "known", where the model is told whose input it reads; else "not known".
        skill: on each task, in the suite's order (see `metrics`); None where it has no value.
        normalised, recovered_gap: with 95% paired bootstrap intervals.
        ratio: parameters / parameters of the base; of the tasks' own experts, those of all that must be kept.
        seconds: of making it from the experts' files, and of gathering what it needs to know of the tasks' rows.
        note: why there is no value.
    """

    method: str
    setting: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    others: str | None = None
    task: str = "not known"
    skill: list[float] | None = None
    normalised: Interval | None = None
    recovered_gap: Interval | None = None
    ratio: float = 1.0
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All results on one set of experts.

    Args:
        experts: what the experts are, in words.
        seed: of their training; None where they were given.
        tasks, metrics, rows: names, metrics and test rows, in the order of every list here.
        results: one for each way.
        matrix: expert -> its skill on each task.
        ladder: rung -> skill on each task.
        routing: mixture -> share of token-layers in which it picks the task's own expert, for each task.
        overlap: mean overlap of the experts' gate subspaces, and what chance would give.
        notes: what the reader should know, a sentence each.
    """

    experts: str
    seed: int | None
    tasks: list[str]
    metrics: list[str]
    rows: list[int]
    results: list[Result]
    matrix: dict[str, list[float]]
    ladder: dict[str, list[float]]
    routing: dict[str, list[float]]
    overlap: tuple[float, float] | None
    notes: list[str]

    def result(self, method: str, setting: str = "", others: str | None = None, task: str = "not known") -> Result:
        """The result of a method; a setting is named by any part of it."""
        return next(
            r
            for r in self.results
            if r.method == method and setting in r.setting and r.task == task and others in (None, r.others)
        )


@dataclass
class Comparer:
    """Runs models on tasks and keeps what they score.

    Args:
        reader: of the base.
        tasks: of the suite.
        cells: where scores are kept.
        test_rows: of each task that are used; None for all.
        validation_rows: the same.
        say: told what is being done, a few words at a time.
    """

    reader: Reader
    tasks: tuple[Task, ...]
    cells: Cells
    test_rows: int | None = None
    validation_rows: int | None = None
    say: Callable[[str], None] = lambda text: None

    @cached_property
    def base_key(self) -> list[Any]:
        """What every score depends on."""
        code = meaning(Path(__import__(type(self.reader).__module__, fromlist=["_"]).__file__ or ""))
        return [fingerprint(self.reader.base), self.reader.settings, digest(code)]

    @cached_property
    def heads(self) -> dict[str, str]:
        """Whose head answers a task, where the reader takes the experts': a score depends on it, whatever the body."""
        return {task: fingerprint(path) for task, path in getattr(self.reader, "experts", {}).items()}

    @property
    def metrics(self) -> list[str]:
        return [task.metric for task in self.tasks]

    @property
    def folder(self) -> Path:
        """Where mixtures and merges stand while they are run."""
        return self.cells.directory.parent / "models"

    def compare(
        self,
        title: str,
        directories: dict[str, Path],
        methods: Sequence[str],
        grids: dict[str, list[dict[str, Any]]] | None = None,
        seed: int | None = None,
        whole: bool = True,
    ) -> Comparison:
        """Compare the base, the experts and every method on one set of experts.

        Args:
            title: what the experts are, in words.
            directories: name of each task -> directory of its expert, in the suite's order.
            methods: names.
            grids: parameters to choose from on validation rows, by method, the defaults not among them unless named;
                default: as `combine.ways` has them.
            seed: of the experts.
            whole: with the matrix of every expert on every task, every mixture's `others` and known task, and defaults
                beside what was chosen.
        """
        experts = Experts(self.reader, directories, {task.name: task for task in self.tasks}, self.cells.warn)
        base = self._scores(["base"], lambda: self.reader.model, "test", "the base")
        expert = self._own(experts, "expert", experts.state, "test")
        expert_validation = self._own(experts, "expert", experts.state, "validation")
        self._check(base, expert, expert_validation)

        def result(scores: Scores, **given: Any) -> Result:
            strange = self._strange(scores)
            if strange:
                return Result(**given, note=strange)
            keeps: Any = bootstrap(scores, base, expert, self.metrics)
            return Result(**given, skill=skills(scores, self.metrics).tolist(), **keeps)

        oracle = result(expert, method=ORACLE, task="known", ratio=experts.parameters / self._base_parameters)
        results, notes = [result(base, method="base"), oracle], list(self._notes(base, expert))
        matrix: dict[str, list[float]] = {}
        if whole:
            best, matrix = self._single(experts, expert_validation)
            scores = self._each(experts, best, "test")
            results.append(result(scores, method="best single expert", parameters={"expert": best}))
        rungs: dict[str, list[float]] = {"expert": skills(expert, self.metrics).tolist()}
        routing: dict[str, list[float]] = {}
        overlap: tuple[float, float] | None = None
        for name in methods:
            try:
                found = self._method(name, experts, expert_validation, (grids or {}).get(name), whole, result)
            except Exception as error:  # a method that fails costs its own rows, not the comparison
                note = " ".join(str(error).split()) or type(error).__name__
                results.append(Result(name, note=note if isinstance(error, CoterieError) else f"failed: {note}"))
                self.cells.warn(f"{name}: {results[-1].note}")
                continue
            results += found.results
            if found.best is None:
                continue
            routing[name] = found.routing
            notes += [f"{name}: {text}" for text in found.record["warnings"]]
            if found.record["overlap"] is not None:
                overlap = found.record["overlap"], found.record["chance"]
            rungs.update(self._rungs(experts, found.way))
            if found.best.skill:
                rungs[f"{name}, its own routing"] = found.best.skill
        return Comparison(
            title, seed, [task.name for task in self.tasks], self.metrics, [len(rows) for rows in base], results,
            matrix, rungs, routing, overlap, notes,
        )  # fmt: skip

    def _method(
        self,
        name: str,
        experts: Experts,
        expert_validation: Scores,
        grid: list[dict[str, Any]] | None,
        whole: bool,
        result: Callable[..., Result],
    ) -> _Found:
        default, *tried = ways(name, len(experts.directories), grid, experts.rank() is not None)
        if whole or not tried:
            tried = [default, *tried]
        chosen = (
            max(tried, key=lambda way: self._validation(way, experts, expert_validation)) if tried[1:] else tried[0]
        )
        if not whole or not tried[1:]:
            settings = {"best on validation" if tried[1:] else "": chosen}
        elif chosen == default:
            settings = {"default and best on validation": chosen}
        else:
            settings = {"default": default, "best on validation": chosen}
        found = _Found([], chosen)
        for setting, way in settings.items():
            variants = [way]
            if full := whole and is_mixture(name) and way == chosen:
                variants.append(replace(way, others="average"))
            for each in variants:
                with self._ready(each, experts) as (make, made):
                    for task in ("known",) if way.needs_task else ("not known", "known") if full else ("not known",):
                        self.say(f"{name} {tables.parameters(each.parameters)}, task {task}")
                        scores = self._of_way(each, experts, make, "test", task == "known")
                        one = result(
                            scores, method=name, setting=setting, parameters=each.parameters, others=each.others,
                            task=task, ratio=made()["parameters"] / self._base_parameters, seconds=made()["seconds"],
                        )  # fmt: skip
                        found.results.append(one)
                    if each == chosen and is_mixture(name) and not way.needs_task:
                        found.best = next(r for r in found.results if r.setting == setting)
                        found.record, found.routing = made(), self._routing(each, experts, make)
        return found

    @property
    def _base_parameters(self) -> int:
        return sum(p.numel() for p in self.reader.model.parameters())

    @contextmanager
    def _ready(self, way: Way, experts: Experts) -> Any:
        """A function that makes the model (once), and one that gives the kept record of making it."""
        with combined(way, experts, self.folder) as make:
            made = "made" if way.needs is None else "gathered and made"
            key = (made, way.key, *self.base_key, list(experts.keys.values()))
            yield make, lambda: self.cells.get(key, lambda: make()[1])

    def _of_way(self, way: Way, experts: Experts, make: Any, split: str, known_task: bool = False) -> list[np.ndarray]:
        key = ["way", way.key, list(experts.keys.values()), known_task]
        return [self._cell(key, lambda: make()[0], task, split, known_task) for task in self.tasks]

    def _validation(self, way: Way, experts: Experts, expert: Scores) -> float:
        self.say(f"{way.method} {tables.parameters(way.parameters)}, validation")
        try:
            with self._ready(way, experts) as (make, _):
                scores = self._of_way(way, experts, make, "validation", way.needs_task)
        except CoterieError as error:  # a causal model, say, and a decision that would read what is to come
            self.cells.warn(f"{way.method} {tables.parameters(way.parameters)} is not tried: {error}")
            return -np.inf
        value = normalised(scores, expert, self.metrics)
        return value if np.isfinite(value) else -np.inf

    def _single(self, experts: Experts, expert_validation: Scores) -> tuple[str, dict[str, list[float]]]:
        """The expert that does best on all tasks' validation rows, and every expert's skill on every task."""
        matrix, kept = {}, {}
        for name in experts.directories:
            self.say(f"expert of {name} on every task")
            matrix[name] = skills(self._each(experts, name, "test"), self.metrics).tolist()
            kept[name] = normalised(self._each(experts, name, "validation"), expert_validation, self.metrics)
        return max(kept, key=kept.__getitem__), matrix

    def _each(self, experts: Experts, name: str, split: str) -> list[np.ndarray]:
        return self._scores(["expert", experts.keys[name]], cache(lambda: experts.fresh(experts.state(name))), split)

    def _own(self, experts: Experts, rung: str, make: Callable[[str], Any], split: str, *key: Any) -> list[np.ndarray]:
        """Scores of every task by a model of its own."""
        self.say(f"{rung}, {split}")
        return [
            self._cell(
                [rung, *key, experts.keys[task.name]], partial(self._fresh, experts, make, task.name), task, split
            )
            for task in self.tasks
        ]

    def _fresh(self, experts: Experts, make: Callable[[str], Any], name: str) -> nn.Module:
        return experts.fresh(make(name))

    def _share(self, make: Any, expert: int, rows: Split) -> float:
        return routed_share(self.reader, make()[0], expert, rows)

    def _rungs(self, experts: Experts, way: Way) -> dict[str, list[float]]:
        """Oracle routing to the experts' linear deltas, whole and truncated to the mixture's rank, where they differ
        from the experts."""
        layers = linear_layers(self.reader.model, self.reader.blocks)
        rank, adapters = way.parameters.get("rank"), experts.rank()

        def only_linear(name: str, rank: int | None = None) -> dict[str, torch.Tensor]:
            return linear_deltas(experts.base, delta(experts.state(name), experts.base), layers, rank)

        rungs = {}
        if adapters is None:
            scores = self._own(experts, "linear deltas", only_linear, "test")
            rungs["linear deltas, oracle routing"] = skills(scores, self.metrics).tolist()
        if isinstance(rank, int) and (adapters is None or adapters > rank):
            scores = self._own(experts, "truncated", lambda name: only_linear(name, rank), "test", rank)
            rungs[f"rank {rank}, oracle routing"] = skills(scores, self.metrics).tolist()
        return rungs

    def _routing(self, way: Way, experts: Experts, make: Any) -> list[float]:
        self.say(f"{way.method}, routing")
        shares = []
        for i, task in enumerate(self.tasks):
            rows = task.test.head(min(250, self.test_rows or 250))
            key = ("routing", way.key, list(experts.keys.values()), *self.base_key, rows.key)
            shares.append(self.cells.get(key, partial(self._share, make, i, rows)))
        return shares

    def _scores(self, key: list[Any], make: Callable[[], nn.Module], split: str, say: str = "") -> list[np.ndarray]:
        """Scores of every task by one model."""
        if say:
            self.say(f"{say}, {split}")
        return [self._cell(key, make, task, split) for task in self.tasks]

    def _cell(
        self, key: list[Any], make: Callable[[], nn.Module], task: Task, split: str, known_task: bool = False
    ) -> np.ndarray:
        rows = self._rows(task, split)

        def compute() -> list[float]:
            model: Any = make()
            with ExitStack() as stack:
                if known_task:
                    stack.enter_context(torch.no_grad())
                    stack.enter_context(model.coterie.route(task.name))
                return self.reader.scores(model, task, rows).tolist()

        whole = ("scores", key, *self.base_key, self.heads.get(task.name), task.labels, task.metric, rows.key)
        return np.array(self.cells.get(whole, compute))

    def _rows(self, task: Task, split: str) -> Split:
        return task.test.head(self.test_rows) if split == "test" else task.validation.head(self.validation_rows)

    def _strange(self, scores: Scores) -> str:
        """Where answers are no numbers, in words."""
        counts = [
            (int((~np.isfinite(rows)).sum()), len(rows), t.name) for t, rows in zip(self.tasks, scores, strict=True)
        ]
        return "; ".join(f"{bad:,} of {all_:,} answers on {task} are no numbers" for bad, all_, task in counts if bad)

    def _check(self, base: Scores, expert: Scores, validation: Scores) -> None:
        for who, scores in (("the base", base), ("the experts", expert), ("the experts", validation)):
            strange = self._strange(scores)
            if strange:
                raise CoterieError(f"{who}: {strange}", "compare", "look at that model's weights; all else is kept")

    def _notes(self, base: Scores, expert: Scores) -> Iterable[str]:
        if np.sum(skills(expert, self.metrics) - skills(base, self.metrics)) <= 0:
            yield "the experts are no better than the base on these rows: there is no gap to recover"
        for task in self.tasks:
            test, validation = (self._rows(task, name) for name in ("test", "validation"))
            yield from one_class(task, "test", test)
            yield from one_class(task, "validation", validation)
            if shared := len(distinct(test) & distinct(validation)):
                yield (
                    f"{shared:,} of the {len(test):,} test rows of {task.name} are validation rows, too: what was "
                    "chosen there was chosen on them"
                )


@dataclass
class _Found:
    """What one method gave.

    Args:
        results: one for each way.
        way: the one that counts.
        best: of a mixture, its result, with the task not known.
        record: of a mixture, the record of its making.
        routing: of a mixture, the share of token-layers that reach the task's expert, for each task.
    """

    results: list[Result]
    way: Way
    best: Result | None = None
    record: dict[str, Any] = field(default_factory=dict)
    routing: list[float] = field(default_factory=list)


@torch.inference_mode()
def routed_share(reader: Reader, model: nn.Module, expert: int, split: Split) -> float:
    """Share of (token, layer) pairs whose gate is largest at the expert; padding does not count.

    Layers that see one vector for each row, as a pooler, count only where no layer sees tokens.
    """
    hits: dict[bool, int] = {True: 0, False: 0}
    total = dict(hits)
    for rows, batch in reader.batches(split.inputs):
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
        known = told(model, (split.inputs[row] for row in rows), getattr(reader, "encoder", None))
        with known, coterie.routing_trace(model) as trace:
            model(**as_prompts(model, batch))
        for gates in trace.values():
            chosen = gates.argmax(-1)
            tokens = chosen.shape[1] > 1 if mask is None else chosen.shape == mask.shape
            counted = chosen[mask] if tokens and mask is not None else chosen.flatten()
            hits[tokens] += int((counted == expert).sum())
            total[tokens] += counted.numel()
    tokens = total[True] > 0
    return hits[tokens] / max(total[tokens], 1)
