"""The manifest of an expert library: which experts it holds, in which folders, and what their files hash to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CoterieError
from ..recipe import nearest
from .locate import Location

MANIFEST = "library.json"
EXPERTS = "experts"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Base(_Strict):
    """The model that every expert of a library was tuned from.

    Attributes:
        id: directory or Hub id.
        revision: of a model from the Hub.
        fingerprint: `View.fingerprint()` of its tensors, under the names of the class that its config.json names.
        files: of a directory: file -> size and time of change, so that the same files need not be hashed again.
    """

    id: str
    revision: str | None = None
    fingerprint: Sha256
    files: dict[str, list[int]] = {}

    @property
    def source(self) -> str:
        """Where it is read from: a directory, or `id@revision`."""
        return f"{self.id}@{self.revision}" if self.revision else self.id


class Entry(_Strict):
    """What the manifest says of an expert.

    Attributes:
        folder: its directory's name in `experts/`: hexadecimal, never the expert's name.
        kind: "adapter" (as it was), "extracted" (from a full fine-tune) or "combined" (from other experts).
        source: where it came from.
        sha256: file -> hash, of every file of the folder but the statistics.
        targets: last names of the modules that it adapts.
        modules: how many it adapts.
        ranks: the smallest and the largest of them.
        alpha: `lora_alpha` of its configuration; single modules may have their own.
        parameters: how many numbers it holds.
        description: what it is for.
    """

    folder: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    kind: Literal["adapter", "extracted", "combined"]
    source: str
    sha256: dict[FileName, Sha256]
    targets: list[str]
    modules: int
    ranks: list[int]
    alpha: float | int
    parameters: int
    description: str | None = None


class Manifest(_Strict):
    """A library's `library.json`.

    Attributes:
        format: of this file.
        base: what all experts were tuned from.
        experts: name -> what is said of it, in the order in which they came.
    """

    format: Literal[1] = 1
    base: Base
    experts: dict[str, Entry] = {}

    def entry(self, name: str, where: str) -> Entry:
        """The entry of that name.

        Raises:
            CoterieError: there is none; names the nearest.
        """
        if name not in self.experts:
            hint = nearest(name, list(self.experts)) if self.experts else "it is empty"
            raise CoterieError(f"holds no expert {name!r}", where, hint)
        return self.experts[name]


def read_manifest(place: Location) -> Manifest:
    """The manifest of the library in a directory.

    Raises:
        CoterieError: there is none, or it is damaged or of another format.
    """
    raw = place.json(MANIFEST)
    if raw is None:
        raise CoterieError(
            f"is no library: it has no {MANIFEST}", str(place.path), "make one with `coterie library create`"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise CoterieError(f"{path}: {first['msg']}", str(place.path / MANIFEST), "restore the file") from None


def folder_of(place: Location, name: str, entry: Entry) -> Path:
    """The directory of an expert in a library.

    Raises:
        CoterieError: it is missing, or a link to somewhere else.
    """
    folder = place.path / EXPERTS / entry.folder
    if folder.is_symlink() or not folder.is_dir():
        what = "leads out of the library" if folder.is_symlink() else "is missing"
        raise CoterieError(f"{what}: {folder}", f"expert {name!r}", "remove it, and add it again")
    return folder


def inside(folder: Path, name: str) -> Path:
    """A file of a directory that somebody else may have made.

    Raises:
        CoterieError: it is missing, or a link that leads out of the directory (and not to where the Hub's cache keeps
            the files of its snapshots).
    """
    file, root = folder / name, folder.resolve()
    found = file.resolve()
    homes = [root, *(p.parent.parent / "blobs" for p in (root, *root.parents) if p.parent.name == "snapshots")]
    if not any(home in found.parents for home in homes):
        raise CoterieError("leads out of its directory", str(file), "put the file itself there")
    if not found.is_file():
        raise CoterieError("is missing", str(file), "fetch it again")
    return file


def hash_of(file: Path) -> str:
    """sha256 (hex) of a file."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def span(numbers: Sequence[int]) -> str:
    """The smallest and the largest of some numbers, for people."""
    return "-" if not numbers else str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]}-{numbers[-1]}"
