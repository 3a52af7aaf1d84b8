"""An expert, whatever it is read from: its delta of a linear layer, and its value of any other tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..errors import CoterieError
from .delta import Delta, Dense, Fitted
from .names import ModuleView, View


class ExpertSource(ABC):
    """One expert under the names that its tensors bear in memory.

    Attributes:
        name: the user's name for it.
        weight: factor on its deltas.
        kind: "full fine-tune", "adapter" or "module".
        location: where it is read from.
        left_out: tensors of the source that the build does not use, with the reason.
        labels: the configuration fields that belong to its head.
    """

    kind: str
    location: str

    def __init__(self, name: str, weight: float, labels: dict[str, Any]):
        self.name, self.weight, self.labels = name, weight, labels
        self.left_out: dict[str, str] = {}

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether the source says anything of this tensor."""

    @abstractmethod
    def value(self, name: str, base: torch.Tensor | None, any_shape: bool = False) -> torch.Tensor | None:
        """The expert's value of a tensor (None where the source says nothing of it).

        Args:
            name: the tensor's name in memory.
            base: the base's value, where it has one; what an adapter changes is added to it.
            any_shape: whether the shape may differ from the base's (task heads).
        """

    @abstractmethod
    def delta(self, path: str, base: torch.Tensor, transposed: bool) -> Delta | None:
        """The expert's delta of the linear layer `path`, in (out, in) orientation; None where it is exactly zero.

        Args:
            path: module path in memory.
            base: the base weight as it is in memory.
            transposed: whether the layer keeps its weight as (in, out), as GPT-2's Conv1D does.
        """

    def bias(self, path: str, base: torch.Tensor | None) -> torch.Tensor | None:
        """The expert's bias delta of a linear layer, (out,); None where it is exactly zero."""
        if base is None:
            return None
        value = self.value(f"{path}.bias", base)
        return None if value is None or same(value, base) else value.float() - base.float()

    def fitted(self, path: str, base: torch.Tensor) -> Fitted | None:
        """What was made of the delta of a linear layer before, for a mixture; None where it is to be made.

        Args:
            path: module path in memory.
            base: the base weight.
        """
        return None

    def altered(self, name: str) -> bool:
        """Whether it is known, without its value, to differ from the base in a tensor outside the mixture layers."""
        return False

    def rank_bound(self, path: str) -> int | None:
        """The delta's rank as far as headers tell it: 0 where the source does not touch the layer, None if unknown."""
        return None if self.has(f"{path}.weight") else 0

    def bytes(self, name: str) -> int:
        """How many bytes a build reads for this tensor."""
        return 0


class FullExpert(ExpertSource):
    """A full fine-tune: a checkpoint, or a live module."""

    def __init__(self, name: str, view: View | ModuleView, weight: float = 1.0, labels: dict[str, Any] | None = None):
        super().__init__(name, weight, labels or {})
        self.view, self.location = view, view.location
        self.kind = "module" if isinstance(view, ModuleView) else "full fine-tune"

    def has(self, name: str) -> bool:
        return name in self.view and name not in self.left_out

    def value(self, name: str, base: torch.Tensor | None, any_shape: bool = False) -> torch.Tensor | None:
        if not self.has(name):
            return None
        value = self.view.get(name)
        if base is not None and value.shape != base.shape and not any_shape:
            raise shape_error(name, tuple(value.shape), tuple(base.shape), self)
        return value

    def delta(self, path: str, base: torch.Tensor, transposed: bool) -> Delta | None:
        value = self.value(f"{path}.weight", base)
        if value is None or same(value, base):
            return None
        matrix = value.float() - base.float()
        return Dense(matrix.T if transposed else matrix)

    def bytes(self, name: str) -> int:
        return self.view.bytes(name) if isinstance(self.view, View) and self.has(name) else 0


def same(value: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether an expert's tensor is the base's.

    An expert that is stored in a narrower dtype than the base is compared after the base is rounded as it was: the
    rounding of what it never changed is no delta. Otherwise the two are compared in the wider dtype.
    """
    wide = torch.promote_types(value.dtype, base.dtype)
    if value.dtype != base.dtype and wide == base.dtype:
        return torch.equal(value, base.to(value.dtype))
    return torch.equal(value.to(wide), base.to(wide))


def shape_error(name: str, shape: tuple[int, ...], base: tuple[int, ...], expert: ExpertSource) -> CoterieError:
    """The error for a tensor whose shape differs from the base's."""
    vocabulary = shape[1:] == base[1:] and expert.kind != "module"
    return CoterieError(
        f"tensor {name!r} has shape {list(shape)} and the base's has {list(base)}",
        f"expert {expert.name!r} ({expert.location})",
        "use experts of this base"
        + ("; where only the vocabulary differs, `vocabulary: base` keeps the base's rows" if vocabulary else ""),
    )
