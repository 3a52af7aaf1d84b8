"""One tensor of all sources -> the merged tensor, and what is to be said of it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..errors import CoterieError
from .registry import MergeMethod
from .report import Line
from .stack import BLOCK, Part, Stack

# Leading right singular directions whose overlap a full report measures.
DIRECTIONS = 16
# A sum of squares up to which no element is near the end of float32 or bfloat16.
HUGE = 1e72


@dataclass(frozen=True)
class Treatment:
    """What is done with a tensor.

    Attributes:
        method: the merge; None where the tensor is copied from the base (or the first expert, where there is no base).
        why: why it is copied.
        exact: whether all sources must then hold the same.
        parameters: the merge's.
        weights: the experts'.
        seed: of the recipe.
        matrix: whether it is the weight of a linear layer that the recipe's globs choose.
        transposed: whether that weight is kept as (in, out), as GPT-2's Conv1D does.
        statistics: per expert, what the user brought, and its shape.
        device: where a merge of whole tensors works.
        norm_budget: of the recipe.
        full: whether to measure the overlap of the experts' subspaces.
    """

    method: MergeMethod | None
    why: str = ""
    exact: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    seed: int = 0
    matrix: bool = False
    transposed: bool = False
    statistics: list[tuple[Part, tuple[int, ...]]] | None = None
    device: str = "cpu"
    norm_budget: float | None = None
    full: bool = False

    @property
    def by_elements(self) -> bool:
        """Whether the merge may be called on blocks of the tensor."""
        return self.method is not None and self.method.acts_on == "elements"

    @property
    def turned(self) -> bool:
        """Whether the merge is given the transposed tensor, so that it sees (out, in)."""
        return self.transposed and self.method is not None and self.method.acts_on == "matrix"


@dataclass
class Merged:
    """A tensor as it is written, with its line of the report, or why it was kept."""

    tensor: Tensor
    line: Line | None = None
    kept: str = ""


def merge_tensor(stack: Stack, how: Treatment, surveys: list[Any] | None = None) -> Merged:
    """Merge one tensor.

    Args:
        stack: the tensor of all sources.
        how: what is done with it.
        surveys: the sums of the passes of a survey of the whole model, in order.

    Raises:
        CoterieError: values that are not finite, integers that differ, or a merge that breaks down.
    """
    if how.method is None:
        return Merged(_copy(stack, how), kept=how.why)
    stack.forget_unchanged()
    if how.method.survey_scope == "tensor":
        surveys = []
        for index in range(len(how.method.survey)):
            surveys.append(survey_tensor(stack, how, index, surveys))
    factor = 1.0
    if how.norm_budget is not None:
        reach = _run(stack, how, surveys, 1.0).reach
        factor = 1.0 if reach is None or reach <= how.norm_budget else how.norm_budget / reach
    out = torch.empty(stack.numel, dtype=stack.dtype)
    line = _run(stack, how, surveys, factor, out)
    if (stack.dtype == torch.float16 or max(line.squares) > HUGE) and not torch.isfinite(out).all():
        half = stack.dtype == torch.float16
        mend = "write bfloat16 or float32" if half else "check its parameters and the experts' weights"
        what = f"tensor {stack.name!r} overflows {str(stack.dtype).removeprefix('torch.')}"
        raise CoterieError(what, "dtype" if half else f"method {how.method.name}", mend)
    if stack.name.endswith("running_var") and bool((out < 0).any()):
        raise CoterieError(
            f"the merge of {stack.name!r} holds negative variances",
            f"method {how.method.name}",
            'write `others: {"*.running_*": average}`, which keeps them positive',
        )
    if how.full and how.matrix:
        line.overlap, line.chance = _overlap(stack, how)
    return Merged(out.view(stack.shape), line)


def survey_tensor(stack: Stack, how: Treatment, index: int, sums: list[Any]) -> Any:
    """Run pass `index` of a method's survey over one tensor.

    Args:
        stack: the tensor of all sources.
        how: what will be done with it.
        index: of the pass.
        sums: of the passes before it.

    Returns:
        What the pass gives back, summed over blocks; None for a tensor without elements.
    """
    if how.method is None:
        return None
    stack.forget_unchanged()
    survey, found = how.method.survey[index], None
    wanted = inspect.signature(survey).parameters
    count = len(stack.experts)
    for block, (_, _, rows) in enumerate(stack.blocks(BLOCK if how.by_elements else None)):
        given = _given(stack, how, _weighted(rows[:count], how), rows[count], block) | {"survey": sums}
        found = add(found, survey(**{n: v() if callable(v) else v for n, v in given.items() if n in wanted}))
    return found


def add(one: Any, other: Any) -> Any:
    """The sum of two results of a survey, tensors or dicts of them, in the memory of the first; None is nothing."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict):
        return {key: add(one.get(key), other.get(key)) for key in {**one, **other}}
    return one.add_(other)


