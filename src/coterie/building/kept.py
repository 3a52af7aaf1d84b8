"""Experts of a mixture that exists, for another one that holds them too: read back from it as it holds them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..experts.factorise import frobenius
from ..experts.fit import LayerReport
from ..mixture.spec import MixtureSpec
from ..sources.checkpoint import Checkpoint
from ..sources.delta import Delta, Fitted
from ..sources.experts import ExpertSource
from ..sources.names import Skeleton
from .report import Followed


@dataclass
class Kept:
    """The experts of a mixture that are kept.

    Attributes:
        names: theirs, in order.
        spec: the mixture's structure.
        checkpoint: its files.
        layers: module path -> the report of it.
        others: tensor outside the mixture layers -> what it follows.
        left_out: source -> tensor -> why it is not used.
        kinds: expert -> what it was read from.
        read_before: source -> tensor on disk -> hash, of what the mixture's build read.
    """

    names: list[str]
    spec: MixtureSpec
    checkpoint: Checkpoint
    layers: dict[str, LayerReport]
    others: dict[str, Followed]
    left_out: dict[str, dict[str, str]]
    kinds: dict[str, str]
    read_before: dict[str, dict[str, str]]

    def expert(self, name: str, skeleton: Skeleton, weight: float) -> KeptExpert:
        """One of them, under the names of an architecture."""
        return KeptExpert(self, name, skeleton, weight)


class KeptExpert(ExpertSource):
    """One expert as a mixture holds it."""

    def __init__(self, kept: Kept, name: str, skeleton: Skeleton, weight: float):
        self.kept, self.index, self.skeleton = kept, kept.spec.experts.index(name), skeleton
        self.kind = kept.kinds[name]
        labels: dict[str, Any] = {}
        if self.kind != "adapter" and kept.spec.labels:  # an adapter says nothing of labels
            labels = dict(kept.spec.labels[self.index])
            labels["id2label"] = {int(number): label for number, label in labels["id2label"].items()}
        super().__init__(name, weight, labels)
        self.location = str(kept.checkpoint.location.path)
        self.checkpoint = replace(kept.checkpoint, sha256={}, bytes_read=0)
        self.left_out = dict(kept.left_out.get(f"expert {name}", {}))

    def has(self, name: str) -> bool:
        return False

    def altered(self, name: str) -> bool:
        followed = self.kept.others.get(name)
        return followed is not None and self.name in followed.changed_by

    def value(self, name: str, base: torch.Tensor | None, any_shape: bool = False) -> torch.Tensor | None:
        """Of heads alone: what else it changed, the mixture does not hold."""
        if not any_shape:
            return None
        for path, head in self.kept.spec.heads.items():
            if name.startswith(f"{path}."):
                if self.index not in head.owners:
                    return None
                return self._read(f"{path}.{head.owners.index(self.index)}.{name.removeprefix(f'{path}.')}")
        return self._read(name) if self._disk(name) in self.checkpoint.tensors else None  # one that all share

    def delta(self, path: str, base: torch.Tensor, transposed: bool) -> Delta | None:
        """None: all that there is, is fitted."""
        return None

    def bias(self, path: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """Of a layer of which a lone expert changed the bias alone."""
        shape = self.kept.spec.layers.get(path)
        alone = shape is not None and shape.bias and shape.ranks == (0,)
        return self._read(f"{path}.bank.bias")[0] if alone else None

    def rank_bound(self, path: str) -> int | None:
        rank = self.kept.layers[path].ranks[self.index] if path in self.kept.layers else None
        return rank if isinstance(rank, int) else 0 if rank is None else None

    def fitted(self, path: str, base: torch.Tensor) -> Fitted | None:
        shape = self.kept.spec.layers.get(path)
        if shape is None or self.index not in shape.experts:
            return None
        report, at = self.kept.layers[path], shape.experts.index(self.index)
        norm = (report.norms[self.index] or 0.0) * (frobenius(base) or 1.0)
        residual, excess = report.residuals[self.index] or 0.0, report.excess[self.index] or 0.0
        part = Fitted(torch.empty(0, report.d_in), report.gate_rank or None, residual, excess, norm)
        if shape.bias:
            bias = self._read(f"{path}.bank.bias")[at]
            part.bias = bias if bias.any() else None
        if shape.ranks is None:
            part.dense = self._read(f"{path}.bank.dense")[at]
        else:
            begin, rank = sum(shape.ranks[:at]), report.ranks[self.index]
            rows = slice(begin, begin + int(rank or 0))
            part.down, part.up = self._read(f"{path}.bank.down")[rows], self._read(f"{path}.bank.up")[rows]
        if shape.gate:
            part.gate = self._read(f"{path}.bank.gate").view(len(shape.experts), shape.gate_rank, -1)[at]
        return part

    def vector(self, path: str) -> torch.Tensor:
        """(d_in,), what a layer's router holds of its data."""
        return self._read(f"{path}.router.score.weight")[self.kept.spec.layers[path].experts.index(self.index)]

    def embeddings(self) -> torch.Tensor:
        """(n, width), of its texts, which the mixture retrieves by."""
        counts = self.kept.spec.routing.score_options["counts"]
        return self._read("coterie_router.weight").split(counts)[self.index]

    def _disk(self, name: str) -> str:
        return next(iter(self.skeleton.on_disk({name: torch.empty(0)})))

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self._disk(name))
