"""The writing half of a build: layer by layer, then everything else, each tensor accounted for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import CoterieError
from ..experts.fit import FittedLayer
from ..methods.registry import Mixture
from ..mixture.layer import widths
from ..mixture.sites import Sites, policy_of
from ..mixture.spec import MixtureSpec
from ..sources.experts import ExpertSource, same
from .inputs import LABELS, Inputs
from .others import Head, follow, gather_head
from .report import BuildReport, Followed
from .writer import ShardWriter


def fit_layer(
    mixture: Mixture, path: str, layer: nn.Module, base: Any, experts: list[ExpertSource], device: str
) -> FittedLayer | None:
    """One layer's bank: its deltas read, oriented (out, in), factorised. None where no expert changes the weight."""
    weight = base.get(f"{path}.weight")
    transposed = tuple(weight.shape) == widths(layer) and hasattr(layer, "nx")
    bias = base.get(f"{path}.bias") if f"{path}.bias" in base else None
    deltas = [expert.delta(path, weight, transposed) for expert in experts]
    biases = [expert.bias(path, bias) for expert in experts]
    oriented = (weight.T if transposed else weight).to(device)
    moved = [None if delta is None else delta.to(device) for delta in deltas]
    return mixture.experts.fit(path, oriented, moved, biases, [expert.weight for expert in experts])


class Stream:
    """The writing half of a build."""

    def __init__(
        self, inputs: Inputs, writer: ShardWriter, dtype: torch.dtype | None, light: bool, report: BuildReport
    ):
        self.inputs, self.writer, self.dtype, self.light, self.report = inputs, writer, dtype, light, report
        self.parameters = 0
        self._kept: list[str] = []

    def _cast(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype or like.dtype) if tensor.is_floating_point() else tensor

    def _write(self, tensors: dict[str, torch.Tensor], is_base: bool = False) -> None:
        self.parameters += sum(t.numel() for t in tensors.values() if t.is_floating_point())
        if self.light and is_base:
            return
        for name, tensor in self.inputs.skeleton.on_disk(tensors).items():
            self.writer.add(name, tensor)

    def layer(self, path: str, fitted: FittedLayer | None, spec: MixtureSpec) -> None:
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
                chosen = "average" if policy == "average" else "base"
                value, followed = follow(
                    bias_name, bias, self.inputs.experts, chosen, "bias of a layer that stays dense"
                )
                self.report.others[bias_name] = followed
                self._write({bias_name: self._cast(value, bias)}, is_base=value is bias)
            return
        if bias is not None:
            self._write({bias_name: self._cast(bias, bias)}, is_base=True)
        for i, expert in enumerate(self.inputs.experts):
            if i not in fitted.shape.experts and expert.bias(path, bias) is not None:
                why = "bias of a layer whose weight only other experts change: no score can choose it"
                self.report.left_out.setdefault(expert.name, {})[bias_name] = why
        spec.layers[path] = fitted.shape
        self.report.layers.append(fitted.report)
        self._write({f"{path}.bank.{name}": self._cast(t, weight) for name, t in fitted.tensors.items()})

    def others(self, sites: Sites, advance: Any) -> None:
        skeleton, base = self.inputs.skeleton, self.inputs.base
        done: set[str] = set()
        for name in sites.others:
            advance()
            if name in done:
                continue
            group: dict[str, torch.Tensor] = {}
            same = True
            for member in base.together(name):
                if member not in sites.others:
                    continue
                done.add(member)
                value = base.get(member)
                made, followed = follow(
                    member, value, self.inputs.experts, sites.others[member], sites.why_dense[member]
                )
                self.report.others[member] = followed
                same = same and made is value
                group[member] = self._cast(made, value)
            self._write(group, is_base=same)
        for tied, owner in skeleton.tied.items():
            for expert in self.inputs.experts:
                self._check_tied(expert, tied, owner)

    def _check_tied(self, expert: ExpertSource, tied: str, owner: str) -> None:
        """An expert may have untied what the base ties: then its own value cannot be kept, and that is said."""
        if not expert.has(tied) or owner not in self.inputs.base:
            return
        base = self.inputs.base.get(owner)
        value, shared = expert.value(tied, base), expert.value(owner, base)
        if value is not None and not same(value, base if shared is None else shared):
            followed = self.report.others.setdefault(tied, Followed(f"tied to {owner} in the base", "base"))
            followed.changed_by.append(expert.name)

    def heads(self, sites: Sites, spec: MixtureSpec, advance: Any) -> None:
        skeleton, experts = self.inputs.skeleton, self.inputs.experts
        labels = [expert.labels for expert in experts]
        found: list[Head] = []
        for path in sites.heads:
            prefix = f"{path}."
            wanted = {n.removeprefix(prefix): t for n, t in skeleton.tensors.items() if n.startswith(prefix)}
            head = gather_head(path, wanted, self.inputs.base, experts, labels)
            found.append(head)
            self._kept.append(path)
            advance()
        self._label(found, labels)
        for head in found:
            if head.shape is not None:
                spec.heads[head.path] = head.shape
                self.report.heads[head.path] = [spec.experts[i] for i in head.owners]
            self._write({name: self._cast(t, t) for name, t in head.named().items()})
        if found:
            spec.labels = labels
            config, first = self.inputs.config, labels[found[0].owners[0]]
            config.id2label = {int(k): v for k, v in first["id2label"].items()}
            config.label2id, config.problem_type = dict(first["label2id"]), first["problem_type"]

    def _label(self, heads: list[Head], labels: list[dict[str, Any]]) -> None:
        """Adapters name no labels: they have the base's, or as many numbered ones as their head has rows."""
        config = self.inputs.config
        own = {key: getattr(config, key, None) for key in LABELS}
        for index, given in enumerate(labels):
            if given:
                continue
            given |= own
            for head in heads:
                rows = [t for leaf, t in self._copy(head, index).items() if leaf.endswith("weight")]
                outputs = rows[-1].shape[0] if rows else 0
                expected = self.inputs.skeleton.module(head.path).state_dict()
                before = [t.shape[0] for leaf, t in expected.items() if leaf.endswith("weight")]
                if rows and before and outputs != before[-1]:
                    given["id2label"] = {i: f"LABEL_{i}" for i in range(outputs)}
                    given["label2id"] = {f"LABEL_{i}": i for i in range(outputs)}

    @staticmethod
    def _copy(head: Head, index: int) -> dict[str, torch.Tensor]:
        if head.shape is None:
            return head.tensors[0]
        return head.tensors[head.owners.index(index)] if index in head.owners else {}

    def account(self, expert: ExpertSource) -> None:
        """Every tensor of a source is used or on the list of what is left out; anything else stops the build."""
        if expert.left_out:
            self.report.left_out.setdefault(expert.name, {}).update(expert.left_out)
        known = {*self.report.others, *self.inputs.skeleton.tied}
        for layer in self.report.layers:
            known |= {f"{layer.path}.weight", f"{layer.path}.bias"}
        known |= {f"{path}.{leaf}" for path in self.report.dense_layers for leaf in ("weight", "bias")}
        for name in self.inputs.skeleton.tensors:
            inside = any(name.startswith(f"{path}.") for path in self._kept)
            if expert.has(name) and name not in known and not inside:
                raise CoterieError(f"tensor {name!r} is unaccounted for", f"expert {expert.name!r}", "report this")
