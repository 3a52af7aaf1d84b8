"""Names: every tensor of every source, under the name that it bears in memory.

In memory, on disk and in adapters the same weight bears different names (ViT, Mixtral, base-model prefixes, older
adapters). The truth is a meta-device skeleton of the architecture and transformers' own conversion mapping.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights

from ..errors import CoterieError
from .checkpoint import Checkpoint


class Skeleton:
    """An architecture on the meta device, and the names of its tensors in memory and on disk.

    Attributes:
        model: the architecture, holding no memory.
        tensors: name in memory -> meta tensor, of every parameter and persistent buffer.
        tied: name of a tied tensor -> name of the tensor that it shares.
    """

    def __init__(self, architecture: type[PreTrainedModel], config: Any):
        with torch.device("meta"), no_init_weights():
            self.model = architecture(copy.deepcopy(config))
        self.model.eval()
        # What a model makes by itself and never saves (Marian's sinusoidal positions) is no tensor of a checkpoint.
        self._unsaved = set(self.model._keys_to_ignore_on_save or [])
        self.tensors: dict[str, torch.Tensor] = {
            name: tensor for name, tensor in self.model.state_dict().items() if name not in self._unsaved
        }
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        conversions = get_model_conversion_mapping(self.model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.converter_of = {p: c for c in self._converters for p in c.source_patterns}
        self._buffers = {name for name, _ in self.model.named_buffers()}
        self._back = [
            c for c in get_model_conversion_mapping(self.model, add_legacy=False) if not isinstance(c, PrefixChange)
        ]

    def in_memory(self, name: str) -> tuple[str, str | None]:
        """A name on disk (or in an adapter) as (name in memory, the converter's pattern that gathers it or None)."""
        prefix = self.model.base_model_prefix
        found, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self.tensors)
        if found not in self.tensors and name in self.tensors:
            return rename_source_key(name, [], [], prefix, self.tensors)
        return found, pattern

    def layer_in_memory(self, path: str) -> str:
        """The path in memory of a layer whose path on disk, or in another class of the family, is given."""
        return self.in_memory(f"{path}.weight")[0].removesuffix(".weight")

    def on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under their names in memory, as the tensors that `save_pretrained` would write (Hub names)."""
        self.model._weight_conversions = self._back or None  # type: ignore[assignment]
        return revert_weight_conversion(self.model, tensors) if self._back else dict(tensors)

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def belongs(self, name: str) -> bool:
        """Whether a name that is no tensor of the architecture lies inside a module that the architecture has."""
        parts = name.split(".")
        return any(".".join(parts[:i]) in self._modules for i in range(len(parts) - 1, 0, -1))

    @cached_property
    def _modules(self) -> set[str]:
        """Paths of everything that holds tensors or modules."""
        return {key.rsplit(".", 1)[0] for key in self.tensors} | {p for p, _ in self.model.named_modules() if p}

    def is_vocabulary(self, name: str) -> bool:
        """Whether a tensor has one row per word piece: the embeddings' own, and what theirs are tied to."""
        try:
            embeddings = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        except NotImplementedError:  # a model of pixels
            return False
        names = (name, *(tied for tied, owner in self.tied.items() if owner == name))
        return any(self.module(each.rpartition(".")[0]) in embeddings for each in names)

    def is_buffer(self, name: str) -> bool:
        """Whether a name is a buffer that the architecture computes by itself (older checkpoints hold some)."""
        return name in self._buffers | self._unsaved or name.rsplit(".", 1)[-1] in (
            "position_ids",
            "inv_freq",
            "masked_bias",
        )


