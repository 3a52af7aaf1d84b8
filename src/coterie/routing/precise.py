"""Routing in float32, also where the model computes under autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def precise(function: Function) -> Function:
    """Keep autocast, which would round matrix products to half precision, out of a function of a tensor."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return cast(Function, run)
