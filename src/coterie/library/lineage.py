"""The model that a library's experts were tuned from, and whether another is the same: by fingerprints, once each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..building.inputs import open_inputs
from ..errors import CoterieError
from ..recipe import read_recipe
from ..sources.locate import PATTERNS, Location, locate
from ..sources.manifest import ADAPTER, Base


def base_of(source: str, place: Location, token: str | None) -> Base:
    """What a manifest says of a base, whose tensors are hashed now.

    Args:
        source: directory or Hub id.
        place: the same, located.
        token: Hub token.
    """
    return Base(
        id=place.id if place.revision else str(place.path.resolve()),
        revision=place.revision,
        fingerprint=fingerprint(source, token),
        files=files_of(place),
    )


class Lineage:
    """Holds bases against a library's.

    Args:
        base: what the library's manifest says of its base.
        where: the library, in messages.
        token: Hub token.
    """

    def __init__(self, base: Base, where: str, token: str | None):
        self.base, self._where, self._token = base, where, token
        self._fingerprints: dict[Any, str] = {}
        self._here: str | None = None

    def here(self) -> str:
        """Where the base is: where it was last found to be the same.

        Raises:
            CoterieError: it is gone, or not the same any more.
        """
        if self._here is None:
            self.require(None, self.base.source)
        return self._here or self.base.source

    def require(self, name: str | None, source: str) -> None:
        """Compare a base with the library's: that of an expert, or (name None) the library's own, where it is now.

        Raises:
            CoterieError: it is another.
        """
        place, ours = locate(source, self._token), self.base
        files = files_of(place)
        at_home = place.path.resolve() == Path(ours.id) and files == ours.files and not place.revision
        if not at_home and (place.id, place.revision) != (ours.id, ours.revision or ""):
            key = str(place.path.resolve()), json.dumps(files)
            if key not in self._fingerprints:
                self._fingerprints[key] = fingerprint(source, self._token)
            if self._fingerprints[key] != ours.fingerprint:
                raise CoterieError(
                    f"its base {source} has the fingerprint {self._fingerprints[key][:12]}, and the base that the "
                    f"library was made for {ours.fingerprint[:12]}",
                    self._where if name is None else f"expert {name!r}",
                    "restore that base" if name is None else "use experts of the library's base",
                )
        self._here = source

    def require_of(self, name: str, place: Location) -> None:
        """Hold the base that an adapter's configuration names against the library's.

        Raises:
            CoterieError: it is another, or not here to be compared.
        """
        config = place.json(ADAPTER[0]) or {}
        source, revision = config.get("base_model_name_or_path"), config.get("revision")
        if isinstance(source, str) and source:
            if source == self.base.id and revision in (None, self.base.revision):
                source = self.base.source
            if source == self.base.source or Path(source).expanduser().is_dir():
                return self.require(name, source)
        raise CoterieError(
            f"its base {source!r} is not here to be compared with the library's ({self.base.source})",
            f"expert {name!r}",
            "say with base (--base) where it is",
        )


def fingerprint(base: str, token: str | None) -> str:
    """Of a base under the names of the class that its own config.json names: the base is opened as its own expert."""
    recipe = read_recipe({"method": "library", "base": base, "experts": {"base": base}})
    return open_inputs(recipe, token).stored.fingerprint()


def files_of(place: Location) -> dict[str, list[int]]:
    """Sizes and times of change of a directory's files; nothing of what a revision pins."""
    files = [] if place.revision else sorted({f for pattern in PATTERNS for f in place.path.glob(pattern)})
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
