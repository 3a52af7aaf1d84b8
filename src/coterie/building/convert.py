"""From pickled checkpoints to safetensors: the one place that opens a pickle, restricted to plain tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import CoterieError
from ..sources.checkpoint import DTYPES
from ..sources.locate import PATTERNS, locate
from .directory import whole_directory
from .writer import ShardWriter


def convert(source: str | Path, out: str | Path, force: bool = False) -> int:
    """Copy a model directory, its `*.bin` weights rewritten as safetensors.

    Pickles are read with `weights_only=True` (nothing but tensors and plain containers is unpickled) and
    memory-mapped where their format allows it, one file and one tensor at a time. A tensor that shares another's
    storage whole is written once.

    Args:
        source: a model or adapter directory, or a Hub id.
        out: the directory to make.
        force: replace an existing directory.

    Returns:
        How many tensors were written.

    Raises:
        CoterieError: no pickled weights, or one that holds more than tensors.
    """
    folder = locate(str(source), patterns=["*.bin", *PATTERNS]).path
    stem = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    pattern = "adapter_model*.bin" if stem == "adapter_model" else "pytorch_model*.bin"
    pickles = sorted(folder.glob(pattern))
    if not pickles:
        raise CoterieError(f"holds no {pattern}", str(folder), "only such directories need conversion")
    written: set[str] = set()
    with whole_directory(Path(out), force, sources=[folder]) as staging:
        writer = ShardWriter(staging, 5_000_000_000, (name for file in pickles for name in _read(file)))
        for file in pickles:
            storages: set[tuple[Any, ...]] = set()
            for name, tensor in _read(file).items():
                if (
                    not isinstance(name, str)
                    or not isinstance(tensor, torch.Tensor)
                    or tensor.dtype not in DTYPES.values()
                ):
                    raise CoterieError(f"holds {name!r}, which is no plain tensor", str(file), "export its state dict")
                key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                if name in written or (tensor.numel() and key in storages):
                    continue
                storages.add(key)
                written.add(name)
                writer.add(name, tensor)
        writer.finish(stem)
        for file in folder.iterdir():
            if file.is_file() and not file.name.endswith((".bin", ".bin.index.json", ".pt", ".pth", ".py", ".pkl")):
                shutil.copyfile(file, staging / file.name)
        (staging / "converted.json").write_text(json.dumps({"source": str(source), "tensors": len(written)}))
    return len(written)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoterieError(f"is no pickle of plain tensors ({reason})", str(file), "export its state dict") from None
    if not isinstance(loaded, dict):
        raise CoterieError("is no state dict", str(file), "export its state dict")
    return loaded
