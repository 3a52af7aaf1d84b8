"""Clusters of a library's experts, by the likeness of their parameters (MBC: Ostapenko et al. 2024)."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_cosine_schedule_with_warmup

from ..building.directory import whole_directory
from ..building.lora import write_adapter
from ..errors import CoterieError
from ..merging.statistics import moved
from ..sources.names import Skeleton
from ..training.wrap import MixtureConfig, wrap
from .expert import Expert
from .store import LOCK, Library, create, open
from .vectors import WARMUP, Loss, again, put_saved, without_loss

Array = np.ndarray[Any, np.dtype[Any]]


def cluster(
    library: Library, clusters: int = 10, *, keep: float = 0.2, dimensions: int = 64, seed: int = 42
) -> list[list[str]]:
    """Names of the experts of each cluster: model-based clustering (MBC, arXiv:2405.11157, section 3.2).

    KMeans (ten starts) on `embeddings`. The authors then train one expert for each cluster, on the data of all of its
    tasks: `train_clusters`; `merge_clusters` needs no data.

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

    def fill(made: Library, cluster: str, names: Sequence[str], about: dict[str, Any]) -> None:
        how: dict[str, Any] = {"rank": rank, "of": library, **about}
        if len(names) == 1:
            made.combine(cluster, "scale", names, factor=1.0, **how)
        else:
            made.combine(cluster, "add", names, scale=1 / len(names), **how)

    return _library_of(library, clusters, out, fill)


def train_clusters(
    library: Library,
    clusters: Sequence[Sequence[str]],
    out: str | Path,
    model: Any,
    batches: Mapping[str, Iterable[Any]],
    *,
    rank: int | None = None,
    steps: int = 1000,
    learning_rate: float = 5e-4,
    loss: Loss | None = None,
    seed: int = 0,
) -> Library:
    """A new library with one expert for each cluster, trained on the data of all of its experts (MBC, section 3.2).

    A fresh LoRA in every layer that any of them adapts, with alpha = rank; batches of the experts in turn; AdamW after
    a warm-up over 6% of the steps, on a cosine to zero. A head that all experts of a cluster share is put in; the
    model's own, where they have none, is trained along. A cluster of one keeps its expert as it is.

    Args:
        library: of the experts.
        clusters: names of each one's experts, as of `cluster`.
        out: the new library's directory; it appears when it is complete.
        model: the base, with whatever head the loss needs; stays as it is.
        batches: name of an expert -> batches of its data, as of `Library.train_gates`.
        rank: of the new experts; default: the largest in the cluster.
        steps: of each training, one for each of a cluster's experts at least.
        learning_rate: its peak.
        loss: (model, batch) -> the batch's mean loss; None: the model's own, of batches with labels.
        seed: of the fresh experts.

    Raises:
        CoterieError: an unknown name, an empty cluster, an expert of a cluster without batches, experts of a cluster
            with heads that differ, a model that no adapter can be written for, a number out of range, or `out` exists.
    """
    import transformers

    if not hasattr(transformers, type(model).__name__):
        raise CoterieError(
            f"{type(model).__name__} is no class of transformers", "train_clusters", "give a model of one, and a loss"
        )
    if (rank is not None and rank < 1) or steps < max(map(len, clusters), default=1):
        raise CoterieError(
            f"rank is {rank} and steps {steps}", "train_clusters", "take a step for each expert at least"
        )
    heads = {tuple(names): _common_head([library[name] for name in names]) for names in clusters if len(names) > 1}
    lacking = [name for names in clusters if len(names) > 1 for name in names if name not in batches]
    if lacking:
        raise CoterieError("it has no batches", f"expert {lacking[0]!r}", "give some of its own data")

    def fill(made: Library, cluster: str, names: Sequence[str], about: dict[str, Any]) -> None:
        if len(names) == 1:
            made.combine(cluster, "scale", names, factor=1.0, of=library, **about)
            return
        experts = [library[name] for name in names]
        ranks = [layer.rank for expert in experts for layer in expert.layers.values()]
        skeleton = Skeleton(type(model), model.config)
        paths = {skeleton.layer_in_memory(path): None for expert in experts for path in expert.layers}
        how = MixtureConfig(
            method="single", experts=[cluster], parameters={"rank": max(ranks) if rank is None else rank},
            modules={"include": list(paths), "exclude": []}, also_train=[] if heads[tuple(names)] else None, seed=seed,
        )  # fmt: skip
        mixture = wrap(model, how)
        if heads[tuple(names)]:
            put_saved(mixture, experts[0])
        data = [again(batches[name], name) for name in names]
        weights = [p for p in mixture.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(weights, learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimiser, math.ceil(WARMUP * steps), steps)
        for step in range(steps):
            batch = next(data[step % len(data)])
            found = loss(mixture, batch) if loss else mixture(**moved(batch, mixture)).loss
            if found is None:
                raise without_loss(names[step % len(data)])
            found.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(mixture.eval(), 0, made.base.source, Path(folder) / "adapter", False, None)
            made.add(cluster, Path(folder) / "adapter", base=made.base.source, **about)

    return _library_of(library, clusters, out, fill)


def _common_head(experts: Sequence[Expert]) -> bool:
    """Whether experts hold modules whole, all the same.

    Raises:
        CoterieError: they hold some that differ.
    """
    first, *others = experts
    for other in others:
        same = first.saved.keys() == other.saved.keys() and all(
            torch.equal(first.checkpoint.read(disk), other.checkpoint.read(other.saved[name]))
            for name, disk in first.saved.items()
        )
        if not same:
            raise CoterieError(
                f"its head is not that of {first.name!r}", f"expert {other.name!r}", "cluster experts of one head"
            )
    return bool(first.saved)


def _library_of(
    library: Library,
    clusters: Sequence[Sequence[str]],
    out: str | Path,
    fill: Callable[[Library, str, Sequence[str], dict[str, Any]], None],
) -> Library:
    """A new library of the same base, whole or not at all, into which `fill` puts each cluster's expert."""
    if not clusters or not all(clusters):
        raise CoterieError("there is an empty cluster", str(out), "name experts in each")
    for name in (name for names in clusters for name in names):
        library[name]  # whatever is wrong shows before anything is written
    base = library.base
    with whole_directory(Path(out), sources=[library.path]) as folder:
        made = create(folder / "library", base.source)
        if made.base.fingerprint != base.fingerprint:
            raise CoterieError("is not the library's base any more", base.source, "restore it")
        for number, names in enumerate(clusters):
            examples = [text for name in names for text in library[name].examples]
            fill(made, f"cluster {number}", names, {"description": f"of {', '.join(names)}", "examples": examples})
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
