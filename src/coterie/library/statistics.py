"""What routers and retrieval ask of an expert: computed from its factors, or put in by whoever has the data.

Each kind is one safetensors file beside the adapter. Its metadata name the weights that it was made of, so that what
belongs to other weights is never taken, and hold a hash of its own tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CoterieError
from ..experts.factorise import low_rank_svd
from ..sources.checkpoint import digest
from ..sources.delta import LowRank
from ..sources.manifest import inside

FOLDER = "statistics"


def prototype(delta: LowRank) -> Tensor:
    """(in,) float32: the delta's first right singular vector, its largest component positive; zeros of a zero delta.

    Arrow's prototype (Ostapenko et al. 2024, arXiv:2405.11157), exact by QR of the factors and an r x r SVD.
    """
    vt = low_rank_svd(delta.up, delta.down, 1).vt
    if not len(vt):
        return torch.zeros(delta.down.shape[1])
    return (vt[0] * vt[0][vt[0].abs().argmax()].sign()).float()


def sigma(delta: LowRank) -> Tensor:
    """(r,) float64: the delta's singular values, the largest first, with zeros up to the rank of the factors."""
    values = low_rank_svd(delta.up, delta.down).s
    return torch.nn.functional.pad(values, (0, delta.up.shape[1] - len(values)))


def gram(delta: LowRank) -> Tensor:
    """(r, r) float64: `up^T up`, the scale in `up`: with z = down x, the delta's output has the norm sqrt(z^T G z).

    What the score of SpectR (Fleshman & Van Durme 2025) needs, without an SVD.
    """
    return delta.up.T @ delta.up


OF_WEIGHTS: dict[str, Callable[[LowRank], Tensor]] = {"prototype": prototype, "sigma": sigma, "gram": gram}
"""The kinds that are computed from an expert's factors, layer by layer."""

OF_INPUTS = ("gate", "activation")
"""The kinds that somebody with data puts in: one vector as wide as its input, (in,), for layers of the expert."""


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
