"""Merges of state dicts, by the same steps as from disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import CoterieError
from .registry import MergeMethod, get
from .stack import Stack, held
from .steps import Treatment, add, merge_tensor, survey_tensor

State = Mapping[str, Tensor]
"""Tensor name -> tensor."""


def merge_states(
    method: str,
    base: State,
    experts: Sequence[State],
    matrices: Collection[str] = (),
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    statistics: Sequence[State] | None = None,
    others: str = "average",
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge state dicts.

    Args:
        method: a registered merge.
        base: tensors of the base.
        experts: tensors of each expert, of the base's shapes; a name that one lacks counts as unchanged.
        matrices: names of the linear layers' weights, (out, in), on which a method for matrices acts.
        weights: of the experts; 1 by default.
        seed: of methods that draw random numbers.
        statistics: of each expert, under the tensors' names.
        others: the merge for what a method for matrices does not act on.
        **parameters: the method's.

    Returns:
        New tensors under the base's names, in the base's dtypes; the base's own where they are not floating.

    Raises:
        CoterieError: an unknown method or parameter, values that are not finite, or tensors that do not fit the base's.
    """
    merge, given = get(method), get(method).parameters(parameters)
    rest = get(others) if merge.acts_on == "matrix" else merge
    known = tuple(1.0 for _ in experts) if weights is None else tuple(float(w) for w in weights)
    _check(merge, base, experts, matrices, known, statistics)

    def stack(name: str) -> tuple[Stack, Treatment]:
        own, is_matrix = base[name], name in matrices
        parts = [held(expert[name], f"expert {i}") if name in expert else None for i, expert in enumerate(experts)]
        chosen = merge if is_matrix or merge.acts_on != "matrix" else rest
        brought = [(held(s[name]), tuple(s[name].shape)) for s in statistics or []] if chosen is merge else []
        how = Treatment(
            chosen,
            parameters=given.of(name) if chosen is merge else chosen.defaults,
            weights=known,
            seed=seed,
            matrix=is_matrix,
            statistics=brought or None,
        )
        return Stack(name, tuple(own.shape), own.dtype, held(own, "base"), parts), how

    floating = [name for name, tensor in base.items() if tensor.is_floating_point()]
    sums: list[Any] = []
    for index in range(len(merge.survey) if merge.survey_scope == "model" else 0):
        found = None
        for name in floating:
            tensors, how = stack(name)
            if how.method is merge:
                found = add(found, survey_tensor(tensors, how, index, sums))
        sums = [*sums, found]
    merged = {name: merge_tensor(*stack(name), sums).tensor for name in floating}
    return {name: merged.get(name, tensor) for name, tensor in base.items()}


def _check(
    merge: MergeMethod,
    base: State,
    experts: Sequence[State],
    matrices: Collection[str],
    weights: Sequence[float],
    statistics: Sequence[State] | None,
) -> None:
    """Raise where the states do not fit each other, before anything is merged."""
    if merge.acts_on == "factors":
        raise CoterieError(f"method {merge.name} merges adapters' factors", "merge_states", "call coterie.merge")
    if not experts:
        raise CoterieError("no experts are given", "merge_states", "give one at least")
    if merge.needs is not None and statistics is None:
        raise CoterieError(f"method {merge.name} needs statistics", "merge_states", "give each expert's")
    for what, given in (("weights", weights), ("statistics", statistics)):
        if given is not None and len(given) != len(experts):
            raise CoterieError(f"{len(given)} {what} for {len(experts)} experts", "merge_states", "give one for each")
    strange = next((name for name in matrices if name not in base or base[name].ndim != 2), None)
    if strange is not None:
        raise CoterieError(f"{strange!r} is no matrix of the base", "matrices", "give names of linear layers' weights")
    for index, expert in enumerate(experts):
        for name, tensor in expert.items():
            if name not in base:
                raise CoterieError(f"the base lacks its tensor {name!r}", f"expert {index}", "leave it out")
            if tensor.shape != base[name].shape:
                what = f"tensor {name!r} has shape {list(tensor.shape)} and the base's has {list(base[name].shape)}"
                raise CoterieError(what, f"expert {index}", "give models of one architecture")
