"""A library of experts: adapters of one base model, with what routers and retrieval need of each."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clusters import cluster, merge_clusters, train_clusters
    from .encoder import SentenceEncoder
    from .expert import Expert
    from .index import Index
    from .operations import known
    from .store import Library, create, open

_EXPORTS = {
    "Expert": "expert",
    "Index": "index",
    "Library": "store",
    "SentenceEncoder": "encoder",
    "cluster": "clusters",
    "create": "store",
    "known": "operations",
    "merge_clusters": "clusters",
    "open": "store",
    "train_clusters": "clusters",
}

__all__ = [
    "Expert",
    "Index",
    "Library",
    "SentenceEncoder",
    "cluster",
    "create",
    "known",
    "merge_clusters",
    "open",
    "train_clusters",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'coterie.library' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
