"""What a build will do, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..methods.registry import Mixture
from ..mixture.layer import widths
from ..mixture.sites import Sites
from .inputs import Inputs
from .report import by_kind


@dataclass
class PlannedLayer:
    """A layer to be: its widths, and the most that each expert's rank can be (None where it is not touched)."""

    path: str
    d_in: int
    d_out: int
    ranks: list[int | str | None]
    parameters: int


@dataclass
class Plan:
    """The account of a build before it runs.

    Headers tell shapes and adapters' ranks, not whether a full fine-tune changes a layer: parameters, bytes and
    memory are upper bounds.

    Attributes:
        base_parameters: parameters of the base architecture.
        parameters: parameters of the mixture, at most.
        bytes_read, bytes_written: traffic of tensors, at most.
        bytes_written_low: what is written in any case (the base's own tensors).
        layer_memory: anonymous memory that the work on the largest layer takes, at most, in bytes.
        jobs: layers at a time.
    """

    method: str
    architecture: str
    experts: list[str]
    layers: list[PlannedLayer]
    others: dict[str, str]
    why_dense: dict[str, str]
    heads: list[str]
    base_parameters: int
    parameters: int
    bytes_read: int
    bytes_written: int
    bytes_written_low: int
    layer_memory: int
    warnings: list[str]
    jobs: int = 1

    @property
    def memory(self) -> int:
        """Peak anonymous memory, at most, beyond the interpreter's own: `jobs` layers at a time."""
        return self.jobs * self.layer_memory

    def tensor_names(self, experts: int) -> Iterator[str]:
        """The names that a build writes, at most."""
        for layer in self.layers:
            leaves = ("base_weight", "bias", "bank.down", "bank.up", "bank.gate", "bank.bias", "router.score.weight")
            yield from (f"{layer.path}.{leaf}" for leaf in leaves)
        yield from self.others
        yield "coterie_router.weight"
        yield from (f"{path}.{i}.{leaf}" for path in self.heads for i in range(experts) for leaf in "123456789")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "memory": self.memory, "ratio": self.parameters / max(self.base_parameters, 1)}

    def table(self) -> RenderableType:
        """The plan for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        head.add_row("plan", f"{self.method} of {len(self.experts)} experts in {self.architecture}")
        ratio = self.parameters / max(self.base_parameters, 1)
        head.add_row("parameters", f"at most {self.parameters:,} ({ratio:.3f} x the base's {self.base_parameters:,})")
        head.add_row("reads", f"{self.bytes_read / 1e9:.3f} GB")
        head.add_row("writes", f"at most {self.bytes_written / 1e9:.3f} GB")
        head.add_row(
            "memory", f"about {self.memory / 1e9:.3f} GB beyond the interpreter's own, for {self.jobs} layers at a time"
        )
        table = Table(title=f"{len(self.layers)} layers may become mixture layers", title_justify="left", box=None)
        for column in ("layers", "of them", "in -> out", "ranks, at most", "parameters"):
            table.add_column(column, overflow="fold")
        for (pattern, widths_), layers in by_kind(self.layers).items():
            ranks = sorted({", ".join("-" if r is None else str(r) for r in layer.ranks) for layer in layers})
            total = sum(layer.parameters for layer in layers)
            table.add_row(pattern, str(len(layers)), widths_, "; ".join(ranks), f"{total:,}")
        rest = Table(title="everything else", title_justify="left", box=None)
        for column in ("what", "tensors", "follows"):
            rest.add_column(column, overflow="fold")
        groups: dict[tuple[str, str], int] = {}
        for name, policy in self.others.items():
            key = (self.why_dense[name], policy)
            groups[key] = groups.get(key, 0) + 1
        for (why, policy), count in sorted(groups.items()):
            rest.add_row(why, str(count), policy)
        for path in self.heads:
            rest.add_row(path, "module", "kept per expert where they differ")
        return Group(head, table, rest, *(Text(f"! {w}", style="yellow") for w in self.warnings))


def make_plan(inputs: Inputs, method: str, mixture: Mixture, sites: Sites, warnings: list[str]) -> Plan:
    """Plan a build from what the headers say."""
    skeleton, base, experts = inputs.skeleton, inputs.stored, inputs.experts
    layers = [_layer(inputs, mixture, path) for path in sites.layers]
    total = sum(t.numel() for n, t in skeleton.tensors.items() if n not in skeleton.tied and t.is_floating_point())
    dtype = getattr(torch, inputs.recipe.dtype) if inputs.recipe.dtype else None

    def size(name: str) -> int:
        if name not in base:
            return skeleton.tensors[name].numel() * 4
        stored = base.checkpoint.tensors[base.names_on_disk(name)[0]].dtype
        width = (dtype or stored).itemsize if stored.is_floating_point else stored.itemsize
        return skeleton.tensors[name].numel() * width

    own = sum(size(n) for n in skeleton.tensors if n not in skeleton.tied)
    banks = sum(layer.parameters * size(f"{layer.path}.weight") // (layer.d_in * layer.d_out) for layer in layers)
    heads = sum(
        size(n) * (len(experts) - 1) for n in skeleton.tensors if any(n.startswith(f"{p}.") for p in sites.heads)
    )
    head_parameters = sum(
        t.numel() * (len(experts) - 1)
        for n, t in skeleton.tensors.items()
        if any(n.startswith(f"{p}.") for p in sites.heads)
    )
    options = mixture.routing.score_options
    embeddings = sum(options["counts"]) * options["width"] if mixture.routing.score == "retrieval" else 0
    names = [n for n in skeleton.tensors if n not in skeleton.tied]
    largest = max((layer.d_in * layer.d_out for layer in layers), default=0)
    averaged = max(
        (skeleton.tensors[n].numel() for n, policy in sites.others.items() if policy == "average"), default=0
    )
    return Plan(
        method,
        type(skeleton.model).__name__,
        inputs.recipe.names,
        layers,
        sites.others,
        sites.why_dense,
        sites.heads,
        base_parameters=total,
        parameters=total + sum(layer.parameters for layer in layers) + head_parameters + embeddings,
        bytes_read=sum((base.bytes(n) if n in base else 0) + sum(e.bytes(n) for e in experts) for n in names),
        bytes_written=own + banks + heads,
        bytes_written_low=own,
        # the base, each expert's delta in float32, and one factorisation in float64 with its workspace; or an average's
        # base, sum, value and delta in float32
        layer_memory=max(largest * (4 * (len(experts) + 2) + 8 * 5), averaged * 4 * 4),
        warnings=warnings,
    )


def _layer(inputs: Inputs, mixture: Mixture, path: str) -> PlannedLayer:
    d_in, d_out = widths(inputs.skeleton.module(path))
    bounds = [expert.rank_bound(path) for expert in inputs.experts]
    bias = any(expert.has(f"{path}.bias") for expert in inputs.experts)
    ranks, parameters = mixture.fitted.plan(d_in, d_out, bounds, bias)
    if mixture.routing.score == "vectors":
        parameters += d_in * sum(rank is not None for rank in ranks)
    return PlannedLayer(path, d_in, d_out, ranks, parameters)
