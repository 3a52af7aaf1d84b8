"""Writing safetensors shards tensor by tensor.

The safetensors library writes a file from a dict of all its tensors; a streaming build must hold one at a time. The
format allows it: the header may be padded, so room for it is left at the start and it is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from ..errors import CoterieError
from ..sources.checkpoint import DTYPES

if TYPE_CHECKING:
    from .journal import Journal

_CODE = {dtype: code for code, dtype in DTYPES.items()}
_ENTRY = 120  # bytes that a tensor takes in the header, beyond its name, at most


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is until all are finished, and their number known."""
    return folder / f"shard-{index}.safetensors"


def digest(file: Path) -> str:
    """sha256 of a shard as the writer takes it: its data, then its header, which is written last."""
    with file.open("rb") as shard:
        header = shard.read(8)
        header += shard.read(struct.unpack("<Q", header)[0])
        sha256 = hashlib.sha256()
        while block := shard.read(1 << 20):
            sha256.update(block)
    sha256.update(header)
    return sha256.hexdigest()


class ShardWriter:
    """Tensors in, shards of at most `max_bytes` out, with an index where there are several.

    Args:
        folder: where the shards go.
        max_bytes: size at which the next shard begins.
        names: names to expect, for the room that the header gets; more tensors than that start another shard.
        journal: is told of every finished shard; tensors of those that it knows already are passed over.
    """

    def __init__(self, folder: Path, max_bytes: int, names: Iterable[str], journal: Journal | None = None):
        self.folder, self.max_bytes, self._journal = folder, max_bytes, journal
        self._room = 8 * (64 + sum(len(name.encode()) + _ENTRY for name in names) // 8)
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._offset = self._used = 0
        self._names: set[str] = set()
        self._sha256 = hashlib.sha256()
        found = journal.shards if journal else []
        self._shards = [(shard_path(folder, i), list(shard["names"])) for i, shard in enumerate(found)]
        self.total_bytes = sum(shard["bytes"] for shard in found)
        self._finished = {name for _, names in self._shards for name in names}

    def note(self, step: Any) -> None:
        """Every tensor of a step was added; plain data, for the journal."""
        if self._journal:
            self._journal.note(step)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor (any strides, any device)."""
        if name in self._finished:
            self._finished.remove(name)
            self._names.add(name)
            return
        if name in self._names:
            raise CoterieError(f"tensor {name!r} would be written twice", str(self.folder), "report this")
        raw = tensor.detach().cpu().contiguous()
        size = raw.numel() * raw.element_size()
        self._names.add(name)
        entry = len(name.encode()) + _ENTRY
        full = self._offset + size > self.max_bytes or 64 + self._used + entry > self._room
        if self._file is not None and full:
            self._close()
        if self._file is None:
            path = shard_path(self.folder, len(self._shards))
            self._file = path.open("wb")
            self._sha256 = hashlib.sha256()
            self._file.seek(8 + self._room)
            self._shards.append((path, []))
            self._header, self._offset, self._used = {}, 0, 0
        span = [self._offset, self._offset + size]
        self._header[name] = {"dtype": _CODE[raw.dtype], "shape": list(raw.shape), "data_offsets": span}
        if size:
            data = raw.flatten().view(torch.uint8).numpy().data
            self._file.write(data)
            if self._journal:
                self._sha256.update(data)
        self._offset += size
        self._used += entry
        self.total_bytes += size
        self._shards[-1][1].append(name)

    def _close(self) -> None:
        if self._file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, ensure_ascii=False).encode()
        if len(header) > self._room:
            raise CoterieError("a tensor's name is too long for the header", str(self._shards[-1][0]), "shorten it")
        head = struct.pack("<Q", self._room) + header.ljust(self._room)
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        if self._journal:
            self._sha256.update(head)
            self._journal.shard(*self._shards[-1], self._offset, self._sha256.hexdigest())

    def finish(self, stem: str = "model") -> None:
        """Close the last shard, give all their final names, and write the index where there are several."""
        self._close()
        if len(self._shards) == 1:
            self._shards[0][0].rename(self.folder / f"{stem}.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._shards, 1):
            final = f"{stem}-{i:05d}-of-{len(self._shards):05d}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
