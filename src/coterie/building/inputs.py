"""What a recipe names, opened: the architecture's skeleton, the base and the experts."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import AutoConfig

from ..errors import CoterieError
from ..mixture.sites import outside_base
from ..recipe import Recipe, nearest
from ..sources.adapter import AdapterExpert
from ..sources.checkpoint import Checkpoint
from ..sources.experts import ExpertSource, FullExpert, shape_error
from ..sources.locate import PATTERNS, Location, kind_error, locate
from ..sources.names import LiveSkeleton, ModuleView, Skeleton, View
from .kept import Kept, KeptExpert
from .notes import config_notes, tokenizer_notes
from .trained_on import base_notes

# AutoModel classes for the task types of PEFT adapters.
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
LABELS = ("id2label", "label2id", "problem_type")
Opened = TypeVar("Opened", bound=View | ModuleView)


@dataclass
class Inputs:
    """The opened sources of a build.

    Attributes:
        recipe: as validated.
        config: the configuration of the mixture to be; None for a plain module.
        labels: the base's own labels.
        skeleton: the architecture.
        base: the base under the names that its tensors bear in memory.
        experts: the experts likewise.
        left_out: source -> tensor on disk -> why the build does not use it.
        warnings: what was seen on the way, a sentence each.
        read_before: source -> tensor on disk -> hash, of experts that an earlier build read.
    """

    recipe: Recipe
    config: Any
    labels: dict[str, Any]
    skeleton: Skeleton | LiveSkeleton
    base: View | ModuleView
    experts: list[ExpertSource]
    left_out: dict[str, dict[str, str]]
    warnings: list[str]
    read_before: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def stored(self) -> View:
        """The base as a checkpoint, in a build from disk."""
        if not isinstance(self.base, View):
            raise TypeError("a live module has no files")
        return self.base

    @property
    def folders(self) -> list[Path]:
        """The directories that the build reads."""
        return [checkpoint.location.path for checkpoint in self.checkpoints.values()]

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """Every source's files: "base", then the experts' names prefixed by "expert "."""
        found = {"base": self.base.checkpoint} if isinstance(self.base, View) else {}
        for expert in self.experts:
            if isinstance(expert, AdapterExpert):
                found[f"expert {expert.name}"] = expert.checkpoint
            elif isinstance(expert, FullExpert) and isinstance(expert.view, View):
                found[f"expert {expert.name}"] = expert.view.checkpoint
            elif isinstance(expert, KeptExpert):
                found[f"expert {expert.name}"] = expert.checkpoint
        return found

    def files(self) -> dict[str, dict[str, list[int]]]:
        """Source -> name of a file that a build may read -> its size and time of change."""
        return {
            source: {
                file.name: [file.stat().st_size, file.stat().st_mtime_ns]
                for pattern in PATTERNS
                for file in sorted(checkpoint.location.path.glob(pattern))
            }
            for source, checkpoint in self.checkpoints.items()
        }

    def reader(self) -> Inputs:
        """The same open sources, with an account of their own of what is read: for one step, in any thread."""
        experts = []
        for expert in self.experts:
            twin = copy.copy(expert)
            if isinstance(twin, FullExpert):
                twin.view = _again(twin.view)
            elif isinstance(twin, (AdapterExpert, KeptExpert)):
                twin.checkpoint = replace(twin.checkpoint, sha256={}, bytes_read=0)
            experts.append(twin)
        return replace(self, base=_again(self.base), experts=experts)


def _again(view: Opened) -> Opened:
    twin = copy.copy(view)
    if isinstance(twin, View):
        twin.checkpoint = replace(twin.checkpoint, sha256={}, bytes_read=0)
    return twin


def open_inputs(
    recipe: Recipe, token: str | None = None, result: str = "the mixture", kept: Kept | None = None
) -> Inputs:
    """Locate every source, read every header, and bring all names into one.

    Args:
        recipe: names the sources.
        token: Hub token.
        result: what warnings call it.
        kept: experts that are not read again.

    Raises:
        CoterieError: a source that is missing, damaged, quantised, or of another architecture than the rest.
    """
    where = locate(recipe.base, token)
    again = {name: expert for name, expert in recipe.experts.items() if kept is None or name not in kept.names}
    places = {name: locate(expert.source, token) for name, expert in again.items()}
    if where.is_adapter:
        raise CoterieError("is an adapter", f"base {recipe.base}", "give the model that it was trained on as the base")
    base_config = _config(where)
    architecture = _architecture(recipe, base_config, where, places)
    config = _config(where, architecture.config_class)
    full = {n: p for n, p in places.items() if not p.is_adapter}
    configs = {name: _config(place, architecture.config_class) for name, place in full.items()}
    labels = {key: getattr(config, key, None) for key in LABELS}
    notes = config_notes(config.to_dict(), {name: each.to_dict() for name, each in configs.items()}, result)
    if configs:  # the head that the mixture shows by default is the first full fine-tune's
        first = next(iter(configs.values()))
        config.id2label, config.label2id = dict(first.id2label), dict(first.label2id)
        config.problem_type = first.problem_type
    config.architectures = [architecture.__name__]
    try:
        skeleton = Skeleton(architecture, config)
    except Exception as error:  # whatever a model's constructor makes of a damaged configuration
        raise CoterieError(
            f"config.json does not make a {architecture.__name__} ({error})", str(where.path), "restore the file"
        ) from None
    base = View(Checkpoint.open(where), skeleton)
    base.untie()
    left_out = {"base": _check_foreign(base, skeleton, f"base {recipe.base}")}
    heads = head_paths(skeleton)
    experts: list[ExpertSource] = []
    for name in recipe.experts:
        weight = recipe.experts[name].weight
        expert: ExpertSource
        if kept is not None and name in kept.names:
            experts.append(kept.expert(name, skeleton, weight))
            left_out[f"expert {name}"] = experts[-1].left_out
            continue
        place = places[name]
        if place.is_adapter:
            expert = AdapterExpert(name, place, skeleton, weight, recipe.vocabulary == "base")
        else:
            expert = _full_expert(name, place, skeleton, base, weight, configs[name], recipe)
            notes += _coverage_notes(expert, skeleton, base, heads)
        experts.append(expert)
        left_out[f"expert {name}"] = expert.left_out
    notes += tokenizer_notes(where, places, result)
    notes += base_notes(where, _again(base), [expert for expert in experts if isinstance(expert, AdapterExpert)])
    for name, tensor in skeleton.tensors.items():
        shape = base.shape(name) if name in base else None
        if shape is not None and shape != tuple(tensor.shape) and name.rpartition(".")[0] not in heads:
            raise CoterieError(
                f"tensor {name!r} has shape {list(shape)} and its config.json asks for {list(tensor.shape)}",
                f"base {recipe.base}",
                "restore the file",
            )
    for source, names in left_out.items():
        if any(why.startswith("not part of") for why in names.values()):
            parts = sorted({name.split(".")[0] for name, why in names.items() if why.startswith("not part of")})
            notes.append(
                f"{source}: tensors under {', '.join(parts)} are not part of {architecture.__name__}, left out"
            )
    read_before = {} if kept is None else kept.read_before
    return Inputs(recipe, config, labels, skeleton, base, experts, left_out, notes, read_before)


def _coverage_notes(expert: ExpertSource, skeleton: Skeleton, base: View, heads: set[str]) -> list[str]:
    """Tensors of the base that a full fine-tune does not hold count as unchanged, which is worth a word."""
    lacking = [
        name
        for name in skeleton.tensors
        if name in base
        and not expert.has(name)
        and name not in expert.left_out
        and name not in skeleton.tied
        and name.rpartition(".")[0] not in heads
    ]
    if not lacking:
        return []
    return [
        f"expert {expert.name!r} lacks {len(lacking)} tensors of the base ({lacking[0]}, ...), which count as unchanged"
    ]


def _config(place: Location, config_class: Any = AutoConfig) -> Any:
    raw = place.json("config.json")
    if raw is None:
        raise CoterieError("has no config.json", str(place.path), "give the directory of a transformers model")
    quantised = raw.get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        what = "is a mixture already" if kind == "coterie" else f"is quantised ({kind})"
        raise CoterieError(what, str(place.path), "use an unquantised dense checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return config_class.from_pretrained(place.path)
    except Exception as error:  # transformers and its validators raise many kinds here
        raise CoterieError(
            f"config.json is not usable ({' '.join(str(error).split())[:300]})", str(place.path), "restore the file"
        ) from None


def _architecture(recipe: Recipe, base_config: Any, base: Location, places: dict[str, Location]) -> Any:
    """The transformers class of the mixture: the recipe's, or the one that the sources share."""
    if recipe.architecture:
        cls = getattr(transformers, recipe.architecture, None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            names = [n for n in dir(transformers) if n.endswith(("Model", "LM")) or "For" in n]
            raise CoterieError(
                f"unknown architecture {recipe.architecture!r}", "recipe", nearest(recipe.architecture, names)
            )
        return cls
    _require_one_kind(recipe, base_config, places)
    claimed: dict[str, str] = {}
    for name, place in places.items():
        if place.is_adapter:
            task = (place.json("adapter_config.json") or {}).get("task_type")
            auto = getattr(transformers, TASKS.get(task or "", ""), None)
            if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and auto is not None:
                mapping = auto._model_mapping
                if type(base_config) in mapping:
                    claimed[name] = mapping[type(base_config)].__name__
        else:
            stated = (place.json("config.json") or {}).get("architectures")
            if isinstance(stated, list) and stated and isinstance(stated[0], str):
                claimed[name] = stated[0]
    classes = sorted(set(claimed.values()))
    if len(classes) > 1:
        raise CoterieError(
            f"the sources are of different classes ({', '.join(f'{n}: {c}' for n, c in claimed.items())})",
            "experts",
            "name the class of the mixture with `architecture`",
        )
    raw = (base.json("config.json") or {}).get("architectures")
    if not classes and isinstance(raw, list) and raw and isinstance(raw[0], str):
        classes = [raw[0]]
    cls = getattr(transformers, classes[0], None) if classes else None
    if cls is None:
        what = f"class {classes[0]!r} is unknown to transformers" if classes else "config.json names no architecture"
        raise CoterieError(what, str(base.path), "name the class of the mixture with `architecture`")
    return cls


def _require_one_kind(recipe: Recipe, base_config: Any, places: dict[str, Location]) -> None:
    """Refuse experts of another architecture than the base; one may be a part of the other."""
    kinds = _kinds(base_config)
    for name, place in places.items():
        stated = None if place.is_adapter else (place.json("config.json") or {}).get("model_type")
        if not stated or stated in kinds:
            continue
        if stated not in transformers.CONFIG_MAPPING or not _kinds(_config(place)) & kinds:
            mend = "give models of one architecture, or name it with `architecture`"
            raise kind_error(name, place, stated, f"the base ({recipe.base})", base_config.model_type, mend)


def _kinds(config: Any) -> set[str]:
    """The type of a model, and those of its parts."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return {config.model_type}.union(*(_kinds(part) for part in parts if part is not None))


def _full_expert(
    name: str, place: Location, skeleton: Skeleton, base: View, weight: float, config: Any, recipe: Recipe
) -> FullExpert:
    view = View(Checkpoint.open(place), skeleton)
    labels = {key: getattr(config, key, None) for key in LABELS}
    expert = FullExpert(name, view, weight, labels)
    where = f"expert {name!r} ({place.path})"
    expert.left_out |= _check_foreign(view, skeleton, where)
    if not any(t in view for t in skeleton.tensors):
        raise CoterieError("shares no tensor with the base model", where, "use experts of this base")
    heads = head_paths(skeleton)
    for tensor in skeleton.tensors:
        if tensor not in view or tensor not in base:
            continue
        ours, theirs = base.shape(tensor), view.shape(tensor)
        if ours is None or theirs is None or ours == theirs:
            continue
        if tensor.rpartition(".")[0] in heads and not skeleton.is_vocabulary(tensor):
            continue
        if (
            len(ours) == len(theirs)
            and ours[1:] == theirs[1:]
            and recipe.vocabulary == "base"
            and skeleton.is_vocabulary(tensor)
        ):
            expert.left_out[tensor] = f"vocabulary of {theirs[0]} rows; the base's {ours[0]} are kept"
        else:
            raise shape_error(tensor, theirs, ours, expert)
    return expert


def head_paths(skeleton: Skeleton) -> set[str]:
    """Modules outside the base model, output embeddings apart: their shapes may differ from expert to expert."""
    output = skeleton.model.get_output_embeddings()
    outside = outside_base(skeleton.model)
    return {
        path
        for path, module in skeleton.model.named_modules()
        if path.split(".")[0] in outside and module is not output
    }


def _check_foreign(view: View, skeleton: Skeleton, where: str) -> dict[str, str]:
    """Account for the tensors that the architecture has no place for; refuse what should have one."""
    left_out = dict.fromkeys(view.doubled, "repeats a tensor that is held under another name too")
    for name in view.foreign:
        memory, _ = skeleton.in_memory(name)
        if skeleton.is_buffer(memory):
            left_out[name] = "a buffer that the model makes by itself"
            continue
        if skeleton.belongs(memory):
            raise CoterieError(
                f"tensor {name!r} has no place in {type(skeleton.model).__name__}",
                where,
                "check that base and experts are of one architecture, or name it with `architecture`",
            )
        left_out[name] = f"not part of {type(skeleton.model).__name__}"
    return left_out
