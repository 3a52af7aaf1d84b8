"""Modules that are kept once per expert and selected by name: task heads, and what the base lacks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import CoterieError


class PerExpert(nn.Module):
    """One module per expert that has it, as children 0, 1, ...; calls go to the selected one.

    Attributes:
        owners: index of the expert that each copy belongs to.
        selected: position of the copy that answers, or None where the selected expert has no such module.
    """

    def __init__(self, copies: Iterable[nn.Module], owners: list[int]):
        super().__init__()
        for i, each in enumerate(copies):
            self.add_module(str(i), each)
        self.owners = owners
        self.selected: int | None = 0

    def select(self, expert: int) -> None:
        self.selected = self.owners.index(expert) if expert in self.owners else None

    @property
    def answering(self) -> nn.Module:
        if self.selected is None:
            raise CoterieError("the selected expert has no such module", "use_head", "select another expert")
        return self.get_submodule(str(self.selected))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answering(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their heads (`self.score.weight.dtype`): answer with the selected copy's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "owners" not in self.__dict__:
                raise
            return getattr(self.answering, name)


def per_expert(module: nn.Module, owners: list[int], shapes: list[dict[str, list[int]]]) -> PerExpert:
    """Copies of a module (on its device, values undefined), each with its own tensor shapes.

    Args:
        module: what the architecture has at this place.
        owners: index of the expert that each copy belongs to.
        shapes: for each copy, tensor name -> shape.
    """
    copies = []
    for sizes in shapes:
        twin = copy.deepcopy(module)
        for name, size in sizes.items():
            parent = twin.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            old = getattr(parent, leaf)
            if list(old.shape) == list(size):
                continue
            setattr(parent, leaf, nn.Parameter(torch.empty(size, dtype=old.dtype, device=old.device)))
            if isinstance(parent, nn.Linear):
                parent.out_features, parent.in_features = parent.weight.shape
        copies.append(twin)
    return PerExpert(copies, owners)
