"""`model.coterie`: what a mixture can be asked, and which expert's head answers."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..errors import CoterieError
from .heads import PerExpert
from .spec import MixtureSpec

# Guards that go into config.json: transformers refuses to build a model that asks for an unknown implementation, so
# without coterie, through a sub-model's class or by `from_config`, a mixture is an error and never the base model.
GUARDS = ("experts_implementation", "attn_implementation")
GUARD = "coterie mixture, which loads after `import coterie`"


class _Selection:
    """What `use_head` returns: the selection stands; leaving a `with` block restores the one before."""

    def __init__(self, handle: Handle, previous: int):
        self._handle, self._previous = handle, previous

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self._handle._select(self._previous)


class Handle:
    """The mixture in a model.

    Attributes:
        spec: its structure.
        report: the account of the build, of a mixture that was built in memory.
    """

    report: Any = None

    def __init__(self, model: nn.Module, spec: MixtureSpec):
        self._model, self.spec = model, spec
        self._selected = 0

    def __repr__(self) -> str:
        return (
            f"<{self.spec.method} mixture of {self.spec.experts} in {len(self.spec.layers)} layers; head: {self.head}>"
        )

    @property
    def expert_names(self) -> list[str]:
        """The experts' names, in the order of every gate tensor."""
        return list(self.spec.experts)

    @property
    def layers(self) -> list[str]:
        """Module paths of the mixture layers."""
        return list(self.spec.layers)

    @property
    def head(self) -> str:
        """The expert whose head answers."""
        return self.spec.experts[self._selected]

    def use_head(self, name: str) -> _Selection:
        """Select an expert's head, and with it `num_labels`, `id2label`, `label2id` and `problem_type`.

        For good as a call, for a block in a `with` statement. Modules that `others: per_expert` keeps follow along.
        The selection is the model's: threads that share a model share it.

        Raises:
            CoterieError: no such expert, or it brought no head.
        """
        if name not in self.spec.experts:
            raise CoterieError(f"no expert {name!r}", "use_head", f"known: {', '.join(self.spec.experts)}")
        index, previous = self.spec.experts.index(name), self._selected
        for path, head in self.spec.heads.items():
            if index not in head.owners:
                raise CoterieError(f"expert {name!r} brought no {path!r}", "use_head", "select an expert that did")
        self._select(index)
        return _Selection(self, previous)

    def _select(self, index: int) -> None:
        self._selected = index
        for module in self._model.modules():
            if isinstance(module, PerExpert):
                module.select(index)
        labels = self.spec.labels[index] if index < len(self.spec.labels) else {}
        config = getattr(self._model, "config", None)
        if not labels or config is None:
            return
        config.id2label = {int(k): v for k, v in labels["id2label"].items()}
        config.label2id = dict(labels["label2id"])
        config.problem_type = labels["problem_type"]
        for module in self._model.modules():
            if "num_labels" in module.__dict__:
                setattr(module, "num_labels", len(config.id2label))  # noqa: B010 (Module declares no such attribute)


def nested_configs(config: Any) -> list[Any]:
    """The configurations inside a configuration (CLIP's of text and vision)."""
    found = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return [each for each in found if each is not None]


def unguard(config: Any) -> None:
    """Take out of a configuration what `guard` put in."""
    for each in (config, *nested_configs(config)):
        for key in GUARDS:
            each.__dict__.pop(key, None)
    config.__dict__.pop("quantization_config", None)


def guard(config: Any, spec: MixtureSpec) -> None:
    """Put into a configuration all that rebuilding the mixture needs, and the guards, also in its nested ones."""
    from .hub import CoterieConfig

    config.quantization_config = CoterieConfig(**spec.to_dict())
    for each in (config, *nested_configs(config)):
        for key in GUARDS:
            setattr(each, key, GUARD)


def attach(model: Any, spec: MixtureSpec) -> Handle:
    """Give a model with mixture layers its handle, and its configuration what saving needs."""
    handle = Handle(model, spec)
    object.__setattr__(model, "coterie", handle)
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        guard(model.config, spec)
        # A live configuration builds no dense model either, where no layer of the model reads this setting.
        if not model._can_set_experts_implementation():
            for each in (model.config, *nested_configs(model.config)):
                each._experts_implementation_internal = GUARD
    if spec.heads:
        handle._select(spec.heads[next(iter(spec.heads))].owners[0])
        if len(spec.experts) > 1:
            warnings.warn(
                f"this mixture keeps {', '.join(spec.heads)} per expert; {handle.head!r} answers until "
                f'model.coterie.use_head("name") selects another of: {", ".join(spec.experts)}',
                stacklevel=3,
            )
    return handle
