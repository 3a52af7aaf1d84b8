"""The sources of a merge through the architecture's skeleton: where names differ, adapters take part, or a method must
know what a tensor is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..building.inputs import Inputs, open_inputs
from ..errors import CoterieError
from ..mixture.layer import MIXTURE_OF
from ..mixture.probe import probe
from ..mixture.sites import Sites, choose_sites
from ..sources.adapter import AdapterExpert
from ..sources.experts import ExpertSource, FullExpert
from ..sources.names import Skeleton, View
from .inputs import LABELS, Opened, as_build
from .stack import Part, Stack, held
from .steps import Treatment
from .vocabulary import Vocabulary

# transformers reverts a conversion on the model itself, one at a time.
_REVERTING = threading.Lock()


def look(opened: Opened, token: str | None) -> None:
    """Open the sources through the skeleton, and find the linear layers and the heads.

    Raises:
        CoterieError: tensors that have no place, heads that differ where the recipe names none, or a method for
            matrices where the recipe chooses none.
    """
    inputs = opened.inputs = open_inputs(as_build(opened.recipe), token, "the merge")
    skeleton, base = inputs.skeleton, inputs.stored
    united = opened.vocabulary is not None and opened.recipe.vocabulary == "union"  # says so itself
    opened.warnings += [w for w in inputs.warnings if not (united and w.startswith("tokenizer.json of "))]
    opened.left_out = inputs.left_out
    missing = {name for name in skeleton.tensors if name not in base and name not in skeleton.tied}
    seen = probe(skeleton.model) if opened.method.acts_on == "matrix" else None
    called = None if seen is None else seen.called
    modules = opened.recipe.modules
    sites = opened.sites = choose_sites(
        skeleton.model, missing, modules, "base", called, skeleton.tied, opened.warnings, needed=False
    )
    opened.config["architectures"] = [type(skeleton.model).__name__]
    _heads(opened, inputs, sites)
    for name in [*skeleton.tied, *skeleton.tensors]:
        if name in base:
            opened.memory |= dict.fromkeys(base.names_on_disk(name), name)
    for path in sites.layers:
        opened.matrices[f"{path}.weight"] = hasattr(skeleton.module(path), "nx")
    for name, why in sites.why_dense.items():
        if why == "fused 3-D expert weights" and _chosen(name, modules):
            opened.matrices[name] = False
    others, method = opened.recipe.others, opened.method
    if not opened.matrices and (method.acts_on == "matrix" or (isinstance(others, str) and others != method.name)):
        raise CoterieError(
            f"no linear layer is left that {method.name} could merge",
            "modules",
            "check the include and exclude globs; where a model has no such layers, choose a merge of any tensor, "
            "such as task_arithmetic, without `others`",
        )
    if opened.vocabulary is not None:
        _extend(opened, inputs)
    if opened.through_skeleton:
        opened.checkpoints = {n: c for n, c in inputs.checkpoints.items() if n != "base" or opened.recipe.base}
        done: set[str] = set(skeleton.tied)
        for name in skeleton.tensors:
            if name not in done:
                opened.steps.append(name)
                done.update(base.together(name) if name in base else [name])


def _extend(opened: Opened, inputs: Inputs) -> None:
    """The result's rows, in its configuration and in the account: the experts' rows find their places."""
    for name in inputs.skeleton.tensors:
        if not _is_vocabulary(inputs, name) or name not in inputs.base:
            continue
        own = inputs.skeleton.tensors[name].shape[0]
        for expert in inputs.experts:
            expert.left_out.pop(name, None)
        for config in (opened.config, *(part for part in opened.config.values() if isinstance(part, dict))):
            if opened.vocabulary is not None and config.get("vocab_size") == own:
                config["vocab_size"] = opened.vocabulary.rows(own)
    added = opened.vocabulary.added if opened.vocabulary else {}
    if added:
        opened.warnings.append(f"{len(added)} tokens of the experts are added to the base's; they match literally")


def _is_vocabulary(inputs: Inputs, name: str) -> bool:
    return isinstance(inputs.skeleton, Skeleton) and inputs.skeleton.is_vocabulary(name)


def _chosen(name: str, modules: Any) -> bool:
    path = name.rpartition(".")[0]
    return any(fnmatchcase(path, g) for g in modules.include) and not any(fnmatchcase(path, g) for g in modules.exclude)


def _heads(opened: Opened, inputs: Inputs, sites: Sites) -> None:
    """Refuse heads that differ where the recipe names none, and see that the one it names is whole."""
    recipe, base = opened.recipe, inputs.stored
    full = [expert for expert in inputs.experts if isinstance(expert, FullExpert)]
    chosen = next((e for e in inputs.experts if e.name == recipe.head), None)
    for path in sites.heads:
        names = [name for name in inputs.skeleton.tensors if name.startswith(f"{path}.")]
        if chosen is not None:
            lacking = next((n for n in names if _value(chosen, n, base) is None), None)
            if lacking is not None:
                raise CoterieError(
                    f"it has no {lacking!r}, nor has the base", f"head: {chosen.name}", "name another expert"
                )
            continue
        why = _why_apart(path, names, inputs, full)
        if why is not None:
            raise CoterieError(why, "experts", f"say whose head the merge takes, as `head: {recipe.names[0]}`")
    if chosen is not None and not sites.heads:
        opened.warnings.append(f"head: this model has no task head to take from {chosen.name!r}; all is merged")
    source = chosen if chosen is not None else full[0] if full else None
    if sites.heads:
        labels = source.labels if source is not None and source.labels else inputs.labels
        opened.config |= {key: value for key, value in labels.items() if value is not None}


def _why_apart(path: str, names: list[str], inputs: Inputs, full: list[FullExpert]) -> str | None:
    """Why the experts' heads cannot be merged; None where they can."""
    for name in names:
        shapes = {_shape(expert, name, inputs.stored) for expert in inputs.experts}
        if len(shapes) > 1:
            listed = " and ".join(sorted(str(list(shape or ())) for shape in shapes))
            return f"their heads differ: {name!r} has shapes {listed}"
        if name not in inputs.base and inputs.recipe.base and any(expert.has(name) for expert in inputs.experts):
            return f"the base lacks their head {path!r}"
    if len({str([expert.labels.get(key) for key in LABELS]) for expert in full}) > 1:
        return f"their heads {path!r} have labels of their own"
    return None