def _run(stack: Stack, how: Treatment, surveys: list[Any] | None, factor: float, out: Tensor | None = None) -> Line:
    """Call the merge block by block, write base + factor * delta into `out`, and sum up what the report tells."""
    method = how.method
    if method is None:
        raise TypeError("a tensor that is copied is not merged")
    count = len(stack.experts)
    line = Line(stack.name, list(stack.shape), method.name, [0.0] * (count + 2), [0.0] * count, 0.0, 0.0, factor)
    survey = surveys if len(method.survey) > 1 else surveys[0] if surveys else None
    for block, (start, stop, rows) in enumerate(stack.blocks(BLOCK if how.by_elements else None)):
        weighted, (base, merged, spare) = _weighted(rows[:count], how), rows[count:]
        given = _given(stack, how, weighted, base, block) | {"survey": survey}
        try:
            made = method.function(**{n: v() if callable(v := given[n]) else v for n in method.asks}, **how.parameters)
        except torch.linalg.LinAlgError:
            if rows[: count + 1].isfinite().all():
                raise
            _refuse(stack, how)
        if how.turned:
            made = made.transpose(-1, -2)
        merged.copy_(made.reshape(-1))
        if factor != 1:
            merged.mul_(factor)
        sums = _measure(weighted, rows, spare)
        if not isfinite(sum(sums)):  # or finite values whose squares float32 does not hold
            sums = _measure(weighted.double(), rows.double(), spare.double())
            if not isfinite(sum(sums)):
                _refuse(stack, how)
        line.take(sums)
        if out is not None:
            torch.add(merged, base, out=spare)
            out[start:stop].copy_(spare)
    return line


def _measure(weighted: Tensor, rows: Tensor, spare: Tensor) -> list[float]:
    """A block's sums, in the order of `Line.take`; a value that is not finite shows in them."""
    count = len(weighted)
    return [
        *(float(torch.dot(row, row)) for row in rows[: count + 2]),
        *(rows[:count] @ rows[count + 1]).tolist(),
        sum(float(torch.abs(row, out=spare).sum()) for row in weighted),
        float(torch.mv(weighted.T, torch.ones(count, dtype=weighted.dtype), out=spare).abs_().sum()),
    ]


def _weighted(deltas: Tensor, how: Treatment) -> Tensor:
    return deltas if all(w == 1 for w in how.weights) else deltas * torch.tensor(how.weights)[:, None]


def _given(stack: Stack, how: Treatment, deltas: Tensor, base: Tensor, block: int) -> dict[str, Any]:
    """What a merge or survey may ask for, of a block (n,) or of a whole tensor in its shape; what costs, callable."""

    def shaped(flat: Tensor) -> Tensor:
        if how.by_elements:
            return flat
        whole = flat.view(*flat.shape[:-1], *stack.shape)
        return (whole.transpose(-1, -2) if how.turned else whole).to(how.device)

    def statistics() -> Tensor:
        found = how.statistics or []
        if not how.by_elements:
            parts = [part.read(0, torch.Size(shape).numel()).view(shape) for part, shape in found]
            return torch.stack(parts).float().to(how.device)
        start = block * BLOCK
        return torch.stack([part.read(start, start + base.numel()) for part, _ in found]).float()

    return {
        **how.parameters,
        "deltas": shaped(deltas),
        "base": shaped(base),
        "weights": torch.tensor(how.weights),
        "statistics": statistics,
        "generator": lambda: seeded(how.seed, stack.key, block),
    }


def seeded(seed: int, key: str, block: int) -> torch.Generator:
    """A generator that depends on the recipe's seed, the tensor's name and the block's number, and on nothing else."""
    found = hashlib.sha256(f"{seed} {block} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(found[:8], "little") >> 1)


def _refuse(stack: Stack, how: Treatment) -> None:
    for part in [stack.base, *stack.experts]:
        bad = 0 if part is None else int((~torch.isfinite(part.read(0, stack.numel))).sum())
        if part is not None and bad:
            raise CoterieError(
                f"tensor {stack.name!r} holds {bad} NaN or infinite values", part.where, "use a sound checkpoint"
            )
    raise CoterieError(
        f"the merge of tensor {stack.name!r} overflows or is not a number",
        f"method {how.method.name}" if how.method else "",
        "check its parameters and the experts' weights",
    )


def _copy(stack: Stack, how: Treatment) -> Tensor:
    own, *others = [part for part in (stack.base, *stack.experts) if part is not None]
    tensor = own.read(0, stack.numel)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        _refuse(replace(stack, base=own, experts=[]), how)
    for part in others if how.exact else []:
        if not torch.equal(part.read(0, stack.numel), tensor):
            raise CoterieError(
                f"integer buffer {stack.name!r} differs from that of {own.where}",
                part.where,
                f"if the base's is right for all, write `others: {{{json.dumps(stack.name)}: base}}`, with a base",
            )
    return tensor.to(stack.dtype).view(stack.shape)


def _overlap(stack: Stack, how: Treatment) -> tuple[float | None, float | None]:
    """Mean overlap of the experts' leading right singular subspaces, |V_a V_b^T|^2 / k, and what chance would give."""
    _, _, rows = next(stack.blocks(None))
    shaped = (row.view(stack.shape) for row in rows[: len(stack.experts)] if bool(row.any()))
    deltas = [delta.T if how.transposed else delta for delta in shaped]
    directions = min(DIRECTIONS, *stack.shape)
    if len(deltas) < 2 or not directions:
        return None, None
    bases = [torch.linalg.eigh((d.T @ d).double())[1][:, -directions:] for d in deltas]
    pairs = [float((a.T @ b).square().sum()) / directions for a, b in combinations(bases, 2)]
    return sum(pairs) / len(pairs), directions / deltas[0].shape[1]
