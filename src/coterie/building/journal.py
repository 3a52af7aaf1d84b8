"""What a build has finished, so that another run can go on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .writer import digest, shard_path

JOURNAL = "journal.jsonl"
# Held by the run that writes in a folder, for as long as its process lives.
LOCK = "lock"


def changes(folder: Path, now: Mapping[str, Any]) -> list[str] | None:
    """What differs between the identity of the build that left a folder and another; None where it kept no journal."""
    lines = _lines(folder)
    return _differences(lines[0], now) if lines else None


def has_shards(folder: Path) -> bool:
    """Whether a folder's journal tells of a finished shard."""
    return len(_lines(folder)) > 1


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        found = [_differences(old.get(n), new.get(n), f"{where}: {n}" if where else n) for n in names]
        return [line for lines in found for line in lines]
    return [] if old == new else [f"{where} (was {json.dumps(old)}, is {json.dumps(new)})"]


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a folder's journal; a kill may have torn the last."""
    found: list[dict[str, Any]] = []
    file = folder / JOURNAL
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Journal:
    """The finished shards of a build, one line each, on the disk before the next one begins.

    Opening the journal of a killed build checks its shards by size and sha256, keeps those up to the first that is not
    as recorded, and removes everything else in the folder.

    Args:
        folder: where the build writes.
        identity: of this build; the first line.

    Attributes:
        shards: of each finished shard, the names of its tensors and their bytes in all.
        steps: what was noted of every step whose tensors are all in finished shards.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self._file = folder / JOURNAL
        self.shards: list[dict[str, Any]] = []
        self.steps: list[Any] = []
        self._noted: list[Any] = []
        lines = _lines(folder)
        for file in folder.glob("model*.safetensors"):  # a build that was killed while it gave the final names
            number = re.fullmatch(r"model-(\d+)-of-\d+\.safetensors", file.name)
            file.rename(shard_path(folder, int(number[1]) - 1 if number else 0))
        sound = []
        for index, line in enumerate(lines[1:]):
            file = shard_path(folder, index)
            if not file.is_file() or file.stat().st_size != line["size"] or digest(file) != line["sha256"]:
                break
            sound.append(line)
            self.shards.append(line["shard"])
            self.steps += line["steps"]
        kept = {JOURNAL, LOCK, *(shard_path(folder, i).name for i in range(len(sound)))}
        for file in folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in kept:
                file.unlink()
        fresh = folder / "journal.new"
        fresh.write_text("".join(json.dumps(line) + "\n" for line in (identity, *sound)), encoding="utf-8")
        fresh.replace(self._file)

    def note(self, step: Any) -> None:
        """A step whose tensors were all handed to the writer, as plain data."""
        self._noted.append(step)

    def shard(self, file: Path, names: list[str], data_bytes: int, sha256: str) -> None:
        """A shard is finished, and with it the steps that were noted."""
        line = {
            "shard": {"names": names, "bytes": data_bytes},
            "size": file.stat().st_size,
            "sha256": sha256,
            "steps": self._noted,
        }
        self._noted = []
        with self._file.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