def _shape(expert: ExpertSource, name: str, base: View) -> tuple[int, ...] | None:
    value = _value(expert, name, base)
    return None if value is None else tuple(value.shape)


def _value(expert: ExpertSource, name: str, base: View) -> Tensor | None:
    """An expert's tensor of a head; the base's where it says nothing of it."""
    mine = base.get(name) if name in base else None
    value = expert.value(name, mine, any_shape=True)
    return mine if value is None else value


def converted(
    opened: Opened, step: str, account: dict[str, dict[str, str]] | None
) -> Iterator[tuple[Stack, Treatment]]:
    """The tensors that one step writes: one of the skeleton, or those that one conversion makes together.

    Adapters come as their deltas, dense for as long as the step lasts.
    """
    if opened.inputs is None:
        raise TypeError("these sources were not opened through the skeleton")
    inputs = opened.inputs.reader()
    base, skeleton, recipe = inputs.stored, inputs.skeleton, opened.recipe
    members = base.together(step) if step in base else [step]
    head = opened.head_of(step)
    if head is not None:
        taken = {name: _value(inputs.experts[head], name, base) for name in members}
        own = {name: value for name, value in taken.items() if value is not None}
        sources: list[dict[str, Tensor] | None] = []
    else:
        own = {name: base.get(name) for name in members}
        for tied, owner in skeleton.tied.items():
            if owner in own:
                _require_tied(inputs, tied, owner)
        if opened.vocabulary is not None and _is_vocabulary(inputs, step):
            own, sources = _aligned(opened.vocabulary, step, own[step], inputs, recipe.base is not None)
        else:
            sources = [_of_expert(expert, own, inputs) for expert in inputs.experts]
        if recipe.base is None and None in sources:
            lacking = inputs.experts[sources.index(None)]
            other = step in lacking.left_out
            raise CoterieError(
                f"tensor {step!r} has another vocabulary's rows, and no tokenizer says which token is which"
                if other
                else f"it lacks tensor {step!r}",
                f"expert {lacking.name!r} ({lacking.location})",
                "give every expert its tokenizer.json, or a base, whose rows are kept" if other else "give a base",
            )
    with _REVERTING:
        reverted = skeleton.on_disk(own)
        parts = [None if values is None else skeleton.on_disk(values) for values in sources]
    names = recipe.names
    for name, tensor in reverted.items():
        experts: list[Part | None] = []
        for expert, values in zip(inputs.experts, parts, strict=False):
            where = f"expert {expert.name!r} ({expert.location})"
            found = None if values is None else held(values[name], where, is_delta=expert.kind == "adapter")
            experts.append(found)
        shape, dtype = tuple(tensor.shape), opened.dtype(tensor.dtype)
        mine = held(tensor, "base" if head is None else f"expert {names[head]!r}")
        stack = Stack(name, shape, dtype, mine if recipe.base or head is not None else None, experts)
        if head is not None:
            yield stack, Treatment(None, f"the head of {recipe.head!r}")
        else:
            transposed = opened.matrices.get(step) if tensor.ndim == 2 else None
            yield stack, opened.treatment(stack, step, transposed)
    if account is not None:
        for source in opened.checkpoints:
            account.setdefault(source, {}).update(inputs.checkpoints[source].sha256)


