"""What a mixture is, in plain data: everything that is needed to rebuild it from its base architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CoterieError
from ..experts.bank import BankShape
from ..experts.masked import shape_from_dict
from ..routing.prepass import Classifier
from ..routing.retrieval import Embeddings
from ..routing.router import Routing
from .heads import per_expert
from .kinds import decoder_path
from .layer import add_experts, replace, route

FORMAT = 1


@dataclass
class HeadShape:
    """A module that is kept per expert: the owners of its copies, and their tensor shapes."""

    owners: list[int]
    shapes: list[dict[str, list[int]]]


@dataclass
class MixtureSpec:
    """A mixture's structure.

    Attributes:
        method: the registered method that built it.
        parameters: the method's parameters.
        routing: score and selection of its layers.
        experts: the experts' names, in order.
        layers: module path -> what its bank holds.
        heads: module path -> the copies that are kept per expert.
        siblings: groups of layers that read the same input.
        labels: per expert, the configuration fields that go with its head (`id2label`, `label2id`, `problem_type`).
        base: id, revision and fingerprint of the base model, for the light form; None where the mixture stands alone.
    """

    method: str
    parameters: dict[str, Any]
    routing: Routing
    experts: list[str]
    layers: dict[str, BankShape] = field(default_factory=dict)
    heads: dict[str, HeadShape] = field(default_factory=dict)
    siblings: list[list[str]] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)
    base: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "method": self.method,
            "parameters": self.parameters,
            "routing": self.routing.to_dict(),
            "experts": self.experts,
            "layers": {path: shape.to_dict() for path, shape in self.layers.items()},
            "heads": {path: {"owners": h.owners, "shapes": h.shapes} for path, h in self.heads.items()},
            "siblings": self.siblings,
            "labels": self.labels,
            "base": self.base,
        }

    @classmethod
    def from_dict(cls, spec: dict[str, Any]) -> MixtureSpec:
        if spec["format"] != FORMAT:
            raise CoterieError(
                f"its format is {spec['format']} and this coterie reads {FORMAT}", "config.json", "upgrade coterie"
            )
        return cls(
            spec["method"],
            spec["parameters"],
            Routing(**spec["routing"]),
            spec["experts"],
            {path: shape_from_dict(shape) for path, shape in spec["layers"].items()},
            {path: HeadShape(h["owners"], h["shapes"]) for path, h in spec["heads"].items()},
            spec.get("siblings", []),
            spec["labels"],
            spec.get("base"),
        )


def insert(model: nn.Module, spec: MixtureSpec, tensors: dict[str, dict[str, Any]] | None = None) -> None:
    """Turn a model of the base architecture into the mixture, in place.

    Args:
        model: the model; on the meta device where a loader will fill it.
        spec: the mixture's structure.
        tensors: module path -> the bank's parameters; None leaves them to the loader.
    """
    widths = _read_widths(model, spec)
    for path, shape in spec.layers.items():
        given = tensors[path] if tensors is not None else None
        layer = add_experts(model.get_submodule(path), shape, spec.routing, given, widths.get(path), len(spec.experts))
        replace(model, path, layer)
    _add_shared(model, spec)
    for path, head in spec.heads.items():
        replace(model, path, per_expert(model.get_submodule(path), head.owners, head.shapes))


def reroute(model: nn.Module, spec: MixtureSpec) -> None:
    """Give a mixture's layers the routers that a spec says, their values undefined; the experts stay."""
    widths = _read_widths(model, spec)
    for path in spec.layers:
        route(model.get_submodule(path), spec.routing, widths.get(path), len(spec.experts))
    _add_shared(model, spec)


def _read_widths(model: Any, spec: MixtureSpec) -> dict[str, int]:
    """Of a decoder's layers, the width of the encoder's states, which routers read that decide by example."""
    decoder = decoder_path(model)
    if decoder is None or spec.routing.score == "vectors":  # of each layer's own input
        return {}
    width = model.get_encoder().config.hidden_size
    return {path: width for path in spec.layers if path.startswith(f"{decoder}.")}


def _add_shared(model: Any, spec: MixtureSpec) -> None:
    """What decides for all layers at once: X-LoRA's classifier of a pass before, or the experts' text embeddings."""
    if spec.routing.score not in ("prepass", "retrieval"):
        return
    options = dict(spec.routing.score_options)
    weight = next(iter(model.parameters()))
    router: nn.Module
    with torch.device(weight.device):
        if spec.routing.score == "retrieval":
            router = Embeddings(**options)
        else:
            layers = len(spec.layers) if options.pop("layerwise") else 1
            router = Classifier(model.config.get_text_config().hidden_size, len(spec.experts), layers, **options)
    model.add_module("coterie_router", router.to(weight.dtype))
