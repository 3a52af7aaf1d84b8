"""Statistics of an expert on disk: vectors that were made of its weights or its data, beside an adapter or alone.

Each kind is one safetensors file. Its metadata hold a hash of its tensors, and name the weights that they belong to.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CoterieError
from .checkpoint import digest
from .manifest import inside

FOLDER = "statistics"


def file_of(folder: Path, kind: str) -> Path:
    """Where an expert's statistics of a kind are.

    Raises:
        CoterieError: a kind that cannot be a file's name.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", kind):
        raise CoterieError(f"kind {kind!r} is no name", "statistics", "use small letters, digits and _")
    return folder / FOLDER / f"{kind}.safetensors"


def write(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write statistics; the file appears whole or not at all, and replaces what was there."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(exist_ok=True)
    handle, staged = tempfile.mkstemp(prefix=".", dir=file.parent)
    os.close(handle)
    try:
        save_file(tensors, staged, {"format": "pt", "digest": _digest(tensors), **facts})
        os.chmod(staged, 0o644)
        os.replace(staged, file)
    finally:
        Path(staged).unlink(missing_ok=True)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Statistics and what their file says of them.

    Raises:
        CoterieError: the file is damaged, or its tensors are not those that it was written with.
    """
    inside(file.parent, file.name)
    try:
        with safe_open(file, framework="pt") as opened:
            facts = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CoterieError(f"cannot be read ({error})", str(file), "remove it; it is computed again") from None
    if facts.get("digest") != _digest(tensors):
        raise CoterieError("was changed since it was written", str(file), "remove it")
    return tensors, facts


def _digest(tensors: Mapping[str, Tensor]) -> str:
    lines = [f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {digest(tensors[name])}" for name in tensors]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