class View:
    """A checkpoint read under the names that its tensors bear in memory.

    Attributes:
        foreign: names on disk that the architecture has no place for.
        doubled: names on disk that repeat a tensor which the checkpoint holds under another name too.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton):
        self.checkpoint, self.skeleton = checkpoint, skeleton
        self.doubled: list[str] = []
        self._simple: dict[str, str] = {}
        self._grouped: dict[str, list[tuple[str, str]]] = {}
        self._member: dict[str, str] = {}
        self._cache: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.foreign: list[str] = []
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            memory, pattern = skeleton.in_memory(name)
            if memory not in skeleton.tensors:
                self.foreign.append(name)
            elif memory in self._simple:
                self._same_twice(self._simple[memory], name)
            elif pattern is None:
                self._simple[memory] = name
            else:
                self._grouped.setdefault(memory, []).append((pattern, name))
        for first, parts in self._grouped.items():
            converter = skeleton.converter_of[parts[0][0]]
            for target in converter.target_patterns:
                sibling = first.replace(converter.target_patterns[0], target)
                if sibling in skeleton.tensors:
                    self._member[sibling] = first
            self._member[first] = first
        for tied, owner in skeleton.tied.items():
            if owner not in self and tied in self._simple:
                self._simple[owner] = self._simple[tied]

    def _same_twice(self, first: str, second: str) -> None:
        """Two names on disk that mean one tensor in memory: fine if they are equal."""
        if not torch.equal(self.checkpoint.read(first), self.checkpoint.read(second)):
            raise CoterieError(
                f"tensors {first!r} and {second!r} are one tensor in memory, and they differ",
                self.location,
                "remove the one that is not meant",
            )
        self.doubled.append(second)

    def untie(self) -> None:
        """Where this checkpoint holds both names of a tied pair with different values, they are two tensors.

        So does `from_pretrained` (T5 v1.1 and its kin claim a tie that their checkpoints do not keep).
        """
        for tied, owner in list(self.skeleton.tied.items()):
            names = self._simple.get(tied), self._simple.get(owner)
            if None not in names and names[0] != names[1] and not torch.equal(self.get(tied), self.get(owner)):
                del self.skeleton.tied[tied]
                self.skeleton.model.all_tied_weights_keys.pop(tied)

    def __contains__(self, name: str) -> bool:
        return name in self._simple or name in self._member

    @property
    def location(self) -> str:
        return str(self.checkpoint.location.path)

    def names_on_disk(self, name: str) -> list[str]:
        """The tensors on disk that make up a tensor in memory."""
        if name in self._simple:
            return [self._simple[name]]
        return [disk for _, disk in self._grouped[self._member[name]]]

    def together(self, name: str) -> list[str]:
        """The tensors in memory that are made, by one conversion, from the same tensors on disk as this one."""
        first = self._member.get(name)
        return [name] if first is None else [n for n, f in self._member.items() if f == first]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape in memory, as far as headers tell it (None where a conversion makes it)."""
        return self.checkpoint.tensors[self._simple[name]].shape if name in self._simple else None

    def bytes(self, name: str) -> int:
        disk = self.names_on_disk(name)
        shared = 1 if name in self._simple else sum(self._member[name] == first for first in self._member.values())
        return sum(self.checkpoint.tensors[d].bytes for d in disk) // shared

    def get(self, name: str) -> torch.Tensor:
        """One tensor as it is in memory; those that transformers gathers from several are gathered likewise."""
        if name in self._simple:
            return self.checkpoint.read(self._simple[name])
        first = self._member[name]
        if self._cache[0] != first:
            converter = copy.deepcopy(self.skeleton.converter_of[self._grouped[first][0][0]])
            for pattern, disk in self._grouped[first]:
                converter.add_tensor(first, disk, pattern, self.checkpoint.read(disk))  # type: ignore[arg-type]
            model = self.skeleton.model
            made = converter.convert(first, model=model, config=model.config)
            self._cache = (first, {k: v[0] if isinstance(v, list) else v for k, v in made.items()})
        if name not in self._cache[1]:
            raise CoterieError(f"tensor {name!r} cannot be made from what is on disk", self.location, "fetch it again")
        return self._cache[1][name]

    def fingerprint(self) -> str:
        """sha256 over the hashes of all tensors of the architecture, under their names in memory."""
        lines = []
        for name in sorted(n for n in self.skeleton.tensors if n in self):
            for disk in self.names_on_disk(name):
                if disk not in self.checkpoint.sha256:
                    self.checkpoint.read(disk)
                lines.append(f"{name} {self.checkpoint.sha256[disk]}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class ModuleView:
    """A live module read by the same calls as a checkpoint."""

    location = "module"

    def __init__(self, module: nn.Module):
        self._tensors = module.state_dict()
        self.foreign: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def together(self, name: str) -> list[str]:
        return [name]


class LiveSkeleton:
    """A live module where a build from disk has a skeleton: the names in memory are all there is.

    Attributes: as `Skeleton`'s.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        owners: dict[int, str] = {}
        self.tied = {n: owners[id(t)] for n, t in self.tensors.items() if owners.setdefault(id(t), n) != n}

    def on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return tensors

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)
