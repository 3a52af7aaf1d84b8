"""The writing half of a build: layer by layer, then everything else, each tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ..errors import CoterieError
from ..experts.fit import FittedLayer
from ..mixture.layer import widths
from ..mixture.sites import policy_of
from ..mixture.spec import MixtureSpec
from ..sources.experts import ExpertSource, same
from .others import Head, follow, gather_head
from .prepare import Prepared
from .report import BuildReport, Followed


class Sink(Protocol):
    """Where a build's tensors go: shards on disk, or a dict."""

    def add(self, name: str, tensor: torch.Tensor) -> None: ...


class Stream:
    """One pass over everything that a mixture holds.

    Args:
        ready: the prepared build.
        sink: takes each tensor under its name on disk.
        report: is filled on the way.
        dtype: floating dtype of what is written; None for the base's, tensor by tensor.
        light: write only what is not the base's.
        device: where deltas are factorised.

    Attributes:
        spec: the mixture's structure, complete after `run`.
        parameters: how many parameters the mixture has so far.
    """

    def __init__(
        self,
        ready: Prepared,
        sink: Sink,
        report: BuildReport,
        dtype: torch.dtype | None = None,
        light: bool = False,
        device: str = "cpu",
    ):
        self.ready, self.inputs, self.sites = ready, ready.inputs, ready.sites
        self.sink, self.report, self.dtype, self.light, self.device = sink, report, dtype, light, device
        names = self.inputs.recipe.names
        self.spec = MixtureSpec(ready.method.name, ready.parameters, ready.mixture.routing, names)
        self.parameters = 0

    @property
    def steps(self) -> int:
        """How often `run` calls `advance`."""
        return len(self.sites.layers) + len(self.sites.others) + len(self.sites.heads)

    def run(self, advance: Callable[[], Any]) -> None:
        """Write everything; `advance` is called after each step.

        Raises:
            CoterieError: bad tensors, experts that change no layer, or a tensor of a source that is unaccounted for.
        """
        for path in self.sites.layers:
            self._layer(path, self._fit(path))
            advance()
        if not self.spec.layers:
            raise CoterieError(
                "no expert changes the weight of a layer that may become a mixture layer: this would be the base",
                "experts",
                "check that these are the experts that you mean, and the include and exclude globs",
            )
        self._others(advance)
        self._tied()
        self._heads(advance)
        self._account()

    def _fit(self, path: str) -> FittedLayer | None:
        """One layer's bank: deltas read, oriented (out, in), factorised; None where no expert changes the weight."""
        base, experts = self.inputs.base, self.inputs.experts
        weight = base.get(f"{path}.weight")
        transposed = hasattr(self.inputs.skeleton.module(path), "nx")
        if tuple(weight.shape) != widths(self.inputs.skeleton.module(path))[:: 1 if transposed else -1]:
            raise CoterieError(f"tensor '{path}.weight' has shape {list(weight.shape)}", "base", "restore the file")
        bias = base.get(f"{path}.bias") if f"{path}.bias" in base else None
        deltas = [expert.delta(path, weight, transposed) for expert in experts]
        biases = [expert.bias(path, bias) for expert in experts]
        return self.ready.mixture.experts.fit(
            path,
            (weight.T if transposed else weight).to(self.device),
            [None if delta is None else delta.to(self.device) for delta in deltas],
            biases,
            [expert.weight for expert in experts],
        )

    def _cast(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype or like.dtype) if tensor.is_floating_point() else tensor

    def _write(self, tensors: dict[str, torch.Tensor], is_base: bool = False) -> None:
        self.parameters += sum(t.numel() for t in tensors.values() if t.is_floating_point())
        if self.light and is_base:
            return
        for name, tensor in self.inputs.skeleton.on_disk(tensors).items():
            self.sink.add(name, tensor)

    def _layer(self, path: str, fitted: FittedLayer | None) -> None:
        base = self.inputs.base
        weight = base.get(f"{path}.weight")
        name = f"{path}.weight" if fitted is None else f"{path}.base_weight"
        self._write({name: self._cast(weight, weight)}, is_base=True)
        bias_name = f"{path}.bias"
        bias = base.get(bias_name) if bias_name in base else None
        if fitted is None:
            self.report.dense_layers.append(path)
            if bias is not None:
                policy = policy_of(bias_name, self.inputs.recipe.others)
                value, followed = follow(
                    bias_name, bias, self.inputs.experts, policy, "bias of a layer that stays dense"
                )
                self.report.others[bias_name] = followed
                self._write({bias_name: self._cast(value, bias)}, is_base=value is bias)
            return
        if bias is not None:
            self._write({bias_name: self._cast(bias, bias)}, is_base=True)
        for i, expert in enumerate(self.inputs.experts):
            if i not in fitted.shape.experts and expert.bias(path, bias) is not None:
                why = "bias of a layer whose weight only other experts change: no score can choose it"
                self.report.left_out.setdefault(f"expert {expert.name}", {})[bias_name] = why
        self.spec.layers[path] = fitted.shape
        self.report.layers.append(fitted.report)
        self._write({f"{path}.bank.{name}": self._cast(t, weight) for name, t in fitted.tensors.items()})

    def _others(self, advance: Callable[[], Any]) -> None:
        base, sites = self.inputs.base, self.sites
        done: set[str] = set()
        for name in sites.others:
            advance()
            if name in done:
                continue
            group: dict[str, torch.Tensor] = {}
            unchanged = True
            for member in base.together(name):
                if member not in sites.others:
                    continue
                done.add(member)
                value = base.get(member)
                made, followed = follow(
                    member, value, self.inputs.experts, sites.others[member], sites.why_dense[member]
                )
                self.report.others[member] = followed
                unchanged = unchanged and made is value
                group[member] = self._cast(made, value)
            self._write(group, is_base=unchanged)

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

    def _heads(self, advance: Callable[[], Any]) -> None:
        experts = self.inputs.experts
        found: list[Head] = []
        for path in self.sites.heads:
            prefix = f"{path}."
            tensors = self.inputs.skeleton.tensors
            wanted = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            found.append(gather_head(path, wanted, self.inputs.base, experts, [e.labels for e in experts]))
            advance()
        for head in found:
            if head.shape is not None:
                self.spec.heads[head.path] = head.shape
                self.report.heads[head.path] = [self.spec.experts[i] for i in head.owners]
            self._write({name: self._cast(t, t) for name, t in head.named().items()})
        if found and self.inputs.labels:
            self.spec.labels = [self._labels(found, index) for index in range(len(experts))]
            first = self.spec.labels[found[0].owners[0]]
            config = self.inputs.config
            config.id2label = {int(k): v for k, v in first["id2label"].items()}
            config.label2id, config.problem_type = dict(first["label2id"]), first["problem_type"]

    def _labels(self, heads: list[Head], index: int) -> dict[str, Any]:
        """An expert's labels; an adapter's are the base's, or numbered where its head has other rows."""
        labels = self.inputs.experts[index].labels or dict(self.inputs.labels)
        for head in heads:
            rows = [t.shape[0] for leaf, t in head.copy_of(index).items() if leaf.endswith("weight")]
            usual = [
                t.shape[0] for n, t in self.inputs.skeleton.module(head.path).state_dict().items() if "weight" in n
            ]
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
