"""Clusters of a library's experts, by the likeness of their parameters (MBC: Ostapenko et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..building.directory import whole_directory
from ..errors import CoterieError
from .store import LOCK, Library, create, open

Array = np.ndarray[Any, np.dtype[Any]]


def cluster(
    library: Library, clusters: int = 10, *, keep: float = 0.2, dimensions: int = 64, seed: int = 42
) -> list[list[str]]:
    """Names of the experts of each cluster: model-based clustering (MBC, arXiv:2405.11157, section 3.2).

    KMeans (ten starts) on `embeddings`. The authors then train one expert for each cluster, on the data of all of its
    tasks; `merge_clusters` needs no data.

    Args:
        library: of the experts.
        clusters: how many.
        keep, dimensions, seed: as of `embeddings`; the seed also of KMeans.

    Returns:
        Clusters in the order of their first experts, names in the library's order.

    Raises:
        CoterieError: there are fewer experts than clusters, a number is out of range, or scikit-learn is missing.
    """
    names = list(library)
    if not 1 <= clusters <= len(names):
        raise CoterieError(
            f"{clusters} clusters of {len(names)} experts", str(library.path), f"take 1 to {len(names)} clusters"
        )
    points = embeddings(library, keep=keep, dimensions=dimensions, seed=seed)
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    labels = KMeans(clusters, n_init=10, random_state=seed).fit_predict(points)
    found: dict[int, list[str]] = {}
    for name, label in zip(names, labels.tolist(), strict=True):
        found.setdefault(label, []).append(name)
    return list(found.values())


def embeddings(library: Library, *, keep: float = 0.2, dimensions: int = 64, seed: int = 42) -> Array:
    """(experts, dimensions at most) float64, unit rows: each expert's parameters, sparse, in few dimensions.

    An expert's factors, as they are stored, make one vector, zeros where it has a smaller rank or leaves a layer alone.
    Of each vector the elements of the largest magnitude are kept, and all go through a truncated SVD.

    Args:
        library: of the experts.
        keep: share of an expert's parameters that is kept, above 0.
        dimensions: of the truncated SVD.
        seed: of its randomised range finder.

    Raises:
        CoterieError: a number is out of range, two experts' layers do not fit each other, or scikit-learn is missing.
    """
    if not 0 < keep <= 1 or dimensions < 1:
        raise CoterieError(
            f"keep is {keep} and dimensions {dimensions}", "cluster", "keep a share, in 1 dimension or more"
        )
    try:
        from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
        from sklearn.decomposition import TruncatedSVD  # type: ignore[import-untyped]
    except ImportError:
        raise CoterieError("scikit-learn is not installed", "cluster", "pip install 'coterie[library]'") from None
    places, width = _places(library)
    data, columns, ends = [], [], [0]
    for name in library:
        values, at = _sparse(library, name, places, keep)
        data.append(values)
        columns.append(at)
        ends.append(ends[-1] + len(values))
    matrix = csr_matrix((np.concatenate(data), np.concatenate(columns), ends), shape=(len(ends) - 1, width))
    few = min(dimensions, *matrix.shape)
    points = TruncatedSVD(few, random_state=seed).fit_transform(matrix).astype(np.float64)
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return points / np.where(lengths > 0, lengths, 1)


def merge_clusters(
    library: Library, clusters: Sequence[Sequence[str]], out: str | Path, *, rank: int | None = None
) -> Library:
    """A new library with one expert for each cluster, the mean of its experts' deltas: MBC without data.

    Args:
        library: of the experts.
        clusters: names of each one's experts, as of `cluster`.
        out: the new library's directory; it appears when it is complete.
        rank: that each mean is recompressed to; None keeps it exact, at the sum of the ranks.

    Raises:
        CoterieError: an unknown name, an empty cluster, experts that cannot be added, or `out` exists.
    """
    if not clusters or not all(clusters):
        raise CoterieError("there is an empty cluster", "merge_clusters", "name experts in each")
    for name in (name for names in clusters for name in names):
        library[name]  # whatever is wrong shows before anything is written
    base = library.base
    source = f"{base.id}@{base.revision}" if base.revision else base.id
    with whole_directory(Path(out), sources=[library.path]) as folder:
        made = create(folder / "library", source)
        if made.base.fingerprint != base.fingerprint:
            raise CoterieError("is not the library's base any more", source, "restore it")
        for number, names in enumerate(clusters):
            examples = [text for name in names for text in library[name].examples]
            about = f"of {', '.join(names)}"
            how: Mapping[str, Any] = {"rank": rank, "description": about, "examples": examples, "of": library}
            if len(names) == 1:
                made.combine(f"cluster {number}", "scale", names, factor=1.0, **how)
            else:
                made.combine(f"cluster {number}", "add", names, scale=1 / len(names), **how)
        (made.path / LOCK).unlink(missing_ok=True)
        for each in list(made.path.iterdir()):
            each.rename(folder / each.name)
        made.path.rmdir()
    return open(out)


def _places(library: Library) -> tuple[dict[tuple[str, str], tuple[int, int]], int]:
    """(layer, side) -> where its elements begin in an expert's vector, and its width; and how long vectors are."""
    most: dict[tuple[str, str], tuple[int, int]] = {}
    for name in library:
        for path, layer in library[name].layers.items():
            for side, width in (("up", layer.shape[0]), ("down", layer.shape[1])):
                rank, before = most.get((path, side), (0, width))
                if before != width:
                    raise CoterieError(
                        f"layer {path!r} is {width} wide there, and {before} in others", f"expert {name!r}",
                        "cluster experts of one class",
                    )  # fmt: skip
                most[path, side] = max(rank, layer.rank), width
    places, end = {}, 0
    for key, (rank, width) in most.items():
        places[key] = end, width
        end += rank * width
    return places, end


def _sparse(
    library: Library, name: str, places: Mapping[tuple[str, str], tuple[int, int]], keep: float
) -> tuple[Array, Array]:
    """An expert's largest parameters, float32, and their places."""
    expert, values, at = library[name], [], []
    for path, layer in expert.layers.items():
        for side, disk in (("up", layer.up), ("down", layer.down)):
            tensor = expert.checkpoint.read(disk).float()
            rows = (tensor if side == "down" else tensor.T).flatten()
            values.append(rows)
            at.append(places[path, side][0] + torch.arange(len(rows)))
    flat, where = torch.cat(values), torch.cat(at)
    kept = flat.abs().topk(max(1, round(keep * len(flat)))).indices.sort().values
    order = where[kept].argsort()
    return flat[kept][order].numpy(), where[kept][order].numpy()
