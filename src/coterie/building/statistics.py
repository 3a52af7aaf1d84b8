"""What routers hold of the experts' own data: statistics that lie beside the experts, checked, then read as needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CoterieError
from ..mixture.layer import widths
from ..sources.manifest import ADAPTER, hash_of
from ..sources.names import Skeleton
from ..sources.statistics import file_of, read
from .inputs import Inputs
from .kept import KeptExpert

HOW = {
    "gate": "train it: `coterie library train-gates`, or library.train_gates",
    "activation": "gather it: `coterie library average-activation`, or library.average_activation",
    "task": "add it with examples, and embed them: `coterie library embed --kind task`, or library.embed",
    "examples": "add it with examples, and embed them: `coterie library embed --kind examples`, or library.embed",
    "description": "add it with a description, and embed it: `coterie library embed --kind description`",
}
"""How an expert gets statistics of a kind."""


@dataclass
class RouterStatistics:
    """Statistics of one kind, of every expert.

    Attributes:
        kind: gate, activation; or task, examples, description (embeddings of texts).
        experts: their names.
        files: of each expert; or the expert itself, where a mixture holds it and its statistics.
        names: of each expert, module path in memory -> name in its file.
        digests: of each file's tensors.
        options: of embeddings: by what encoder, how wide, and how many each expert has.
    """

    kind: str
    experts: list[str]
    files: list[Path | KeptExpert] = field(default_factory=list)
    names: list[dict[str, str]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self, path: str, experts: Sequence[int]) -> Tensor:
        """(n, d_in), the vectors of a layer's experts.

        Raises:
            CoterieError: one has none for this layer.
        """
        for i in experts:
            if path not in self.names[i]:
                raise _lacking(self.kind, self.experts[i], path)
        return torch.stack([self._tensor(i, self.names[i][path]) for i in experts])

    def embeddings(self) -> Tensor:
        """(all that there are, width), the experts' text embeddings, expert by expert."""
        return torch.cat([self._tensor(i, "embedding") for i in range(len(self.files))])

    def _tensor(self, expert: int, name: str) -> Tensor:
        file = self.files[expert]
        if isinstance(file, KeptExpert):
            return (file.embeddings() if name == "embedding" else file.vector(name)).float()
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name).float()

    def keep(self, expert: KeptExpert) -> None:
        """Take an expert's statistics as a mixture holds them."""
        spec = expert.kept.spec
        self.files.append(expert)
        self.names.append({path: path for path, shape in spec.layers.items() if expert.index in shape.experts})
        if counts := spec.routing.score_options.get("counts"):
            self.options.setdefault("counts", []).append(counts[expert.index])


def find(kind: str, inputs: Inputs, layers: Sequence[str]) -> RouterStatistics:
    """The statistics of all experts, checked one after the other.

    Args:
        kind: which.
        inputs: the opened sources.
        layers: paths of the layers that may become mixture layers.

    Raises:
        CoterieError: an expert has none (says how to make them), or they are of other weights, layers or encoders.
    """
    found, encoders = RouterStatistics(kind, inputs.recipe.names), set()
    for expert in inputs.experts:
        if isinstance(expert, KeptExpert):
            found.keep(expert)
            if "encoder" in (known := expert.kept.spec.routing.score_options):
                encoders.add((known["encoder"], known["width"]))
            continue
        where, given = f"expert {expert.name!r}", inputs.recipe.experts[expert.name].statistics
        file = Path(given) if given else file_of(Path(expert.location), kind)
        if not file.is_file():
            what = f"no such file: {given}" if given else f"has no {kind!r} statistics"
            raise CoterieError(what, where, HOW[kind])
        tensors, facts = read(file)
        if facts.get("kind") != kind:
            raise CoterieError(
                f"{file} holds statistics of kind {facts.get('kind')}, and these must be {kind}", where, HOW[kind]
            )
        weights, made_of = Path(expert.location) / ADAPTER[1], facts.get("weights")
        if made_of and weights.is_file() and made_of != hash_of(weights):
            raise CoterieError(f"its {kind!r} statistics were made of other weights ({file})", where, HOW[kind])
        found.files.append(file)
        found.digests.append(facts["digest"])
        if "embedding" in tensors:
            encoders.add((facts.get("encoder", ""), tensors["embedding"].shape[1]))
            found.options.setdefault("counts", []).append(len(tensors["embedding"]))
            continue
        names = {_in_memory(inputs, name): name for name in tensors}
        found.names.append(names)
        for path in layers:
            width, bound = widths(inputs.skeleton.module(path))[0], expert.rank_bound(path)
            if path not in names and bound:
                raise _lacking(kind, expert.name, path)
            shape = list(tensors[names[path]].shape) if path in names else [width]
            if shape != [width]:
                raise CoterieError(
                    f"its {kind!r} statistics have shape {shape} for {path!r}, and the layer asks for {[width]}",
                    where,
                    HOW[kind],
                )
    if len(encoders) > 1:
        raise CoterieError(
            f"the experts' embeddings are by several encoders ({', '.join(sorted(name for name, _ in encoders))})",
            "experts",
            "embed all by one",
        )
    for encoder, width in encoders:
        found.options |= {"encoder": encoder, "width": width}
    return found


def _lacking(kind: str, expert: str, path: str) -> CoterieError:
    return CoterieError(f"its {kind!r} statistics have no vector for {path!r}", f"expert {expert!r}", HOW[kind])


def _in_memory(inputs: Inputs, path: str) -> str:
    """A module path of an expert's architecture, as it is in that of the mixture."""
    if not isinstance(inputs.skeleton, Skeleton):
        return path
    return inputs.skeleton.layer_in_memory(path)
