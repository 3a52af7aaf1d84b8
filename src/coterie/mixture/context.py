"""The routing context: what mixture layers must know beyond their input, shared by all layers of a model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CoterieError
from ..routing.call import Call
from ..routing.decision import Decision


@dataclass
class Context:
    """Set through `model.coterie`, read by every mixture layer.

    Attributes:
        path: the compute path that is forced, or "auto".
        weights: one decision for every call: a weight per expert of the mixture; None where layers decide.
        gates: decisions given from outside, (batch, tokens or 1, experts of the mixture), float32; else None.
        active: how many experts `gates` gives a token at most.
        recorders: called with (layer, gates (..., candidates)) for each layer of a call.
        last_losses: what routers added to the last loss, by name.
        untaken: the last training call that had no labels, so that its losses are part of none yet, and its output.
        told: whether a loss without them was warned of.
        told_of_part: whether training a part alone was.
        compiled_call: the call that is being traced (threads do not exist there).
    """

    path: str = "auto"
    weights: tuple[float, ...] | None = None
    gates: torch.Tensor | None = None
    active: int = 1
    recorders: list[Callable[[Any, torch.Tensor], None]] = field(default_factory=list)
    compiled_call: Call | None = None
    last_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    untaken: tuple[Call, Any] | None = None
    told: bool = False
    told_of_part: bool = False
    _calls: dict[int, Call] = field(default_factory=dict)
    _blocks: dict[int, Any] = field(default_factory=dict)

    @property
    def call(self) -> Call | None:
        """The call of the whole model that this thread is in."""
        return self.compiled_call if torch.compiler.is_compiling() else self._calls.get(threading.get_ident())

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Within the block, this thread's layers see this call."""
        if torch.compiler.is_compiling():
            self.compiled_call = call
            yield
            self.compiled_call = None
            return
        thread = threading.get_ident()
        before = self._calls.get(thread)
        self._calls[thread] = call
        try:
            yield
        finally:
            if before is None:
                del self._calls[thread]
            else:
                self._calls[thread] = before

    def tell_of_part(self, losses: Iterable[str]) -> None:
        """Warn, once, that a part of the model trains by itself, so that its routers' losses are in none."""
        if self.told_of_part or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.told_of_part = True
        warnings.warn(
            f"a part of the mixture was called and not the whole, so that the losses of its routers "
            f"({', '.join(losses)}) are not added: call the whole model, or wrap this part as a mixture",
            stacklevel=2,
        )

    def enter(self, call: Call) -> None:
        """As `during`, for hooks: until this thread leaves."""
        block = self._blocks[threading.get_ident()] = self.during(call)
        block.__enter__()

    def leave(self) -> bool:
        """Whether this thread had entered a call by a hook; that is over."""
        block = None if torch.compiler.is_compiling() else self._blocks.pop(threading.get_ident(), None)
        if block is not None:
            block.__exit__(None, None, None)
        return block is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled_call": None, "untaken": None, "_calls": {}, "_blocks": {}}

    def given(self, leading: torch.Size, candidates: tuple[int, ...], device: torch.device) -> Decision:
        """The decision that was given from outside, for a layer's tokens.

        Args:
            leading: the shape of the layer's input without its width.
            candidates: the layer's experts.
            device: where the layer computes.

        Raises:
            CoterieError: the layer's tokens do not belong to the examples that gates were given for.
        """
        assert self.gates is not None
        batch, tokens, _ = self.gates.shape
        first, rest = leading[0] if leading else 1, leading[1:].numel()
        if first != batch or (tokens > 1 and rest != tokens):
            given = f"{batch} rows" + (f" of {tokens} tokens" if tokens > 1 else "")
            seen = " x ".join(map(str, leading)) or "1"
            raise CoterieError(
                f"experts were given for {given}, and a layer's input has {seen} rows and tokens",
                "model.coterie.route",
                "give one expert per row that the model sees (with beams: per beam); models whose layers do not see "
                "examples first take one decision for all",
            )
        gates = self.gates[..., list(candidates)].to(device)
        return Decision(len(candidates), None, gates.expand(batch, rest, -1).reshape(batch * rest, -1))
