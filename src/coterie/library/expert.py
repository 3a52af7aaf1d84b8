"""One expert of a library: a PEFT adapter, and what `expert.json` beside it says of its layers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import CoterieError
from ..sources.adapter import AdapterExpert
from ..sources.checkpoint import Checkpoint
from ..sources.delta import LowRank
from ..sources.locate import Location
from ..sources.manifest import ADAPTER, Entry, hash_of, inside, span
from . import statistics

FACTS = "expert.json"


@dataclass(frozen=True)
class Layer:
    """A linear layer that an expert adapts: `W + scale up @ down`.

    Attributes:
        rank: of the factors.
        scale: alpha / rank, or alpha / sqrt(rank).
        shape: (out, in).
        up, down: names of the factors in its file.
    """

    rank: int
    scale: float
    shape: tuple[int, int]
    up: str
    down: str


class Expert:
    """One expert of a library, read from its own directory alone: neither its source nor the base is needed.

    Attributes:
        name: in the library.
        entry: what the manifest says of it.
        path: its directory, which `peft.PeftModel.from_pretrained` and every recipe read.
    """

    def __init__(self, name: str, entry: Entry, path: Path):
        self.name, self.entry, self.path = name, entry, path

    def __repr__(self) -> str:
        return f"Expert({self.name!r}, {self.entry.modules} modules of rank {span(self.entry.ranks)})"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `expert.json` says.

        Raises:
            CoterieError: it is not the file that the manifest knows.
        """
        file = inside(self.path, FACTS)
        if hash_of(file) != self.entry.sha256.get(FACTS):
            raise CoterieError("was changed since it was added", str(file), f"remove {self.name!r} and add it again")
        return json.loads(file.read_text(encoding="utf-8"))

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its `adapter_config.json`."""
        inside(self.path, ADAPTER[0])
        return Location(self.path, self.name).json(ADAPTER[0]) or {}

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Module path -> where its factors are. The paths are those of `architecture`."""
        found = self.facts["layers"].items()
        return {path: Layer(**{**layer, "shape": tuple(layer["shape"])}) for path, layer in found}

    @property
    def refused(self) -> dict[str, str]:
        """Paths of linear layers whose change is no plain pair of factors (DoRA, biases of the pair), and why."""
        return self.facts["refused"]

    @property
    def saved(self) -> dict[str, str]:
        """Tensors that it holds whole (heads, trained biases): name in memory -> name in its file."""
        return self.facts["saved"]

    @property
    def architecture(self) -> str:
        """The transformers class whose module paths `layers` bears."""
        return self.facts["architecture"]

    @property
    def prefix(self) -> str:
        """What these paths begin with before those of the model without its head: `bert`, `model` or nothing."""
        return self.facts["prefix"]

    @property
    def examples(self) -> list[str]:
        """Texts of its task."""
        return self.facts["examples"]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its tensors."""
        inside(self.path, ADAPTER[1])
        return Checkpoint.open(Location(self.path, self.name), stem="adapter_model")

    def factors(self, path: str) -> LowRank:
        """The factors of a layer, float64: up (out, r) with the scale in it, down (r, in)."""
        layer = self.layers[path]
        up, down = self.checkpoint.read(layer.up).double(), self.checkpoint.read(layer.down).double()
        return LowRank(layer.scale * up, down)

    def dtype(self, path: str) -> torch.dtype:
        """The dtype in which the factors of a layer are stored; of any layer where it has none there."""
        layer = self.layers.get(path) or next(iter(self.layers.values()))
        return self.checkpoint.tensors[layer.up].dtype

    def require_factors(self) -> None:
        """Raise CoterieError if it changes a linear layer by more than a plain pair of factors."""
        if self.refused:
            raise CoterieError(
                next(iter(self.refused.values())),
                f"expert {self.name!r}",
                "merge it into its base, and add the result with a rank",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        kinds = sorted(file.stem for file in (self.path / statistics.FOLDER).glob("*.safetensors"))
        about = {"name": self.name, "path": str(self.path), **self.entry.model_dump()}
        return {**about, **{k: v for k, v in self.facts.items() if k not in about}, "statistics": kinds}


def describe(adapter: AdapterExpert) -> dict[str, Any]:
    """What `expert.json` says of an adapter's tensors."""
    layers, refused, elsewhere = {}, {}, []
    tensors = adapter.checkpoint.tensors
    for path in adapter.adapted:
        if not isinstance(adapter.skeleton.module(path), (nn.Linear, Conv1D)):
            elsewhere.append(path)
            continue
        try:
            up, down, scale = adapter.pair(path)
        except CoterieError as error:
            refused[path] = error.what
            continue
        (out, rank), (_, width) = tensors[up].shape, tensors[down].shape
        layers[path] = {"rank": rank, "scale": scale, "shape": [out, width], "up": up, "down": down}
    model = adapter.skeleton.model
    prefix = f"{model.base_model_prefix}."
    return {
        "architecture": type(model).__name__,
        "prefix": prefix[:-1] if any(path.startswith(prefix) for path in adapter.adapted) else "",
        "layers": layers,
        "refused": refused,
        "elsewhere": elsewhere,
        "saved": adapter.saved,
    }
