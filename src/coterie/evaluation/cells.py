"""Finished cells of a comparison, kept by content: what a model answered to which rows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .suite import digest


class Cells:
    """Arrays in a directory, one file for each key.

    Args:
        directory: made when the first cell is kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, key: tuple[object, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The cell of a key, computed only if it is not kept yet.

        Args:
            key: all that the cell depends on, as JSON values.
            compute: makes the cell.
        """
        path = self.directory / f"{digest(*key)[:32]}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        cell = compute()
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.directory)
        with os.fdopen(handle, "wb") as file:
            np.save(file, cell, allow_pickle=False)
        os.replace(partial, path)
        return cell
