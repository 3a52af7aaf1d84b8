"""Whether adapters were trained on the base that a recipe names, as far as that can be told here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..errors import CoterieError
from ..sources.adapter import AdapterExpert
from ..sources.checkpoint import Checkpoint
from ..sources.locate import Location
from ..sources.names import View

LOOKED_AT = 3  # adapted layers, from the first to the last; a fine-tune changes them all


def lineage_notes(where: Location, base: View, adapters: Iterable[AdapterExpert]) -> list[str]:
    """A sentence for each adapter whose configuration names another model than the base.

    One that is a directory here is another model if weights that the adapter adapts differ; of two Hub ids, the names
    tell. A name that leads nowhere says nothing: models move.

    Args:
        where: the base's place.
        base: its tensors, with an account of their own of what is read.
        adapters: of the recipe.
    """
    notes, opened = [], dict[str, View | None]()
    for adapter in adapters:
        said = adapter.config.get("base_model_name_or_path")
        if not isinstance(said, str) or not said or said == where.id:
            continue
        if Path(said).is_dir():
            if Path(said).resolve() == where.path.resolve():
                continue
            if said not in opened:
                opened[said] = _view(said, base)
            other = opened[said]
            name = next(_different(other, base, adapter.adapted), None) if other else None
            if name:
                notes.append(
                    f"expert {adapter.name!r} was trained on {said}, another model than the base: its {name} differs"
                )
        elif where.revision is not None and said.partition("@")[0] != where.id:
            notes.append(f"expert {adapter.name!r} says that it was trained on {said}, and the base is {where.id}")
    return notes


def _view(said: str, base: View) -> View | None:
    """The model that an adapter names; None where it cannot be read, which a build does not ask for."""
    try:
        return View(Checkpoint.open(Location(Path(said), said)), base.skeleton)
    except CoterieError:
        return None


def _different(other: View, base: View, paths: Iterable[str]) -> Iterator[str]:
    """Some of the adapted layers' weights, where they are not the same."""
    names = [f"{path}.weight" for path in paths if f"{path}.weight" in base]
    for name in {names[round(i * (len(names) - 1) / (LOOKED_AT - 1))]: None for i in range(LOOKED_AT if names else 0)}:
        if name not in other or not torch.equal(other.get(name), base.get(name)):
            yield name