def _aligned(
    vocabulary: Vocabulary, name: str, own: Tensor, inputs: Inputs, has_base: bool
) -> tuple[dict[str, Tensor], list[dict[str, Tensor] | None]]:
    """A tensor with a row for each token, its rows where the result has them; adapters' deltas likewise."""
    values: list[Tensor | None] = []
    for expert in inputs.experts:
        raw = expert.value(name, None, any_shape=True) if isinstance(expert, FullExpert) else None
        values.append(raw)
    base, aligned = vocabulary.align(own, values, has_base)
    found = [None if value is None else {name: value} for value in aligned]
    for index, expert in enumerate(inputs.experts):
        if isinstance(expert, AdapterExpert) and expert.has(name):
            delta = torch.zeros(base.shape)
            delta[: len(own)] = _delta(expert, name, own, inputs)
            found[index] = {name: delta}
    return {name: base}, found


def _of_expert(expert: ExpertSource, own: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor] | None:
    """An expert's values of tensors in memory, or deltas where it is an adapter; None where it says nothing of them."""
    if not any(expert.has(name) for name in own):
        return None
    if isinstance(expert, AdapterExpert):
        return {name: _delta(expert, name, base, inputs) for name, base in own.items()}
    values = {name: expert.value(name, base) for name, base in own.items()}
    return {name: own[name] if value is None else value for name, value in values.items()}


def _delta(expert: AdapterExpert, name: str, base: Tensor, inputs: Inputs) -> Tensor:
    """An adapter's delta of a tensor in memory, float32, as exact as its factors."""
    path, _, leaf = name.rpartition(".")
    module = inputs.skeleton.module(path)
    if leaf == "weight" and type(module) in MIXTURE_OF:
        transposed = hasattr(module, "nx")
        delta = expert.delta(path, base, transposed)
        matrix = torch.zeros_like(base, dtype=torch.float32) if delta is None else delta.dense().float()
        return matrix.T if transposed and delta is not None else matrix
    value = expert.value(name, base.float())
    return torch.zeros_like(base, dtype=torch.float32) if value is None else value.float() - base.float()


def _require_tied(inputs: Inputs, tied: str, owner: str) -> None:
    """What the base ties has one place in the result."""
    for expert in inputs.experts:
        if expert.kind == "adapter":
            apart = expert.has(tied)
        else:
            both = expert.has(tied) and expert.has(owner)
            apart = both and not _equal(expert.value(tied, None), expert.value(owner, None))
        if apart:
            raise CoterieError(
                f"it changes {tied!r} and {owner!r} apart, which the base ties",
                f"expert {expert.name!r} ({expert.location})",
                "untie them in the base (tie_word_embeddings: false, with both tensors), or leave this expert out",
            )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
