"""Whether adapters were trained on the base that a recipe names, as far as their configurations tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import CoterieError
from ..sources.adapter import AdapterExpert
from ..sources.checkpoint import Checkpoint
from ..sources.experts import same
from ..sources.locate import HUB_ID, Location
from ..sources.names import View

LOOKED_AT = 3  # adapted layers, from the first to the last; a fine-tune changes them all


def base_notes(where: Location, base: View, adapters: Iterable[AdapterExpert]) -> list[str]:
    """A sentence for each adapter whose configuration names another model than the base.

    One that is a directory here is another model if weights that the adapter adapts differ, but for their dtype; of two
    Hub ids, the repositories' names tell, whoever owns them. A path that leads nowhere says nothing: models move.

    Args:
        where: the base's place.
        base: its tensors, with an account of their own of what is read.
        adapters: of the recipe.
    """
    notes, differ = [], dict[tuple[str, str], bool]()
    for adapter in adapters:
        said = adapter.config.get("base_model_name_or_path")
        if not isinstance(said, str) or not said or said == where.id:
            continue
        if Path(said).is_dir():
            if Path(said).resolve() == where.path.resolve():
                continue
            for name in _some(adapter.adapted, base):
                if (said, name) not in differ:
                    differ[said, name] = _differ(said, name, base)
                if differ[said, name]:
                    what = f"another model than the base: its {name} differs"
                    notes.append(f"expert {adapter.name!r} was trained on {said}, {what}")
                    break
        elif where.revision is not None and HUB_ID.fullmatch(said) and _repository(said) != _repository(where.id):
            notes.append(f"expert {adapter.name!r} says that it was trained on {said}, and the base is {where.id}")
    return notes


def _repository(id: str) -> str:
    return id.partition("@")[0].rpartition("/")[2]


def _some(paths: Iterable[str], base: View) -> list[str]:
    """Names of some of the adapted layers' weights."""
    names = [f"{path}.weight" for path in paths if f"{path}.weight" in base]
    at = {round(i * (len(names) - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT if names else 0)}
    return [names[i] for i in sorted(at)]


def _differ(said: str, name: str, base: View) -> bool:
    """Whether a tensor is another in the model that an adapter names; one that cannot be read does not tell."""
    try:
        other = View(Checkpoint.open(Location(Path(said), said)), base.skeleton)
        if name not in other:
            return True
        ours, theirs = base.get(name), other.get(name)
    except CoterieError:
        return False
    return ours.shape != theirs.shape or not (same(ours, theirs) or same(theirs, ours))
