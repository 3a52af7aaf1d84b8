"""The registry of merges: one typed function on the stack of the experts' deltas of a tensor, under its name.

    @merge_method("task_arithmetic", cite="Ilharco et al. 2023, arXiv:2212.04089, section 2", acts_on="elements")
    def task_arithmetic(deltas: Tensor, *, scale: Annotated[float, Field(description="...")] = 0.3) -> Tensor:
        \"\"\"base + scale * the sum of the deltas.\"\"\"
        return scale * deltas.sum(0)

The positional arguments are what the engine gives, asked for by name (`GIVEN`); the keyword-only ones are the method's
parameters. What comes back is the merged delta, float32, which the engine adds to the base.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ..errors import CoterieError
from ..recipe import Case, nearest
from ..registration import Registered

ActsOn = Literal["elements", "tensor", "matrix", "factors"]

GIVEN = {
    "deltas": "(E, *shape) float32: the experts' deltas times their weights; zeros where one does not touch the tensor",
    "factors": "E of LowRank | None, the same in factor space (acts_on='factors')",
    "base": "(*shape) float32: the base's tensor; zeros where the recipe names no base",
    "weights": "(E,) float32: the experts' weights, which `deltas` bear already",
    "survey": "what the method's survey summed up; a list of sums where it makes several passes",
    "statistics": "(E, ...) float32: the user's statistics of this tensor",
    "generator": "a torch.Generator seeded from the recipe's seed and the tensor's name (and block)",
}
"""What a merge function may ask for."""


@dataclass(frozen=True)
class MergeMethod(Registered):
    """A registered merge.

    Attributes:
        acts_on: "elements" (any tensor, in blocks), "tensor" (any tensor, whole), "matrix" (weights of linear layers,
            (E, out, in)) or "factors" (LoRA adapters in factor space).
        survey: passes over all deltas before any merge: functions of `deltas` (and parameters, asked for by name; and
            `survey`, the list of the sums so far) to a tensor or dict of tensors, which are summed over blocks.
        survey_scope: whether they are summed over all tensors ("model") or for each ("tensor").
        needs_base: whether the recipe must name a base; without one the deltas are the experts' tensors.
        needs: the kind of statistics that every expert must bring, as `coterie statistics` makes them.
    """

    acts_on: ActsOn
    survey: tuple[Callable[..., Any], ...] = ()
    survey_scope: Literal["model", "tensor"] = "model"
    needs_base: bool = True
    needs: Literal["fisher", "gram"] | None = None

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The user's parameters and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @cached_property
    def asks(self) -> list[str]:
        """What the function asks the engine for."""
        parameters = inspect.signature(self.function).parameters.values()
        return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

    def parameters(self, given: dict[str, Any]) -> Parameters:
        """The parameters by tensor, the given ones checked and the others at their defaults.

        Args:
            given: parameter -> its value, or a list of `{filter: GLOB, value: VALUE}`, of which the first to match a
                tensor's name holds (the default where none does).

        Raises:
            CoterieError: an unknown parameter, or a value out of range.
        """
        for name, value in given.items():
            for each in [case.value for case in cases(value)] if is_by_pattern(value) else [value]:
                self.check({name: each})
        return Parameters({**self.defaults, **given}, self.defaults)


def is_by_pattern(value: Any) -> bool:
    """Whether a value is a list of `{filter, value}`."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, (dict, Case)) for v in value)


def cases(value: Any) -> list[Case]:
    """A list of `{filter, value}` (`filter` may be left out: every tensor), checked.

    Raises:
        CoterieError: an entry of another form.
    """
    found = []
    for entry in value:
        if isinstance(entry, dict):
            if "value" not in entry or not set(entry) <= {"filter", "value"}:
                raise CoterieError(f"{entry!r} is no case of a list", "recipe", "write {filter: GLOB, value: VALUE}")
            entry = Case(filter=str(entry.get("filter") or "*"), value=entry["value"])
        found.append(entry)
    return found


def value_for(value: Any, name: str, default: Any) -> Any:
    """What a value, or list of `{filter, value}`, is for the tensor of that name."""
    if not is_by_pattern(value):
        return value
    return next((case.value for case in cases(value) if fnmatchcase(name, case.filter)), default)


@dataclass(frozen=True)
class Parameters:
    """A method's parameters, some of them by patterns of tensor names."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def of(self, name: str) -> dict[str, Any]:
        """The parameters for the tensor of that name."""
        return {key: value_for(value, name, self.defaults[key]) for key, value in self.values.items()}


_MERGES: dict[str, MergeMethod] = {}


def merge_method(
    name: str,
    cite: str,
    acts_on: ActsOn,
    survey: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    survey_scope: Literal["model", "tensor"] = "model",
    needs_base: bool = True,
    needs: Literal["fisher", "gram"] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated merge function under `name`; arguments as the attributes of `MergeMethod`."""
    passes = () if survey is None else (survey,) if callable(survey) else tuple(survey)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        merge = MergeMethod(name, cite, function, acts_on, passes, survey_scope, needs_base, needs)
        strange = [n for n in merge.asks if n not in GIVEN]
        bare = [n for n, default in merge.defaults.items() if default is inspect.Parameter.empty]
        if strange or bare:
            raise TypeError(f"merge {name!r}: the engine gives no {strange}; parameters without default: {bare}")
        _MERGES[name] = merge
        return function

    return register


@cache
def _load(name: str = r"\w+") -> None:
    """Import the files of this room that register a merge of that name: a merge is found by being there."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if re.search(rf'^@merge_method\(\s*"{name}"', file.read_text(encoding="utf-8"), re.MULTILINE):
            import_module(f"{__package__}.{file.stem}")


def known() -> list[MergeMethod]:
    """Every registered merge, by name."""
    _load()
    return [_MERGES[name] for name in sorted(_MERGES)]


def get(name: str, where: str = "recipe") -> MergeMethod:
    """The merge of that name.

    Args:
        name: of the method.
        where: the place that names it, for the error.

    Raises:
        CoterieError: there is none; names the nearest.
    """
    if name not in _MERGES:
        _load(re.escape(name))
    if name not in _MERGES:
        from ..methods import known as mixtures

        names = [merge.name for merge in known()]
        if name in {mixture.name for mixture in mixtures()}:
            raise CoterieError(f"{name!r} makes a mixture, not a merge", where, "run `coterie build`")
        raise CoterieError(f"unknown method {name!r}", where, nearest(name, names))
    return _MERGES[name]
