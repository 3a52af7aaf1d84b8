"""Every way of combining the same experts, on the same rows: accuracies, error bars, the ladder, the routing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import coterie

from ..merging.linear import State, average, delta, task_arithmetic
from .anchors import MAX_TOKENS, Reader
from .cells import Cells
from .experts import SCALES
from .extract import expert_state
from .ladder import linear_deltas, linear_layers, load
from .metrics import Interval, accuracies, bootstrap, normalised
from .suite import Split, Task, digest, weights_sha256

LARGEST_RATIO = 1.6


@dataclass(frozen=True)
class Result:
    """One way of combining the experts.

    Args:
        method: its name.
        accuracy: of each task, in the suite's order.
        normalised, recovered_gap: with 95% paired bootstrap intervals.
        ratio: parameters / parameters of the base.
        chosen: what was chosen on validation rows.
    """

    method: str
    accuracy: list[float]
    normalised: Interval
    recovered_gap: Interval
    ratio: float
    chosen: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All results on one set of experts.

    Args:
        experts: what the experts are, in words.
        tasks: names, in the order of every list here.
        results: one for each method.
        ladder: rung -> accuracy of each task.
        routing: share of token-layers in which the mixture picks the task's own expert.
        overlap: mean overlap of the experts' gate subspaces, and what chance would give.
        warnings: of the build.
        rows: test rows of each task.
    """

    experts: str
    tasks: list[str]
    results: list[Result]
    ladder: dict[str, list[float]]
    routing: list[float]
    overlap: tuple[float, float]
    warnings: list[str]
    rows: list[int]


@dataclass
class Comparer:
    """Runs models on a suite and keeps what they answer.

    Args:
        reader: of the base.
        tasks: the suite.
        cells: where answers are kept.
        test_rows, validation_rows: rows of each task that are used.
        say: told what is being done, a few words at a time.
    """

    reader: Reader
    tasks: tuple[Task, ...]
    cells: Cells
    test_rows: int = 1000
    validation_rows: int = 250
    say: Callable[[str], None] = lambda text: None

    @cached_property
    def base(self) -> State:
        return {name: tensor.detach() for name, tensor in self.reader.model.state_dict().items()}

    @cached_property
    def base_key(self) -> str:
        return weights_sha256(self.reader.base)

    def compare(self, title: str, experts: dict[str, Path], grid: Iterable[dict[str, int]], out: Path) -> Comparison:
        """Compare the base, the experts, the average, task arithmetic and SMILE.

        Args:
            title: what the experts are, in words.
            experts: name -> directory; the suite's names in the suite's order.
            grid: SMILE's parameters to choose from, on validation rows.
            out: where the chosen mixture is built.
        """
        keys = {name: weights_sha256(path) for name, path in experts.items()}
        state = cache(lambda name: expert_state(self.reader, experts[name]))
        change = cache(lambda name: delta(state(name), self.base))
        merge_key = [self.base_key, *keys.values()]

        def scaled(scale: float, split: str) -> list[np.ndarray]:
            make = cache(lambda: self._fresh(task_arithmetic(self.base, [change(n) for n in experts], scale)))
            return self.answers(("task arithmetic", scale, merge_key), make, split)

        def own(rung: str, key: tuple[object, ...], make: Callable[[str], State], split: str) -> list[np.ndarray]:
            self.say(rung)
            return [
                self._cell((rung, key, keys[task.name]), cache(lambda n=task.name: self._fresh(make(n))), task, split)
                for task in self.tasks
            ]

        base = self.answers(("base", self.base_key), lambda: self.reader.model, "test")
        expert = own("experts", (), state, "test")
        expert_validation = own("experts", (), state, "validation")

        def result(method: str, correct: list[np.ndarray], ratio: float = 1.0, **chosen: float) -> Result:
            keeps = bootstrap(correct, base, expert)
            accuracy = accuracies(correct).tolist()
            return Result(method, accuracy, keeps["normalised"], keeps["recovered_gap"], ratio, chosen)

        self.say("average")
        make_average = cache(lambda: self._fresh(average(self.base, [change(n) for n in experts])))
        results = [
            result("base", base),
            result("expert of the task", expert, ratio=float(len(experts))),
            result("average", self.answers(("average", merge_key), make_average, "test")),
        ]
        scores = {}
        for scale in SCALES:
            self.say(f"task arithmetic, scale {scale}, validation")
            scores[scale] = normalised(scaled(scale, "validation"), expert_validation)
        scale = max(scores, key=scores.__getitem__)
        self.say(f"task arithmetic, scale {scale}")
        results.append(result("task arithmetic", scaled(scale, "test"), scale=scale))

        parameters = self._choose(experts, keys, expert_validation, grid)
        self.say("building the mixture")
        report = coterie.build(recipe(self.reader.base, experts, parameters), out=out, force=True)
        mixture = cache(lambda: coterie.load(str(out)).to(self.reader.device))
        key = ("smile", parameters, merge_key, code_key())
        self.say("SMILE")
        smile = self.answers(key, mixture, "test")
        results.append(result("SMILE", smile, ratio=report.ratio, **parameters))
        self.say("routing")
        routing = []
        for i, task in enumerate(self.tasks):
            share = cache(lambda i=i, task=task: routed_share(self.reader, mixture(), i, task.test))
            routing.append(float(self.cells.get(("routing", key, task.key), share)))

        layers, rank = linear_layers(self.reader.model), parameters["rank"]
        rungs = {"expert": expert}
        if any(_adapter_rank(path) is None for path in experts.values()):
            rungs["linear deltas, oracle routing"] = own(
                "linear deltas", (), lambda n: linear_deltas(self.base, change(n), layers), "test"
            )
        if any((_adapter_rank(path) or rank + 1) > rank for path in experts.values()):
            rungs[f"rank {rank}, oracle routing"] = own(
                "truncated", (rank,), lambda n: linear_deltas(self.base, change(n), layers, rank), "test"
            )
        rungs["SMILE's own routing"] = smile
        return Comparison(
            title, [task.name for task in self.tasks], results,
            {rung: accuracies(correct).tolist() for rung, correct in rungs.items()}, routing,
            report.overlap or (0.0, 0.0), report.warnings, [len(rows) for rows in base],
        )  # fmt: skip

    def answers(self, key: tuple[object, ...], make: Callable[[], nn.Module], split: str) -> list[np.ndarray]:
        """One (N,) bool array for each task: whether the model answers a row of the split correctly."""
        return [self._cell(key, make, task, split) for task in self.tasks]

    def _cell(self, key: tuple[object, ...], make: Callable[[], nn.Module], task: Task, split: str) -> np.ndarray:
        rows: Split = {"test": task.test, "validation": task.validation}[split]
        rows = rows.head(self.test_rows if split == "test" else self.validation_rows)
        whole = (key, self.base_key, task.key, split, len(rows), MAX_TOKENS)
        return self.cells.get(whole, lambda: self.reader.correct(make(), task, rows))

    def _fresh(self, state: State) -> nn.Module:
        return load(self.reader.base_model(), state)

    def _choose(
        self, experts: dict[str, Path], keys: dict[str, str], expert: list[np.ndarray], grid: Iterable[dict[str, int]]
    ) -> dict[str, int]:
        """SMILE's parameters with the best normalised accuracy on validation rows, among mixtures small enough."""
        scores: list[tuple[float, dict[str, int]]] = []
        for parameters in grid:
            given = recipe(self.reader.base, experts, parameters)
            expected = coterie.plan(given)
            if expected.parameters > LARGEST_RATIO * expected.base_parameters:
                continue
            self.say(f"SMILE, {parameters}, validation")
            with tempfile.TemporaryDirectory(dir=self.cells.directory.parent) as folder:

                def mixture(given: Any = given, out: Path = Path(folder) / "mixture") -> nn.Module:
                    coterie.build(given, out=out)
                    return coterie.load(str(out)).to(self.reader.device)

                key = ("smile", parameters, [self.base_key, *keys.values()], code_key())
                correct = self.answers(key, cache(mixture), "validation")
            scores.append((normalised(correct, expert), parameters))
        return max(scores, key=lambda pair: pair[0])[1]


