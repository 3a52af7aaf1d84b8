"""New experts from those of a library, by exact arithmetic of their deltas, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..building.writer import ShardWriter
from ..errors import CoterieError
from ..experts.factorise import low_rank_svd
from ..merging.adapters import PREFIX, write_config
from ..sources.delta import LowRank
from .operations import Operation, get

if TYPE_CHECKING:
    from .expert import Expert

# What is left of deltas that cancel: their rounding.
NOTHING = 1e-12


@dataclass
class CombinedLayer:
    """What became of one layer.

    Attributes:
        path: its module path.
        rank: of the new factors.
        norm: Frobenius norm of the operation's exact result.
        residual: `|result - B A| / |result|`, with the factors as they are written.
        difference: `|result - exact| / |exact|` where the operation stands in for an exact one; else None.
    """

    path: str
    rank: int
    norm: float
    residual: float
    difference: float | None = None


@dataclass
class CombineReport:
    """The account of an operation.

    Attributes:
        operation: its name.
        cite: where it was published.
        experts: what it was applied to, in order.
        parameters: as used.
        rank: that the result was recompressed to; None where it is exact.
        layers: one entry for each layer of the new expert.
        residual: over all layers, as a layer's.
        difference: likewise; of `instead_of`.
        instead_of: the exact operation that the difference is to.
        whole: the expert whose tensors that are no factors (heads) the new one takes.
    """

    operation: str
    cite: str
    experts: list[str]
    parameters: dict[str, Any]
    rank: int | None
    layers: list[CombinedLayer] = field(default_factory=list)
    residual: float = 0.0
    difference: float | None = None
    instead_of: str | None = None
    whole: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One sentence of what was made, and how good it is."""
        ranks = sorted({layer.rank for layer in self.layers})
        text = f"{len(self.layers)} layers of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        text += f", residual {self.residual:.2g}"
        if self.difference is not None:
            text += f"; it differs from `{self.instead_of}` by {self.difference:.2f} of that one's norm"
        return text


def combine(
    operation: str, experts: Sequence[Expert], parameters: dict[str, Any], rank: int | None, base: str, folder: Path
) -> CombineReport:
    """Write the adapter that an operation makes of experts into a folder; float32, or wider where they are.

    Args:
        operation: a name that `operations.known` lists.
        experts: what it is applied to, in order.
        parameters: of the operation.
        rank: that every layer of the result is recompressed to, at best; None keeps it exact, at the sum of the ranks.
        base: what the adapter's configuration calls its base, where the experts' do not agree.
        folder: for the adapter.

    Raises:
        CoterieError: an unknown operation or parameter, a wrong number of experts, experts whose layers cannot be
            compared, or nothing is left.
    """
    how = get(operation)
    report = CombineReport(how.name, how.cite, [e.name for e in experts], how.check(parameters), rank)
    report.instead_of = how.instead_of
    _check(how, experts, rank)
    first = experts[0]
    paths = list(dict.fromkeys(path for expert in experts for path in expert.layers))
    names = [f"{PREFIX}{path}.lora_{side}.weight" for path in paths for side in "AB"]
    writer = ShardWriter(folder, 2**62, [*names, *first.saved.values()])
    squares = missed = differ = exact_squares = 0.0
    for path in paths:
        factors = [e.factors(path) if path in e.layers else None for e in experts]
        scales = [e.layers[path].scale if path in e.layers else 1.0 for e in experts]
        result = how.apply(factors, scales, **report.parameters)
        norm = _norm(result)
        if norm <= NOTHING * sum(_norm(f) for f in factors if f is not None):
            continue
        written = _written(result, rank, first.dtype(path))
        residual = _distance(result, written) / norm
        line = CombinedLayer(path, written.up.shape[1], norm, residual)
        if how.instead_of is not None:
            exact = get(how.instead_of).apply(factors, scales)
            length, away = _norm(exact), _distance(result, exact)
            line.difference = away / length if length else math.inf
            differ, exact_squares = differ + away**2, exact_squares + length**2
        squares, missed = squares + norm**2, missed + (residual * norm) ** 2
        report.layers.append(line)
        writer.add(f"{PREFIX}{path}.lora_A.weight", written.down)
        writer.add(f"{PREFIX}{path}.lora_B.weight", written.up)
    if not report.layers:
        raise CoterieError("nothing is left of these experts", operation, "check that they differ")
    report.residual = math.sqrt(missed / squares)
    report.difference = math.sqrt(differ / exact_squares) if exact_squares else None
    for disk in first.saved.values():
        writer.add(disk, first.checkpoint.read(disk))
        report.whole = first.name
    writer.finish("adapter_model")
    ranks = {line.path: line.rank for line in report.layers}
    write_config(folder, [expert.config for expert in experts], base, ranks, list(first.saved))
    return report


def _check(how: Operation, experts: Sequence[Expert], rank: int | None) -> None:
    least, most = how.experts
    if len(experts) < least or (most is not None and len(experts) > most):
        wanted = f"{least}" if most == least else f"{least} or more"
        raise CoterieError(f"{len(experts)} given", f"the experts of {how.name}", f"it takes {wanted}")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise CoterieError(f"rank is {rank!r}", how.name, "give a whole number >= 1")
    for expert in experts:
        expert.require_factors()
        if expert.prefix != experts[0].prefix:
            raise CoterieError(
                f"its layers are named as in {expert.architecture}, and those of {experts[0].name!r} as in "
                f"{experts[0].architecture}",
                f"expert {expert.name!r}",
                "combine experts of one class",
            )


def _written(result: LowRank, rank: int | None, dtype: torch.dtype) -> LowRank:
    """Factors as they are written."""
    if rank is not None:
        found = low_rank_svd(result.up, result.down, rank)
        result = LowRank(found.u * found.s, found.vt)
    dtype = torch.promote_types(dtype, torch.float32)  # exact arithmetic deserves more than bfloat16
    return LowRank(result.up.to(dtype), result.down.to(dtype))


def _norm(delta: LowRank) -> float:
    return low_rank_svd(delta.up, delta.down, 0).norm


def _distance(a: LowRank, b: LowRank) -> float:
    """Frobenius norm of a - b, without their products."""
    return _norm(LowRank(torch.cat([a.up, -b.up.double()], 1), torch.cat([a.down, b.down.double()])))
