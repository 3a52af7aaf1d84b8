"""From what a recipe says (`DIR`, `hub/id`, `hub/id@revision`) to a directory on disk."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CoterieError
from ..recipe import nearby

# What a build reads of a repository: weights, configuration, tokenizer or processor; never code or pickles.
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class Location:
    """A source's directory, and the id and revision that it came by."""

    path: Path
    id: str
    revision: str | None = None

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON file `name` of this directory as a dict, or None where there is none."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CoterieError(f"is not valid JSON ({error})", str(file), "restore the file") from None
        if not isinstance(content, dict):
            raise CoterieError("is not a JSON object", str(file), "restore the file")
        return content

    @property
    def is_adapter(self) -> bool:
        return (self.path / "adapter_config.json").is_file()


def locate(source: str, token: str | None = None, patterns: list[str] = PATTERNS) -> Location:
    """Find a source on disk, or bring it from the Hub.

    Args:
        source: a directory, or a Hub id, optionally with `@revision`; of an expert library, `LIBRARY#EXPERT`.
        token: Hub token; by default the one that `hf auth login` stored.
        patterns: which files to bring from the Hub.

    Raises:
        CoterieError: neither a directory nor a repository that can be had.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return Location(path, source)
        if "#" in source and not path.exists():
            library, _, name = source.partition("#")
            return _of_library(library, name, token)
        if path.exists():
            raise CoterieError("is a file, not a model directory", source, "give the directory that holds config.json")
    except (OSError, ValueError) as error:
        if isinstance(error, CoterieError):
            raise
        raise CoterieError(f"is not a usable path ({error})", repr(source), "check the path") from None
    repo, _, revision = source.partition("@")
    if not HUB_ID.fullmatch(repo) or source.startswith((".", os.sep, "~")):
        hint = nearby(path, Path.is_dir) or "check the path, or write ORG/NAME@REVISION"
        raise CoterieError("no such directory, and not a Hub id", source, hint)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision or None, token=token, allow_patterns=patterns)
    except Exception as error:  # the Hub client raises many kinds: offline, missing, gated, wrong revision
        hint = nearby(path, Path.is_dir) or "check the path, or id, revision and token"
        raise CoterieError(f"no such directory, and {_why(error)}", source, hint) from None
    return Location(Path(folder), repo, Path(folder).name)


def hub_id(source: str) -> str | None:
    """The Hub repository that a source is in; None of a directory here."""
    here = source if Path(source).exists() else source.partition("#")[0]
    return None if Path(here).exists() else here.partition("@")[0]


def _why(error: Exception) -> str:
    """In a few words, why the Hub gave nothing."""
    from huggingface_hub import errors

    for kinds, why in (
        (errors.GatedRepoError, "the Hub's copy is gated: ask for access on its page, and log in (`hf auth login`)"),
        (errors.RevisionNotFoundError, "the Hub's copy has no such revision"),
        ((errors.RepositoryNotFoundError, errors.HFValidationError), "the Hub shows you no such repository"),
        ((errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled), "the Hub cannot be reached"),
    ):
        if isinstance(error, kinds):
            return why
    return f"the Hub has no copy to be had ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})"


def _of_library(library: str, name: str, token: str | None) -> Location:
    """The directory of an expert of a library; from the Hub nothing comes but the manifest and that directory."""
    from .manifest import ADAPTER, EXPERTS, MANIFEST, folder_of, hash_of, inside, read_manifest

    place = locate(library, token, [MANIFEST])
    entry = read_manifest(place).entry(name, f"library {library}")
    if place.revision is not None:
        locate(f"{place.id}@{place.revision}", token, [f"{EXPERTS}/{entry.folder}/*"])
    folder = folder_of(place, name, entry)
    for name_of_file in ADAPTER:
        file = inside(folder, name_of_file)
        if hash_of(file) != entry.sha256.get(file.name):
            raise CoterieError("was changed since it was added to the library", str(file), "add the expert again")
    return Location(folder, f"{library}#{name}", place.revision)


def kind_error(name: str, place: Location, theirs: str, first: str, kind: str, mend: str) -> CoterieError:
    """The error for an expert of another architecture than the base, or the first expert."""
    return CoterieError(f"is a {theirs!r} model, and {first} a {kind!r} model", f"expert {name!r} ({place.path})", mend)