def recipe(base: Path, experts: dict[str, Path], parameters: dict[str, int]) -> dict[str, Any]:
    """The recipe of a SMILE mixture of the experts."""
    sources = {name: str(path) for name, path in experts.items()}
    return {"method": "smile", "base": str(base), "experts": sources, "parameters": {**parameters, "top_k": 1}}


def _adapter_rank(directory: Path) -> int | None:
    """Rank of a LoRA adapter, which a mixture of that rank carries whole; None for a full fine-tune."""
    config = directory / "adapter_config.json"
    return json.loads(config.read_text())["r"] if config.exists() else None


@torch.inference_mode()
def routed_share(reader: Reader, model: nn.Module, expert: int, split: Split, rows: int = 250) -> np.ndarray:
    """() float64: share of (token, layer) pairs whose gate is largest at the expert; padding does not count."""
    hits = total = 0
    for _, batch in reader.batches(split.texts[:rows]):
        mask = batch["attention_mask"].bool()
        with coterie.routing_trace(model) as trace:
            model(**batch)
        for gates in trace.values():
            chosen = gates.argmax(-1)
            if chosen.shape == mask.shape:  # a layer that sees one vector per text, as a pooler, has no tokens
                hits += int((chosen[mask] == expert).sum())
                total += int(mask.sum())
    return np.array(hits / total)


@cache
def code_key() -> str:
    """sha256 (hex) of the source code that builds and runs mixtures."""
    root = Path(coterie.__file__).parent
    rooms = ("sources", "experts", "routing", "mixture", "methods", "building")
    return digest([path.read_text() for room in rooms for path in sorted((root / room).rglob("*.py"))])
