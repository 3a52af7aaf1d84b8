"""The writing half of a build: layer by layer, then everything else, each tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from typing import Any, Protocol

import torch

from ..errors import CoterieError
from ..mixture.spec import HeadShape, MixtureSpec
from ..sources.experts import ExpertSource, same
from .others import Head
from .prepare import Prepared
from .report import BuildReport, Followed
from .steps import Facts, Made, Step, steps_of

# Runs steps, somewhere, and gives back what they made, in their order; it is closed when the build ends early.
Engine = Callable[[Iterable[Step]], Generator[Made, None, None]]


class Sink(Protocol):
    """Where a build's tensors go: shards on disk, or a dict."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor."""

    def note(self, step: Any) -> None:
        """Take a step whose tensors were all added, with its facts, as plain data."""


class Stream:
    """One pass over everything that a mixture holds.

    Args:
        ready: the prepared build.
        sink: takes each tensor under its name on disk.
        report: is filled on the way.
        engine: runs the steps.
        done: the facts of steps that the sink holds already: the first few.

    Attributes:
        spec: the mixture's structure, complete after `run`.
        parameters: how many parameters the mixture has so far.
    """

    def __init__(
        self, ready: Prepared, sink: Sink, report: BuildReport, engine: Engine, done: Mapping[Step, Facts] | None = None
    ):
        self.inputs, self.sites, self._experts = ready.inputs, ready.sites, ready.mixture.fitted
        self.sink, self.report, self.engine, self.done = sink, report, engine, done or {}
        names = self.inputs.recipe.names
        self.spec = MixtureSpec(ready.method.name, ready.parameters, ready.mixture.routing, names)
        self.spec.siblings = ready.siblings
        self.parameters = 0
        self._all = steps_of(ready)
        self._heads: dict[str, Head] = {}
        self._sums: dict[str, list[list[float]]] = {}

    @property
    def steps(self) -> int:
        """How often `run` calls `advance`."""
        return len(self._all)

    def run(self, advance: Callable[[], Any]) -> None:
        """Write everything; `advance` is called after each step.

        Raises:
            CoterieError: bad tensors, experts that change no layer, or a tensor of a source that is unaccounted for.
        """
        with closing(self.engine(step for step in self._all if step not in self.done)) as made:
            for step in self._all:
                if step.kind != "layer":
                    self._require_layers()
                facts = self.done.get(step) or self._write(step, next(made))
                self._take(step, facts)
                advance()
        self._require_layers()
        reports = {layer.path: layer for layer in self.report.layers}
        self.spec.layers = self._experts.finish(self.spec.layers, self._sums, reports)
        self._tied()
        self._labelled()
        self._account()

    def _require_layers(self) -> None:
        if not self.spec.layers:
            raise CoterieError(
                "no expert changes the weight of a layer that may become a mixture layer: this would be the base",
                "experts",
                "check that these are the experts that you mean, and the include and exclude globs",
            )

    def _write(self, step: Step, made: Made) -> Facts:
        for group in made.groups:
            for name, tensor in self.inputs.skeleton.on_disk(group).items():
                self.sink.add(name, tensor)
        self.sink.note([step, made.facts.to_dict()])
        return made.facts

    def _take(self, step: Step, facts: Facts) -> None:
        """Put a step's facts into the spec, the report and the account of what was read."""
        self.parameters += facts.parameters
        if facts.shape is not None and facts.report is not None:
            self.spec.layers[step.name] = facts.shape
            self.report.layers.append(facts.report)
            self._sums[step.name] = facts.sums
        self.report.dense_layers += facts.dense_layers
        self.report.others |= facts.others
        for source, names in facts.left_out.items():
            self.report.left_out.setdefault(source, {}).update(names)
        if facts.head is not None:
            self._heads[step.name] = facts.head
            if not facts.head.shared:
                self.spec.heads[step.name] = HeadShape(facts.head.owners, facts.head.shapes)
                self.report.heads[step.name] = [self.spec.experts[i] for i in facts.head.owners]
        for source, hashes in facts.sha256.items():
            self.inputs.checkpoints[source].sha256.update(hashes)

    def _tied(self) -> None:
        """What the base ties cannot differ: said where an expert unties it, refused where that would be wrong."""
        for tied, owner in self.inputs.skeleton.tied.items():
            if owner not in self.inputs.base:
                continue
            base = self.inputs.base.get(owner)
            for expert in self.inputs.experts:
                value, shared = expert.value(tied, base), expert.value(owner, base)
                if expert.kind == "adapter":
                    apart = expert.has(tied) != expert.has(owner)
                else:
                    apart = value is not None and not same(value, base if shared is None else shared)
                if not apart:
                    continue
                if self.sites.others.get(owner) == "average":
                    raise CoterieError(
                        f"it changes {tied!r} and {owner!r} apart, which the base ties: their average has no place",
                        f"expert {expert.name!r} ({expert.location})",
                        f'keep the base\'s there, by a glob: `others: {{"{owner}": base, "*": average}}`',
                    )
                followed = Followed(f"tied to {owner} in the base", "base")
                self.report.others.setdefault(tied, followed).changed_by.append(expert.name)

    def _labelled(self) -> None:
        """Labels go with the heads; the configuration shows the first expert's."""
        heads = self._heads
        if heads and self.inputs.labels:
            self.spec.labels = [self._labels(index) for index in range(len(self.inputs.experts))]
            first = self.spec.labels[next(iter(heads.values())).owners[0]]
            config = self.inputs.config
            config.id2label = {int(k): v for k, v in first["id2label"].items()}
            config.label2id, config.problem_type = dict(first["label2id"]), first["problem_type"]

    def _labels(self, index: int) -> dict[str, Any]:
        """An expert's labels; an adapter's are the base's, or numbered where its head has other rows."""
        labels = self.inputs.experts[index].labels or dict(self.inputs.labels)
        for path, head in self._heads.items():
            rows = [shape[0] for leaf, shape in head.copy_of(index).items() if leaf.endswith("weight")]
            usual = [t.shape[0] for n, t in self.inputs.skeleton.module(path).state_dict().items() if "weight" in n]
            if rows and rows[-1] != usual[-1] and len(labels["id2label"]) != rows[-1]:
                labels["id2label"] = {i: f"LABEL_{i}" for i in range(rows[-1])}
                labels["label2id"] = {f"LABEL_{i}": i for i in range(rows[-1])}
        return labels

    def _account(self) -> None:
        """Every tensor of a source is used or on the list of what is left out; anything else stops the build."""
        known = {*self.report.others, *self.inputs.skeleton.tied}
        paths = [*(layer.path for layer in self.report.layers), *self.report.dense_layers]
        known |= {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}
        for name in self.inputs.skeleton.tensors:
            if name in known or any(name.startswith(f"{path}.") for path in self.sites.heads):
                continue
            holder = next((e for e in self.inputs.experts if isinstance(e, ExpertSource) and e.has(name)), None)
            if holder is not None or name in self.inputs.base:
                where = f"expert {holder.name!r}" if holder is not None else "base"
                raise CoterieError(f"tensor {name!r} is unaccounted for", where, "report this as a defect of coterie")
