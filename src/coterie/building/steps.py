"""The steps of a build: each makes a few tensors of the mixture from the sources alone.

A step has no effect beyond what it gives back, so that this thread, a pool of threads or a machine of a cluster may
run it, in any order, with the same result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import CoterieError
from ..experts.bank import BankShape
from ..experts.fit import FittedLayer, LayerReport
from ..experts.masked import shape_from_dict
from ..mixture.layer import widths
from ..mixture.sites import policy_of
from .memory import give_back
from .others import Head, follow, gather_head
from .prepare import Prepared
from .report import Followed


class Step(NamedTuple):
    """A `layer` that may become a mixture layer, a `tensor` that follows a policy, a `head`, or the `router` of all
    layers; and its name."""

    kind: str
    name: str


@dataclass
class Facts:
    """What a step adds to the mixture's structure and to the report; plain data, which survives JSON.

    Attributes:
        parameters: how many parameters it wrote, those of the base included.
        shape, report, sums: of a mixture layer.
        dense_layers: the layer, where no expert changes its weight.
        others: tensor name -> what it follows.
        left_out: source -> tensor -> why it is not used.
        head: a module's copies.
        sha256: source -> tensor on disk -> hash of what was read.
    """

    parameters: int = 0
    shape: BankShape | None = None
    report: LayerReport | None = None
    sums: list[list[float]] = field(default_factory=list)
    dense_layers: list[str] = field(default_factory=list)
    others: dict[str, Followed] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    head: Head | None = None
    sha256: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": self.shape.to_dict() if self.shape else None}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Facts:
        return cls(
            **{
                **facts,
                "shape": shape_from_dict(facts["shape"]) if facts["shape"] else None,
                "report": LayerReport(**facts["report"]) if facts["report"] else None,
                "others": {name: Followed(**followed) for name, followed in facts["others"].items()},
                "head": Head(**facts["head"]) if facts["head"] else None,
            }
        )


@dataclass
class Made:
    """What a step gives back: tensors under their names in memory, group by group, and its facts."""

    groups: list[dict[str, torch.Tensor]]
    facts: Facts


@dataclass(frozen=True)
class Options:
    """What a step must know beyond the sources.

    Attributes:
        dtype: floating dtype of what is written; None for the base's, tensor by tensor.
        light: write only what is not the base's.
        device: where deltas are factorised.
    """

    dtype: torch.dtype | None = None
    light: bool = False
    device: str = "cpu"


def steps_of(ready: Prepared) -> list[Step]:
    """The steps of a build in the order in which their tensors are written.

    First the layers that may become mixture layers, then one step per tensor (or group of tensors that one conversion
    makes) outside them, then the heads, and what routes for all layers.
    """
    steps = [Step("layer", path) for path in ready.sites.layers]
    done: set[str] = set()
    for name in ready.sites.others:
        if name not in done:
            steps.append(Step("tensor", name))
            done.update(ready.inputs.base.together(name))
    shared = [Step("router", "coterie_router")] if ready.mixture.routing.score == "retrieval" else []
    return [*steps, *(Step("head", path) for path in ready.sites.heads), *shared]


def make(ready: Prepared, options: Options, step: Step) -> Made:
    """Run one step.

    Raises:
        CoterieError: tensors that are damaged, not finite, or of another shape than the base's.
    """
    making = _Making(ready, options)
    with torch.autocast(torch.device(options.device).type, enabled=False):
        {"layer": making.layer, "tensor": making.tensor, "head": making.head, "router": making.router}[step.kind](
            step.name
        )
    making.facts.sha256 = {source: c.sha256 for source, c in making.inputs.checkpoints.items() if c.sha256}
    give_back()
    return Made(making.groups, making.facts)


class _Making:
    def __init__(self, ready: Prepared, options: Options):
        self.ready, self.options, self.inputs = ready, options, ready.inputs.reader()
        self.groups: list[dict[str, torch.Tensor]] = []
        self.facts = Facts()

    def _cast(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.options.dtype or like.dtype) if tensor.is_floating_point() else tensor

    def _write(self, tensors: dict[str, torch.Tensor], is_base: bool = False) -> None:
        self.facts.parameters += sum(t.numel() for t in tensors.values() if t.is_floating_point())
        if not (self.options.light and is_base):
            self.groups.append({name: tensor.cpu() for name, tensor in tensors.items()})

    def layer(self, path: str) -> None:
        base = self.inputs.base
        weight = base.get(f"{path}.weight")
        bias_name = f"{path}.bias"
        bias = base.get(bias_name) if bias_name in base else None
        fitted = self._fit(path, weight, bias)
        name = f"{path}.weight" if fitted is None else f"{path}.base_weight"
        self._write({name: self._cast(weight, weight)}, is_base=True)
        if fitted is None:
            self.facts.dense_layers.append(path)
            if bias is not None:
                policy = policy_of(bias_name, self.inputs.recipe.others)
                value, followed = follow(
                    bias_name, bias, self.inputs.experts, policy, "bias of a layer that stays dense"
                )
                self.facts.others[bias_name] = followed
                self._write({bias_name: self._cast(value, bias)}, is_base=value is bias)
            return
        if bias is not None:
            self._write({bias_name: self._cast(bias, bias)}, is_base=True)
        for i, expert in enumerate(self.inputs.experts):
            if i not in fitted.shape.experts and expert.bias(path, bias) is not None:
                why = "bias of a layer whose weight only other experts change: no score can choose it"
                self.facts.left_out[f"expert {expert.name}"] = {bias_name: why}
        self.facts.shape, self.facts.report, self.facts.sums = fitted.shape, fitted.report, fitted.sums
        self._write({f"{path}.bank.{name}": self._cast(t, weight) for name, t in fitted.tensors.items()})
        if self.ready.statistics is not None and self.ready.mixture.routing.score == "vectors":
            rows = self.ready.statistics.rows(path, fitted.shape.experts)
            self._write({f"{path}.router.score.weight": self._cast(rows, weight)})

    def _fit(self, path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> FittedLayer | None:
        """One layer's bank: deltas read, oriented (out, in), factorised; None where no expert changes the weight."""
        experts, device, module = self.inputs.experts, self.options.device, self.inputs.skeleton.module(path)
        transposed = hasattr(module, "nx")
        if tuple(weight.shape) != widths(module)[:: 1 if transposed else -1]:
            raise CoterieError(f"tensor '{path}.weight' has shape {list(weight.shape)}", "base", "restore the file")
        deltas: list[Any] = [
            expert.fitted(path, weight) or expert.delta(path, weight, transposed) for expert in experts
        ]
        biases = [expert.bias(path, bias) for expert in experts]
        return self.ready.mixture.fitted.fit(
            path,
            (weight.T if transposed else weight).to(device),
            [None if delta is None else delta.to(device) for delta in deltas],
            biases,
            [expert.weight for expert in experts],
        )

    def tensor(self, name: str) -> None:
        base, sites = self.inputs.base, self.ready.sites
        group: dict[str, torch.Tensor] = {}
        unchanged = True
        for member in base.together(name):
            if member not in sites.others:
                continue
            value = base.get(member)
            made, self.facts.others[member] = follow(
                member, value, self.inputs.experts, sites.others[member], sites.why_dense[member]
            )
            unchanged = unchanged and made is value
            group[member] = self._cast(made, value)
        self._write(group, is_base=unchanged)

    def head(self, path: str) -> None:
        prefix, experts = f"{path}.", self.inputs.experts
        tensors = self.inputs.skeleton.tensors
        wanted = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        labels = [e.labels for e in experts]
        self.facts.head, named = gather_head(
            path, wanted, self.inputs.base, experts, labels, lambda tensor: self._cast(tensor, tensor)
        )
        self._write(named)

    def router(self, name: str) -> None:
        assert self.ready.statistics is not None
        like = self.inputs.base.get(f"{self.ready.sites.layers[0]}.weight")
        self._write({f"{name}.weight": self._cast(self.ready.statistics.embeddings(), like)})
