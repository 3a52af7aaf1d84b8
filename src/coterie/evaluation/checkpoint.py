"""A training that was stopped goes on: trained parameters and AdamW's moments, in one safetensors file, no pickles."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EVERY = 100
"""Steps from one checkpoint to the next."""


def save(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, told: Any) -> None:
    """Write a checkpoint in one step, over the one before.

    Args:
        path: the file.
        parameters: by name, those that are trained.
        optimizer: theirs.
        told: JSON values that `resume` gives back.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {f"{name}|{key}": tensor for key, tensor in state.items()} | {name: parameter.detach()}
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, {"told": json.dumps(told)})
    os.replace(unfinished, path)


def resume(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    """Put a checkpoint's weights and moments back; warns of one that cannot be read, and changes nothing then.

    Args:
        path: the file.
        parameters: by name, those that are trained.
        optimizer: theirs.

    Returns:
        What was told with it, or None where there is no sound one.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no dictionary)
            told = json.loads(file.metadata()["told"])
        shapes = {name: tensors[name].shape for name in parameters}
        if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
            raise ValueError("it is of another model")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} cannot be read ({error}): the training starts again", stacklevel=2)
        return None
    for key, tensor in tensors.items():
        name, _, moment = key.partition("|")
        if moment:
            # A step count stays on the CPU, as the optimizer keeps it.
            device = "cpu" if moment == "step" else parameters[name].device
            optimizer.state[parameters[name]][moment] = tensor.to(device)
        else:
            parameters[name].data.copy_(tensor)
    return told
