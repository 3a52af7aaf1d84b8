"""What goes along with a model's own state: decisions with its KV cache, a call with its checkpointed blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .context import Context


class Following:
    """A method of a KV cache that what was decided for its rows goes through as well, and the twin, its cache of the
    pass without experts.
    """

    ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")

    def __init__(self, cache: Any, kept: dict[Any, Any], name: str):
        self.cache, self.kept, self.name = cache, kept, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        twin, rows = self.kept.get(-2), args[0] if args else next(iter(kwargs.values()), None)
        if twin is not None:
            getattr(type(twin), self.name)(twin, *args, **kwargs)
        if self.name in self.ROWS:
            for name, decided in self.kept.items():
                if isinstance(decided, Tensor):
                    self.kept[name] = self._of(rows, decided)
                elif isinstance(decided, list):  # the experts that a decision merged
                    self.kept[name] = [self._of(rows, part) for part in decided]
        return getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)

    def _of(self, rows: Any, decided: Tensor) -> Tensor:
        if self.name == "batch_repeat_interleave":
            return decided.repeat_interleave(rows, 0)
        return decided[torch.as_tensor(rows, device=decided.device)]

    @classmethod
    def let(cls, cache: Any, kept: dict[Any, Any]) -> None:
        """Let what is kept beside a cache follow whatever is done to it."""
        for name in (*cls.ROWS, "crop", "reset"):
            if hasattr(cache, name):
                setattr(cache, name, cls(cache, kept, name))


class Carried:
    """A checkpointing function whose recomputation sees the call that it belongs to."""

    def __init__(self, context: Context, run: Callable[..., Any]):
        self.context, self.run = context, run

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        call = self.context.call
        if call is None:
            return self.run(function, *args)

        def again(*inputs: Any) -> Any:
            with self.context.during(call):
                return function(*inputs)

        return self.run(again, *args)


def carry(model: nn.Module, context: Context) -> None:
    """Let every checkpointed block take its call along."""
    for module in model.modules():
        run = module.__dict__.get("_gradient_checkpointing_func")
        if run is not None and not isinstance(run, Carried):
            module._gradient_checkpointing_func = Carried(context, run)  # type: ignore[assignment]
