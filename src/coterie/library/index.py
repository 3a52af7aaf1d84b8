"""Retrieval: the experts whose vectors are nearest to one, without looking at all of them where there are many."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import isqrt
from typing import Any

import numpy as np

from ..errors import CoterieError

# Up to so many vectors, looking at all of them is cheap, and exact (benchmarks/library.py measures both).
EXACT = 2**12
PROBED = 32


class Index:
    """Vectors, each an expert's, and the search for the nearest by cosine.

    Up to `EXACT` vectors all are looked at. Above, an inverted file (Jégou et al. 2011, doi:10.1109/TPAMI.2010.57, by
    faiss) of 2 sqrt(n) cells is, of which the nearest `PROBED` are: both that and the choice of cells cost O(sqrt(n)).

    Args:
        vectors: (n, d); what is zero is nearest to nothing.
        owners: of each vector, the name of its expert.
        exact: whether all are looked at; default: by their number.

    Raises:
        CoterieError: there are none, shapes differ, or an index is needed and faiss is missing.
    """

    def __init__(self, vectors: np.ndarray[Any, Any], owners: Sequence[str], exact: bool | None = None):
        self.owners = list(owners)
        if not self.owners or vectors.ndim != 2 or len(vectors) != len(self.owners):
            raise CoterieError(
                f"{len(self.owners)} owners and vectors of shape {list(vectors.shape)}", "index", "give one for each"
            )
        self.vectors = _unit(vectors)
        self.exact = len(vectors) <= EXACT if exact is None else exact
        self._experts = len(set(self.owners))
        self._cells = None if self.exact else _cells(self.vectors)

    def nearest(self, vector: Any, k: int = 1) -> list[tuple[str, float]]:
        """The `k` experts with the vectors nearest to one, and their cosines, the nearest first.

        Args:
            vector: (d,) numbers.
            k: how many; all experts where there are fewer. An expert counts by its nearest vector.

        Raises:
            CoterieError: the vector has another length, or k is no positive number.
        """
        query = np.asarray(vector, dtype=np.float32)
        if query.shape != self.vectors.shape[1:]:
            raise CoterieError(
                f"vector of shape {list(query.shape)}", "nearest", f"give {self.vectors.shape[1]} numbers"
            )
        if k < 1:
            raise CoterieError(f"k is {k}", "nearest", "give a positive number")
        query, k = _unit(query[None]), min(k, self._experts)
        wanted, cells = k, PROBED
        while True:  # an expert may own many of the nearest vectors
            scores, rows = self._search(query, wanted, cells)
            found: dict[str, float] = {}
            for score, row in zip(scores, rows, strict=True):
                found.setdefault(self.owners[row], float(score))
            if len(found) >= k or len(rows) == len(self.owners):
                return list(found.items())[:k]
            wanted, cells = min(4 * wanted, len(self.owners)), 4 * cells

    def _search(self, query: Any, wanted: int, cells: int) -> tuple[Any, Any]:
        """Cosines and rows of the `wanted` nearest vectors, in order."""
        if self._cells is None:
            scores = self.vectors @ query[0]
            rows = np.argpartition(-scores, wanted - 1)[:wanted] if wanted < len(scores) else np.arange(len(scores))
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            return scores[rows], rows
        how = _faiss().SearchParametersIVF(nprobe=min(cells, self._cells.nlist))
        scores, rows = self._cells.search(query, wanted, params=how)
        held = rows[0] >= 0
        return scores[0][held], rows[0][held]


def _unit(vectors: Any) -> Any:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _cells(vectors: Any) -> Any:
    """The inverted file: cells by spherical k-means from a seed of its own, so that the same vectors make the same."""
    faiss = _faiss()
    quantizer = faiss.IndexFlatIP(vectors.shape[1])
    cells = faiss.IndexIVFFlat(quantizer, vectors.shape[1], 2 * isqrt(len(vectors)), faiss.METRIC_INNER_PRODUCT)
    cells.cp.niter, cells.cp.max_points_per_centroid, cells.cp.min_points_per_centroid = 10, 64, 1
    cells.train(vectors)
    cells.add(vectors)
    return cells


def _faiss() -> Any:
    try:
        return import_module("faiss")
    except ImportError:
        raise CoterieError(
            "an index of many vectors needs faiss",
            "nearest",
            "run: pip install 'coterie[library]', or look at all of them with exact=True",
        ) from None
