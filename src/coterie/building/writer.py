"""Writing safetensors shards tensor by tensor, and putting a finished directory in its place at once.

The safetensors library writes a file from a dict of all its tensors; a streaming build must hold one at a time. The
format allows it: the header may be padded, so room for it is left at the start and it is written last.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CoterieError
from ..sources.checkpoint import DTYPES

_CODE = {dtype: code for code, dtype in DTYPES.items()}
_ENTRY = 120  # bytes that a tensor takes in the header, beyond its name, at most


class ShardWriter:
    """Tensors in, shards of at most `max_bytes` out, with an index where there are several.

    Args:
        folder: where the shards go.
        max_bytes: size at which the next shard begins.
        names: names to expect, for the room that the header gets; more tensors than that start another shard.
    """

    def __init__(self, folder: Path, max_bytes: int, names: Iterable[str]):
        self.folder, self.max_bytes = folder, max_bytes
        self._room = 8 * (64 + sum(len(name.encode()) + _ENTRY for name in names) // 8)
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._offset = self._used = 0
        self._names: set[str] = set()
        self._shards: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor (any strides, any device)."""
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
            path = self.folder / f"shard-{len(self._shards)}.safetensors"
            self._file = path.open("wb")
            self._file.seek(8 + self._room)
            self._shards.append((path, []))
            self._header, self._offset, self._used = {}, 0, 0
        span = [self._offset, self._offset + size]
        self._header[name] = {"dtype": _CODE[raw.dtype], "shape": list(raw.shape), "data_offsets": span}
        if size:
            self._file.write(raw.flatten().view(torch.uint8).numpy().data)
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
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

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


# What marks a directory as coterie's own, which --force may replace.
OURS = ("mixture.json", "extracted.json", "converted.json")


@contextmanager
def whole_directory(out: Path, force: bool = False, needed: int = 0, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to write in that becomes `out` at the end of the block, or vanishes if the block fails.

    A killed process leaves at most a hidden sibling `.NAME.partial-PID-*`, which the next run for the same `out`
    removes, and never a lost result: what --force replaces is kept aside until the new directory stands.

    Args:
        out: the final directory.
        force: replace an existing directory, if coterie wrote it or it is empty.
        needed: bytes that will be written; refused at once where the device has fewer.
        sources: directories that are read, and so must not be replaced.

    Raises:
        CoterieError: `out` exists, is not ours to replace, or the device has or runs out of space.
    """
    out = out.absolute()
    _restore(out)
    if os.path.lexists(out):
        if not force:
            raise CoterieError(
                "exists already", str(out), "choose another directory, or replace it with --force (force=True)"
            )
        _require_replaceable(out, sources)
    made: list[Path] = []
    staging: Path | None = None
    try:
        for parent in reversed([p for p in out.parents if not p.exists()]):
            parent.mkdir()
            made.append(parent)
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise CoterieError(
                f"no space left on the device: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free",
                str(out.parent),
                "free some space or choose another device",
            )
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-{os.getpid()}-", dir=out.parent))
        yield staging
        staging.chmod(0o755)
        old = out.with_name(f".{out.name}.previous")
        if os.path.lexists(out):
            out.rename(old)
        staging.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _io_error(error, out) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for parent in reversed(made):
            if not any(parent.iterdir()):
                parent.rmdir()


def _restore(out: Path) -> None:
    """Clear up after killed runs: put back a result that was moved aside, remove what is left of dead builds."""
    old = out.with_name(f".{out.name}.previous")
    if old.exists() and not out.exists():
        old.rename(out)
    for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        pid = stale.name.removeprefix(f".{out.name}.partial-").partition("-")[0]
        if not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            shutil.rmtree(stale, ignore_errors=True)


def _require_replaceable(out: Path, sources: Iterable[Path]) -> None:
    inside = [s for s in sources if out.resolve() in (s.resolve(), *s.resolve().parents)]
    if inside:
        raise CoterieError(f"holds a source of this very build ({inside[0]})", str(out), "choose another directory")
    if out.is_symlink() or not out.is_dir():
        raise CoterieError("is no directory", str(out), "choose another directory")
    if any(out.iterdir()) and not any((out / name).is_file() for name in OURS):
        raise CoterieError("was not written by coterie", str(out), "remove it yourself, or choose another directory")


def _io_error(error: OSError, out: Path) -> CoterieError:
    if error.errno == errno.ENOSPC:
        return CoterieError("no space left on the device", str(out), "free some space or choose another device")
    return CoterieError(f"cannot be written ({error})", str(out), "choose another directory")
