"""Finished cells of a comparison, kept by content: what a model scored on which rows, what a build cost."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .suite import digest


class Cells:
    """JSON values in a directory, one file for each key.

    Args:
        directory: made when the first cell is kept.
        warn: told of the first cell that is damaged, and so computed anew.
    """

    def __init__(self, directory: Path, warn: Callable[[str], None] = lambda text: None) -> None:
        self.directory, self.warn = directory, warn

    def get(self, key: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """The cell of a key, computed only if it is not kept yet, and kept in one step.

        Args:
            key: all that the cell depends on, as JSON values.
            compute: makes the cell, a JSON value.
        """
        path = self.directory / f"{digest(*key)[:32]}.json"
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if kept["sha256"] == digest(kept["value"]):
                    return kept["value"]
            except (ValueError, TypeError, KeyError):
                pass
            self.warn(f"{path} is damaged; what it and any other such held is computed anew")
            self.warn = lambda text: None
        cell = compute()
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key, "value": cell, "sha256": digest(cell)}))
        return cell


def write_whole(file: Path, text: str) -> None:
    """Write a text, which appears whole or not at all, and replaces what was there."""
    handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            opened.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
