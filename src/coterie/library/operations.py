"""Arithmetic of deltas: each operation one typed function on the experts' deltas of a layer, under its name.

    @operation("add", cite="...", experts=(2, None))
    def add(factors, *, scale: Annotated[float, Field(description="...")] = 1.0) -> LowRank:

It asks by name for what it is given: `factors`, the experts' own of one layer, their scales folded into `up`, None
where an expert leaves the layer alone (at least one does not); `scales`, what was folded. The keyword-only arguments
are its parameters. What comes back is exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field

from ..errors import CoterieError
from ..merging.factors import concatenate
from ..recipe import nearest
from ..registration import Registered
from ..sources.delta import LowRank

Factors = Sequence[LowRank | None]
Scale = Annotated[float, Field(allow_inf_nan=False, description="factor on what is subtracted")]


@dataclass(frozen=True)
class Operation(Registered):
    """A registered operation.

    Attributes:
        experts: how many it takes, at least and at most (None: any number).
        instead_of: the exact operation that published code with this formula was meant to be.
    """

    experts: tuple[int, int | None]
    instead_of: str | None = None

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The user's parameters and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def apply(self, factors: Factors, scales: Sequence[float], **parameters: Any) -> LowRank:
        """The result for one layer."""
        given = {"factors": factors, "scales": scales}
        asked = [name for name in inspect.signature(self.function).parameters if name in given]
        return self.function(**{name: given[name] for name in asked}, **parameters)


_OPERATIONS: dict[str, Operation] = {}


def operation(
    name: str, cite: str, experts: tuple[int, int | None], instead_of: str | None = None
) -> Callable[[Callable[..., LowRank]], Callable[..., LowRank]]:
    """Register the decorated function under `name`; arguments as the attributes of `Operation`."""

    def register(function: Callable[..., LowRank]) -> Callable[..., LowRank]:
        _OPERATIONS[name] = Operation(name, cite, function, experts, instead_of)
        return function

    return register


def known() -> list[Operation]:
    """Every registered operation, by name."""
    return [_OPERATIONS[name] for name in sorted(_OPERATIONS)]


def get(name: str) -> Operation:
    """The operation of that name.

    Raises:
        CoterieError: there is none; names the nearest.
    """
    if name not in _OPERATIONS:
        raise CoterieError(f"unknown operation {name!r}", "combine", nearest(name, list(_OPERATIONS)))
    return _OPERATIONS[name]


@operation("add", cite="Ilharco et al. 2023, arXiv:2212.04089", experts=(2, None))
def add(
    factors: Factors,
    *,
    scale: Annotated[float, Field(allow_inf_nan=False, description="factor on the sum; 1 / number: the mean")] = 1.0,
) -> LowRank:
    """The sum of the experts: [B_1, B_2, ...] [A_1; A_2; ...]."""
    return concatenate(list(factors), scale=scale)


@operation("subtract", cite="GenKnowSub, aclanthology.org/2025.acl-short.54", experts=(2, None))
def subtract(factors: Factors, *, scale: Scale = 1.0) -> LowRank:
    """The first expert less the others: [B_1, -B_2, ...] [A_1; A_2; ...]; of a task, its general knowledge."""
    first, *others = factors
    return concatenate([first, *(_times(f, -scale) for f in others)])


@operation("scale", cite="Ilharco et al. 2023, arXiv:2212.04089", experts=(1, 1))
def scale(
    factors: Factors,
    *,
    factor: Annotated[float, Field(allow_inf_nan=False, description="what the delta is multiplied by")] = 0.5,
) -> LowRank:
    """The expert, weaker or stronger."""
    return concatenate(list(factors), scale=factor)


@operation("negate", cite="Ilharco et al. 2023, arXiv:2212.04089, section 3", experts=(1, 1))
def negate(factors: Factors) -> LowRank:
    """The expert's opposite, to forget what it learned."""
    return concatenate(list(factors), scale=-1.0)


@operation("ext-sub", cite="Hu et al. 2023, arXiv:2308.08090", experts=(2, 2))
def ext_sub(factors: Factors, *, scale: Scale = 1.0) -> LowRank:
    """The first expert less what of the second is not common to both, row by row: d_1 - scale (d_2 - <d_2, c> c).

    c is the unit vector along the sum of both rows' unit vectors, so that <d_2, c> c is half of |d_2| times that sum,
    and the row is (1 + scale |d_2| / 2 |d_1|) d_1 - scale / 2 d_2: of the factors, only rows of B change, and no dense
    matrix is needed where the published code makes one. A row of zeros has the unit vector 0: one that the second
    expert leaves alone stays as it is, one that the first leaves alone stays zero.
    """
    first, second = factors
    if first is None or second is None:
        return concatenate(list(factors), scale=float(first is not None))
    ours, theirs = _row_lengths(first), _row_lengths(second)
    stretch = 1 + scale / 2 * theirs / torch.where(ours > 0, ours, 1.0)
    other = torch.where(ours > 0, -scale / 2 * second.up, 0.0)
    return LowRank(torch.cat([stretch * first.up, other], 1), torch.cat([first.down, second.down]))


@operation(
    "subtract-factors",
    cite="the published code of GenKnowSub (github.com/saharsamr/Modular-LLM) and PEFT's use_gks",
    experts=(2, 2),
    instead_of="subtract",
)
def subtract_factors(factors: Factors, scales: Sequence[float]) -> LowRank:
    """NOT the difference: s_1 (B_1 - B_2)(A_1 - A_2), which adds the second delta, and subtracts cross terms."""
    first, second = factors
    if first is None or second is None or first.up.shape != second.up.shape:
        raise CoterieError("needs two experts of the same layers and ranks", "subtract-factors", "use subtract")
    return LowRank(first.up - scales[0] / scales[1] * second.up, first.down - second.down)


def _times(factors: LowRank | None, number: float) -> LowRank | None:
    return None if factors is None else LowRank(number * factors.up, factors.down)


def _row_lengths(factors: LowRank) -> torch.Tensor:
    """(out, 1) lengths of the rows of `up @ down`, those that are zero but for rounding as zeros."""
    r = torch.linalg.qr(factors.down.T, mode="r")[1]
    lengths = torch.linalg.vector_norm(factors.up @ r.T, dim=1, keepdim=True)
    at_most = torch.linalg.vector_norm(factors.up, dim=1, keepdim=True) * torch.linalg.vector_norm(r)
    return torch.where(lengths > 1e-12 * at_most, lengths, 0.0)
