"""`model.coterie`: what a mixture can be asked, and which expert's head answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import CoterieError
from ..routing.router import SELECTIONS
from . import native
from .context import Context
from .forward import Forward
from .heads import PerExpert
from .kinds import decoder_path
from .layer import is_mixture
from .paths import PATHS, Path
from .siblings import Siblings
from .spec import MixtureSpec

# Guards that go into config.json: transformers refuses to build a model that asks for an unknown implementation, so
# without coterie, through a sub-model's class or by `from_config`, a mixture is an error and never the base model.
GUARDS = ("experts_implementation", "attn_implementation")
GUARD = "coterie mixture, which loads after `import coterie`"


class _Standing:
    """What a choice returns: it stands; leaving a `with` block restores the one before."""

    def __init__(self, restore: Callable[[], None]):
        self._restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self._restore()


def _finite(weight: Any) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise CoterieError(f"the weight {weight!r} is no finite number", "route", "give finite weights")
    return float(weight)


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
        self._context = Context()
        layers: dict[str, Any] = {
            name: layer for name, layer in model.named_modules(remove_duplicate=False) if is_mixture(layer)
        }
        self._layers = list(layers.values())
        decoder = decoder_path(model)
        for name, layer in layers.items():
            layer.context = self._context
            layer.decodes = decoder is not None and name.startswith(f"{decoder}.")
        for index, layer in enumerate(dict.fromkeys(self._layers)):
            layer.index = index
        self._forward: Forward | None = None
        before: Handle | None = getattr(model, "coterie", None)
        if before is not None and before._forward is not None:
            before._forward.remove()
        if spec.routing.by_call:
            self._forward = model.forward = Forward(model, self._context, spec.routing)
        for group in spec.siblings:
            members = [layers[path] for path in group if path in layers]
            if Siblings.fit(members):
                siblings = Siblings(members)
                for layer in members:
                    layer.siblings = siblings

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
    def recorders(self) -> list[Callable[[Any, torch.Tensor], None]]:
        """Are called with (layer, gates (..., candidates)) by each mixture layer of a call."""
        return self._context.recorders

    def losses(self, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The routers' losses of the last training call, for a loss of one's own; a call with labels has added them.

        Args:
            labels: of that call, class numbers (batch,) or (batch, tokens), -100 where none counts; only for routers
                that learn from a reward.

        Returns:
            A scalar, zero where there are none.
        """
        untaken, self._context.untaken = self._context.untaken, None
        if untaken is None or self._forward is None:
            return next(self._model.parameters()).new_zeros(())
        return self._forward.losses(untaken[0], self._forward.example_losses(*untaken, labels))

    @property
    def head(self) -> str:
        """The expert whose head answers."""
        return self.spec.experts[self._selected]

    def use_head(self, name: str) -> _Standing:
        """Select an expert's head, and with it `num_labels`, `id2label`, `label2id` and `problem_type`.

        For good as a call, for a block in a `with` statement. Modules that `others: per_expert` keeps follow along.
        The selection is the model's: threads that share a model share it.

        Raises:
            CoterieError: no such expert, or it brought no head.
        """
        index, previous = self._index(name, "use_head"), self._selected
        for path, head in self.spec.heads.items():
            if index not in head.owners:
                raise CoterieError(f"expert {name!r} brought no {path!r}", "use_head", "select an expert that did")
        self._select(index)
        return _Standing(lambda: self._select(previous))

    @property
    def routed(self) -> bool:
        """Whether `route` or `retrieve` says which experts answer."""
        return self._context.weights is not None or self._context.gates is not None

    def route(self, to: str | Sequence[str] | dict[str, float] | torch.Tensor | None) -> _Standing:
        """Say which experts answer, in place of the layers' routers; heads stay as `use_head` has them.

        For good as a call, for a block in a `with` statement. The choice is the model's: threads that share a model
        share it. A layer that an expert did not touch stays as in the base for it. With gradient checkpointing, stay in
        the block until `backward()` is done.

        Args:
            to: an expert's name, for every token of every call: where no gradients are wanted (`torch.no_grad()`),
                layers are merged once, kept beside the base's weights, and run at dense speed; or name -> weight, which
                mixes the experts' deltas for every token; or one name per row of the batch; or gates (batch, tokens or
                1, experts), in the order of `expert_names`; or None: the layers decide. Names per row and gates need
                layers that see the examples first, gates per token such that see just these tokens.

        Raises:
            CoterieError: no such expert, or gates of another shape.
        """
        names, before = self.spec.experts, (self._context.weights, self._context.gates)
        weights: tuple[float, ...] | None = None
        gates: torch.Tensor | None = None
        if isinstance(to, str):
            to = {to: 1.0}
        if isinstance(to, dict):
            chosen = {self._index(name, "route"): _finite(weight) for name, weight in to.items()}
            if not chosen:
                raise CoterieError("no names given", "route", "give name -> weight, or None")
            weights = tuple(chosen.get(i, 0.0) for i in range(len(names)))
        elif isinstance(to, torch.Tensor):
            if to.ndim != 3 or to.shape[-1] != len(names):
                raise CoterieError(
                    f"gates have shape {tuple(to.shape)}", "route", f"give (batch, tokens or 1, {len(names)} experts)"
                )
            gates = to.detach().float()
            if not gates.isfinite().all():
                raise CoterieError("gates are not finite", "route", "give finite gates")
        elif to is not None:
            if not to:
                raise CoterieError("no names given", "route", "give one per row of the batch, or None")
            index = torch.tensor([self._index(name, "route") for name in to])
            gates = nn.functional.one_hot(index, len(names)).float()[:, None]
        self._decide(weights, gates)
        return _Standing(lambda: self._decide(*before))

    def retrieve(self, texts: Sequence[str], encoder: Callable[[Sequence[str]], Any] | None = None) -> _Standing:
        """Let the experts answer whose embeddings are nearest to these texts, of a mixture that is built for that.

        For good as a call, for a block in a `with` statement, as `route`.

        Args:
            texts: one for each row that the model sees (with beams: per beam).
            encoder: texts -> (n, d) vectors, the one that the experts were embedded by; None for MiniLM.

        Raises:
            CoterieError: the mixture routes otherwise, or the experts were embedded by another encoder.
        """
        routing = self.spec.routing
        if routing.score != "retrieval":
            raise CoterieError(
                f"{self.spec.method} does not route by retrieval",
                "retrieve",
                "build the mixture by retriever, nearest_example or task_embedding",
            )
        from ..library.encoder import account, embeddings, minilm

        known: Any = self._model.coterie_router
        encoder = minilm() if encoder is None else encoder
        name = account(encoder, [])["encoder"]
        if name != known.encoder:
            raise CoterieError(
                f"the experts were embedded by {known.encoder!r}, and the texts would be by {name!r}",
                "retrieve",
                "give the same encoder",
            )
        if isinstance(texts, str) or not texts:
            what = "one text is given, and no list" if texts else "no texts are given"
            raise CoterieError(what, "retrieve", "give one for each row of the batch")
        vectors = embeddings(encoder, "examples", list(texts)).to(known.weight.device)
        select = SELECTIONS[routing.select](routing.k, **routing.select_options)
        return self.route(select(known(vectors)).gates()[:, None])

    def use_path(self, path: Path | Literal["auto"]) -> _Standing:
        """Force a compute path; "auto" chooses by shape. All give the same numbers.

        For good as a call, for a block in a `with` statement.

        Args:
            path: stacked (all experts at once), grouped (each expert on its own tokens), merged (one dense weight,
                where one decision holds for the whole call: after `route` to one expert or one mix; or, at inference,
                for one example of routers that decide by example: what a prompt decides is kept beside its KV cache,
                other calls merge anew), native (compiled, for layers that decide for themselves, at inference; others
                as with auto), or auto. For routers that decide by example, stacked and grouped mean auto.

        Raises:
            CoterieError: there is no such path, or native cannot be compiled here.
        """
        if path not in ("auto", *PATHS):
            raise CoterieError(f"no compute path {path!r}", "use_path", f"known: auto, {', '.join(PATHS)}")
        if path == "native":
            native.kernel()
        context, before = self._context, self._context.path
        context.path = path
        return _Standing(lambda: setattr(context, "path", before))

    def drop(self) -> None:
        """Forget what layers derived from their parameters (merged weights, packed rows).

        Needed only after a change that torch does not count, such as one through `.data`.
        """
        for layer in self._layers:
            layer.drop()

    def _decide(self, weights: tuple[float, ...] | None, gates: torch.Tensor | None) -> None:
        self._context.weights, self._context.gates = weights, gates
        if gates is not None:
            self._context.active = int((gates != 0).sum(-1).max())
        if weights is None:
            self.drop()

    def _index(self, name: str, where: str) -> int:
        if name not in self.spec.experts:
            raise CoterieError(f"no expert {name!r}", where, f"known: {', '.join(self.spec.experts)}")
        return self.spec.experts.index(name)

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
        if each.__dict__.get("_experts_implementation_internal") == GUARD:
            each._experts_implementation_internal = None
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
