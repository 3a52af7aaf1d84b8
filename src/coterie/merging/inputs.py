"""What the recipe of a merge names, opened: every tensor of every source, and what is done with it.

Where all sources hold the same tensors under the same names, those are merged as they are on disk, one by one and block
by block, and transformers is not even imported unless the method must know what a tensor is. Otherwise the names are
brought into one through the architecture's skeleton, as in a build.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CoterieError
from ..recipe import Expert, MergeRecipe, Modules, Recipe
from ..sources.checkpoint import Checkpoint, headers, is_counter
from ..sources.locate import PATTERNS, Location, kind_error, locate
from .registry import MergeMethod, Parameters, get, is_by_pattern, value_for
from .stack import Part, Stack, held, stored
from .statistics import require_kind, require_own
from .steps import Treatment

if TYPE_CHECKING:
    from ..building.inputs import Inputs
    from ..mixture.sites import Sites
    from ..sources.names import Skeleton
    from .vocabulary import Vocabulary

KEEP = "base"
"""What `others` calls keeping the base's tensor."""
LABELS = ("id2label", "label2id", "problem_type")


@dataclass
class Opened:
    """The opened sources of a merge.

    Attributes:
        recipe: as validated.
        method, parameters: of the recipe.
        others: the merges that `others` names.
        reference: the base, or the first expert where there is none: its names, dtypes and configuration hold.
        places: where the experts are.
        checkpoints: every source's files: "base", then the experts' names prefixed by "expert ".
        config: config.json of the result.
        steps: what is merged in one go, in order: a tensor's name on disk, or, through the skeleton, in memory.
        numel: elements of the largest tensor.
        inputs, sites: the skeleton's view of the sources, and what its tensors are; None where nobody asked.
        statistics: of each expert.
        vocabulary: how the experts' rows meet; None where all have the same.
        left_out, warnings: as in a build.
        full: whether the report measures what costs.
        device: where merges of whole tensors work.
    """

    recipe: MergeRecipe
    method: MergeMethod
    parameters: Parameters
    others: dict[str, MergeMethod]
    reference: Location
    places: dict[str, Location]
    checkpoints: dict[str, Checkpoint]
    config: dict[str, Any]
    steps: list[str] = field(default_factory=list)
    inputs: Inputs | None = None
    sites: Sites | None = None
    through_skeleton: bool = False
    statistics: list[Checkpoint] | None = None
    vocabulary: Vocabulary | None = None
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    full: bool = False
    device: str = "cpu"
    memory: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, bool] = field(default_factory=dict)

    @property
    def own(self) -> Checkpoint:
        """The reference's files."""
        return next(iter(self.checkpoints.values()))

    @property
    def architecture(self) -> str:
        """The transformers class of the result."""
        return str((self.config.get("architectures") or ["?"])[0])

    @property
    def folders(self) -> list[Path]:
        """The directories that the merge reads, or whose model its result is nothing without."""
        read = [*self.checkpoints.values(), *(self.statistics or [])]
        return [self.reference.path, *(checkpoint.location.path for checkpoint in read)]

    def files(self) -> dict[str, dict[str, list[int]]]:
        """Source -> name of a file that the merge may read -> its size and time of change."""
        found = {
            source: sorted(file for pattern in PATTERNS for file in checkpoint.location.path.glob(pattern))
            for source, checkpoint in self.checkpoints.items()
        }
        found |= {f"statistics {i}": [c.location.path] for i, c in enumerate(self.statistics or [])}
        return {
            source: {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
            for source, files in found.items()
        }

    def names(self) -> Iterator[str]:
        """The names that a merge writes, at most: for the room that headers get."""
        for checkpoint in self.checkpoints.values():
            yield from checkpoint.tensors

    def stacks(self, step: str, account: dict[str, dict[str, str]] | None = None) -> Iterator[tuple[Stack, Treatment]]:
        """The tensors of a step as they are written, and what is done with each.

        Args:
            step: one of `steps`.
            account: gets source -> tensor on disk -> sha256 of what is read.
        """
        if self.through_skeleton:
            yield from self._converted(step, account)
            return
        parts = []
        for source, checkpoint in self.checkpoints.items():
            read = None if account is None else account.setdefault(source, {})
            parts.append(stored(checkpoint, step, self._where(source), read))
        base = parts.pop(0) if self.recipe.base is not None else None
        info = self.own.tensors[step]
        memory = self.memory.get(step, step)
        stack = Stack(step, info.shape, self.dtype(info.dtype), base, list(parts))
        if self.inputs is not None and memory in self.inputs.skeleton.tied:
            owner = self.inputs.skeleton.tied[memory]
            stack.key = next((disk for disk, name in self.memory.items() if name == owner), step)
        head = self.head_of(memory)
        if head is not None:
            stack.base, stack.experts = stack.experts[head], []
            yield stack, Treatment(None, f"the head of {self.recipe.head!r}")
            return
        yield stack, self.treatment(stack, memory, self.matrices.get(memory) if len(info.shape) == 2 else None)

    def _where(self, source: str) -> str:
        return source if source == "base" else f"expert {source.removeprefix('expert ')!r}"

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        wanted = self.recipe.dtype
        return getattr(torch, wanted) if wanted and dtype.is_floating_point else dtype

    @property
    def floating(self) -> torch.dtype:
        """The dtype of the first floating tensor, as it is written."""
        found = (info.dtype for info in self.own.tensors.values() if info.dtype.is_floating_point)
        return self.dtype(next(found, torch.float32))

    @property
    def skeleton(self) -> Skeleton:
        """The architecture."""
        from ..sources.names import Skeleton

        if self.inputs is None or not isinstance(self.inputs.skeleton, Skeleton):
            raise TypeError("these sources were not opened through the skeleton")
        return self.inputs.skeleton

    def bytes_written(self) -> int:
        """About how many bytes of tensors the merge writes, from headers."""
        if self.method.acts_on == "factors":
            from .adapters import written

            return written(self)
        if not self.through_skeleton:
            return sum(info.numel * self.dtype(info.dtype).itemsize for info in self.own.tensors.values())
        tensors = (t for name, t in self.skeleton.tensors.items() if name not in self.skeleton.tied)
        return sum(t.numel() * (self.floating.itemsize if t.is_floating_point() else t.itemsize) for t in tensors)

    def head_of(self, memory: str) -> int | None:
        """The expert whose head a tensor is taken from; None where it is merged."""
        if self.recipe.head is None or self.sites is None:
            return None
        inside = any(memory.startswith(f"{path}.") for path in self.sites.heads)
        return self.recipe.names.index(self.recipe.head) if inside else None

    def treatment(self, stack: Stack, memory: str, transposed: bool | None) -> Treatment:
        """What is done with a tensor; `transposed` is None for what is no linear layer's weight."""
        policy = self.policy(stack.key, transposed is not None)
        if policy == KEEP:
            return Treatment(None, "the base's, as `others` has it")
        if is_counter(stack.name):
            return Treatment(None, "count of training steps, the base's")
        if not stack.dtype.is_floating_point:
            return Treatment(None, "integer buffer", exact=True)
        method = self.others.get(policy, self.method)
        own = method is self.method
        parameters = self.parameters.of(stack.key) if own else method.defaults
        return Treatment(
            method,
            parameters=parameters,
            weights=tuple(float(value_for(e.weight, stack.key, 1.0)) for e in self.recipe.experts.values()),
            seed=self.recipe.seed,
            matrix=transposed is not None,
            transposed=bool(transposed),
            statistics=self._statistics(stack.name, memory) if own and self.statistics else None,
            device=self.device,
            norm_budget=self.recipe.norm_budget,
            full=self.full,
        )

    def becomes(self, step: str) -> str:
        """In words, what becomes of a step's tensor, as far as names and headers tell it."""
        memory = step if self.through_skeleton else self.memory.get(step, step)
        if self.head_of(memory) is not None:
            return f"the head of {self.recipe.head!r}"
        info = self.own.tensors.get(step)
        policy = self.policy(step, memory in self.matrices)
        if policy == KEEP or is_counter(step):
            return "kept: the base's"
        if info is not None and not info.dtype.is_floating_point:
            return "kept: integer buffer"
        return f"merged by {policy}"

    def policy(self, name: str, is_matrix: bool) -> str:
        """The merge that a tensor follows, by name, or `base`."""
        others = self.recipe.others
        if isinstance(others, dict):
            found = next((policy for glob, policy in others.items() if fnmatchcase(name, glob)), None)
            if found is not None:
                return found
        if is_matrix or (self.method.acts_on != "matrix" and not isinstance(others, str)):
            return self.method.name
        return others if isinstance(others, str) else "average"

    def _statistics(self, name: str, memory: str) -> list[tuple[Part, tuple[int, ...]]]:
        found = []
        for expert, checkpoint in zip(self.recipe.names, self.statistics or [], strict=True):
            known = next((n for n in (name, memory, memory.removesuffix(".weight")) if n in checkpoint.tensors), None)
            where = f"statistics of expert {expert!r} ({checkpoint.location.path})"
            if known is None:
                raise CoterieError(f"tensor {name!r} is not in them", where, "run `coterie statistics` on this expert")
            found.append((stored(checkpoint, known, where), checkpoint.tensors[known].shape))
        return found

    def _converted(self, step: str, account: dict[str, dict[str, str]] | None) -> Iterator[tuple[Stack, Treatment]]:
        from .conversion import converted

        yield from converted(self, step, account)


def open_merge(recipe: MergeRecipe, token: str | None = None, device: str = "cpu", full: bool = False) -> Opened:
    """Check the recipe, locate every source, read every header, and decide what is done with every tensor.

    Raises:
        CoterieError: a bad recipe; a source that is missing, damaged, quantised, or of another architecture.
    """
    method = get(recipe.method)
    parameters, others = method.parameters(recipe.parameters), _others(recipe, method)
    if method.needs_base and recipe.base is None:
        raise CoterieError(
            f"method {method.name} needs a base, and the recipe names none", "recipe", "add `base: DIR_OR_HUB_ID`"
        )
    if recipe.norm_budget is not None and recipe.base is None:
        raise CoterieError("norm_budget is on the way from a base, and the recipe names none", "recipe", "add `base`")
    if recipe.modules != Modules() and method.acts_on != "matrix" and not isinstance(recipe.others, str):
        raise CoterieError(f"modules says nothing to method {method.name}", "recipe", "leave it out")
    statistics = _open_statistics(recipe, method)
    places = {name: locate(expert.source, token) for name, expert in recipe.experts.items()}
    for name, checkpoint in zip(recipe.names, statistics or (), strict=False):
        if not places[name].is_adapter:  # whose statistics are those of the model that it was merged into
            require_own(checkpoint.location.path, Checkpoint.open(places[name]))
    reference = next(iter(places.values())) if recipe.base is None else locate(recipe.base, token)
    adapter = next((name for name, place in places.items() if place.is_adapter), None)
    if recipe.base is None and adapter is not None:
        raise CoterieError("is an adapter, which is nothing without its base", f"expert {adapter!r}", "add `base`")
    if reference.is_adapter:
        raise CoterieError("is an adapter", f"base {recipe.base}", "give the model that it was trained on as the base")
    config = _raw_config(reference)
    _same_kind(recipe, config, places)
    opened = Opened(recipe, method, parameters, others, reference, places, {}, config, statistics=statistics)
    opened.device, opened.full = device, full
    if method.acts_on == "factors":
        from .adapters import look as look_at_adapters

        look_at_adapters(opened, token)
        return opened
    plain = not any(place.is_adapter for place in places.values())
    if plain:
        own = {} if recipe.base is None else {"base": Checkpoint.open(reference)}
        opened.checkpoints = own | {f"expert {name}": Checkpoint.open(place) for name, place in places.items()}
    from .vocabulary import compare

    opened.vocabulary = compare(recipe, reference, places)
    alike = plain and _alike(opened)
    if alike and opened.vocabulary is not None and opened.vocabulary.same:
        opened.vocabulary = None
    opened.through_skeleton = not alike or opened.vocabulary is not None
    if opened.through_skeleton or _must_know(opened):
        from .conversion import look

        look(opened, token)
    else:
        opened.warnings += _notes(opened)
        _take_labels(opened, next(iter(places.values())))
    if not opened.through_skeleton:
        opened.steps = list(opened.own.tensors)
    return opened


def _others(recipe: MergeRecipe, method: MergeMethod) -> dict[str, MergeMethod]:
    """The merges that other tensors than the method's follow."""
    policies = recipe.others.values() if isinstance(recipe.others, dict) else [recipe.others or "average"]
    found = {policy: get(policy, "others") for policy in policies if policy not in (KEEP, method.name)}
    if method.acts_on == "matrix":
        found.setdefault("average", get("average"))
    for name, other in found.items():
        if other.acts_on not in ("elements", "tensor") or other.survey or other.needs:
            raise CoterieError(
                f"{name!r} cannot be what other tensors follow", "others", "use average, task_arithmetic or base"
            )
        if other.needs_base and recipe.base is None:
            raise CoterieError(f"{name!r} needs a base, and the recipe names none", "others", "add `base: DIR`")
    if recipe.base is None and KEEP in policies:
        raise CoterieError("others is 'base', and the recipe names no base", "recipe", "add `base: DIR_OR_HUB_ID`")
    return found


def _open_statistics(recipe: MergeRecipe, method: MergeMethod) -> list[Checkpoint] | None:
    named = {name: expert.statistics for name, expert in recipe.experts.items() if expert.statistics is not None}
    if method.needs is None:
        if named:
            name = next(iter(named))
            raise CoterieError(f"method {method.name} takes no statistics", f"expert {name!r}", "leave them out")
        return None
    found = []
    for name in recipe.names:
        if name not in named:
            raise CoterieError(
                f"method {method.name} needs statistics, and this expert names none",
                f"expert {name!r}",
                "make them with `coterie statistics` and write {source: DIR, statistics: FILE.safetensors}",
            )
        file = Path(named[name])
        if not file.is_file():
            raise CoterieError("no such file", f"statistics of expert {name!r} ({file})", "check the path")
        require_kind(file, method.needs)
        found.append(Checkpoint(Location(file, str(file)), dict(headers(file))))
    return found


def _raw_config(place: Location) -> dict[str, Any]:
    raw = place.json("config.json")
    if raw is None:
        raise CoterieError("has no config.json", str(place.path), "give the directory of a transformers model")
    quantised = raw.get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        if kind == "coterie":
            raise CoterieError("is a mixture", str(place.path), "merge the experts that it was built from")
        raise CoterieError(
            f"is quantised ({kind})",
            str(place.path),
            "use the unquantised checkpoint, or make one: load it with transformers, call model.dequantize(), save it",
        )
    return raw


def _same_kind(recipe: MergeRecipe, config: dict[str, Any], places: dict[str, Location]) -> None:
    kind = config.get("model_type")
    for name, place in places.items():
        if place.is_adapter:
            continue
        theirs = _raw_config(place).get("model_type")
        if theirs != kind and None in (theirs, kind):
            known, lacks = theirs or kind, f"expert {name!r} ({place.path})"
            if kind is None:
                lacks = f"base ({recipe.base})" if recipe.base else "the first expert"
            raise CoterieError(
                f"its config.json names no model_type, where another's is {known!r}", lacks, "fetch it again"
            )
        if theirs != kind:
            first = f"the base ({recipe.base})" if recipe.base else "the first expert"
            raise kind_error(
                name, place, str(theirs), first, str(kind), "only models of one architecture can be merged"
            )


def _labels(config: dict[str, Any]) -> list[Any]:
    return [config.get(key) for key in LABELS]


def _alike(opened: Opened) -> bool:
    """Whether all sources hold the same tensors, for the same class and the same labels."""
    own, recipe = opened.own.tensors, opened.recipe
    classes = {json.dumps(_raw_config(place).get("architectures")) for place in opened.places.values()}
    classes.add(json.dumps(opened.config.get("architectures")))
    labels = {json.dumps(_labels(_raw_config(place))) for place in opened.places.values()}
    if len(classes) > 1 or (len(labels) > 1 and recipe.head is None):
        return False
    if recipe.architecture and json.dumps([recipe.architecture]) not in classes:
        return False
    shapes = {name: (info.shape, info.dtype.is_floating_point) for name, info in own.items()}
    return all(
        shapes == {name: (info.shape, info.dtype.is_floating_point) for name, info in checkpoint.tensors.items()}
        for checkpoint in opened.checkpoints.values()
    )


def _must_know(opened: Opened) -> bool:
    """Whether the method must know more of a tensor than its values: its layer, its head, what it is tied to."""
    recipe, method = opened.recipe, opened.method
    by_name = [*opened.parameters.values.values(), *(e.weight for e in recipe.experts.values())]
    return (
        method.acts_on not in ("elements", "tensor")
        or "generator" in method.asks
        or recipe.others is not None
        or recipe.head is not None
        or opened.full
        or method.needs is not None
        or any(is_by_pattern(value) for value in by_name)
    )


def _notes(opened: Opened) -> list[str]:
    """Where configurations, tokenizers and chat templates differ."""
    from ..building.notes import config_notes, tokenizer_notes

    words = ("the merge", "the base" if opened.recipe.base else "the first expert")
    configs = {name: _raw_config(place) for name, place in opened.places.items()}
    return [
        *config_notes(opened.config, configs, *words),
        *tokenizer_notes(opened.reference, opened.places, *words),
    ]


def _take_labels(opened: Opened, place: Location) -> None:
    """Labels go with the head."""
    theirs = _raw_config(place)
    for key in LABELS:
        opened.config.pop(key, None)
        if key in theirs:
            opened.config[key] = theirs[key]


def as_build(recipe: MergeRecipe) -> Recipe:
    """The recipe as a build's sources are opened by."""
    experts = {name: Expert(source=expert.source) for name, expert in recipe.experts.items()}
    base = recipe.base or next(iter(experts.values())).source
    vocabulary: Any = "error" if recipe.vocabulary == "error" else "base"
    return Recipe(
        method=recipe.method,
        base=base,
        experts=experts,
        modules=recipe.modules,
        architecture=recipe.architecture,
        vocabulary=vocabulary,
    )


__all__ = ["Opened", "held", "open_merge"]
