"""Safetensors directories, read lazily: headers first, tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CoterieError
from .locate import Location

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: its file, shape and dtype, and the byte of the file that it begins at."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class Checkpoint:
    """The tensors of one directory, under their names on disk.

    Attributes:
        location: the directory.
        tensors: name on disk -> what its header says.
        sha256: name -> hash of the bytes of every tensor that was read so far.
        bytes_read: how much was read so far.
    """

    location: Location
    tensors: dict[str, TensorInfo]
    sha256: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, location: Location, stem: str = "model") -> Checkpoint:
        """Read the headers of `{stem}.safetensors` or of the shards that `{stem}.safetensors.index.json` names.

        Raises:
            CoterieError: no safetensors (a pickle is refused), a missing or damaged shard, or an index that names
                a tensor which its shard lacks.
        """
        folder = location.path
        if stem == "model" and (folder / "compressed.json").is_file():
            from .compressed import CompressedCheckpoint

            return CompressedCheckpoint.read_headers(location)
        index = location.json(f"{stem}.safetensors.index.json")
        single = folder / f"{stem}.safetensors"
        if not single.is_file() and index is None:
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
            if pickles:
                raise CoterieError(
                    f"holds only pickled weights ({pickles[0]}), which are never loaded",
                    str(folder),
                    f"run `coterie convert {folder} -o NEW_DIR` and use NEW_DIR",
                )
            mend = "check that this is a model directory"
            if location.revision:
                mend = f"if its repository holds only pickles (*.bin), run `coterie convert {location.id} -o DIR`"
            raise CoterieError(f"has no {stem}.safetensors", str(folder), mend)
        if single.is_file():
            return cls(location, dict(headers(single)))
        weight_map = index.get("weight_map") if index else None
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CoterieError("has no valid weight_map", str(folder / f"{stem}.safetensors.index.json"), "restore it")
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise CoterieError("a shard that the index names is missing", str(folder / shard), "fetch it again")
            tensors.update(headers(folder / shard))
        for name, shard in weight_map.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise CoterieError(
                    f"the index says that {name!r} is in {shard}, and it is not", str(folder), "fetch the files again"
                )
        return cls(location, tensors)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU.

        Raises:
            CoterieError: its bytes cannot be read, or it holds NaN or infinite values.
        """
        info = self.tensors[name]
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt")
            tensor = self._open[info.file].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CoterieError(f"tensor {name!r} cannot be read ({error})", str(info.file), "fetch it again") from None
        if name not in self.sha256:
            require_finite(tensor, name, str(info.file))
            self.sha256[name] = digest(tensor)
            self.bytes_read += info.bytes
        return tensor

    def block(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor in row-major order, (stop - start,), read into memory of its own.

        Unlike `read` this neither maps the file nor looks at the values; whoever reads a tensor so accounts for it.

        Raises:
            CoterieError: its bytes cannot be read.
        """
        info = self.tensors[name]
        block = torch.empty(stop - start, dtype=info.dtype)
        todo, place = block.view(torch.uint8).numpy().data, info.begin + start * info.dtype.itemsize
        try:
            with open(info.file, "rb", buffering=0) as file:
                file.seek(place)
                while todo:
                    count = file.readinto(todo)
                    if not count:
                        raise OSError("the file ends early")
                    todo = todo[count:]
        except OSError as error:
            raise CoterieError(f"tensor {name!r} cannot be read ({error})", str(info.file), "fetch it again") from None
        return block


def headers(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """What a safetensors file says of its tensors, by name.

    Raises:
        CoterieError: it is damaged, or holds a dtype that is not read.
    """
    try:
        with safe_open(file, framework="pt"):  # which checks the header against the file
            pass
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CoterieError(
                    f"tensor {name!r} has dtype {entry['dtype']}",
                    str(file),
                    "quantised weights cannot be sources: use the unquantised checkpoint",
                )
            yield name, TensorInfo(file, tuple(entry["shape"]), dtype, 8 + length + entry["data_offsets"][0])
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise CoterieError(f"is truncated or damaged ({error})", str(file), "fetch it again") from None


def is_counter(name: str) -> bool:
    """Whether a tensor counts BatchNorm's training steps: fine-tunes differ in it, and evaluation never reads it."""
    return name.endswith("num_batches_tracked")


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes, in row-major order."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def require_finite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raise CoterieError if a floating tensor holds NaN or infinite values (one pass: their sum would tell)."""
    if not tensor.is_floating_point() or tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CoterieError(f"tensor {name!r} holds {bad} NaN or infinite values", where, "use a sound checkpoint")
