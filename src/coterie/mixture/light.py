"""The light form: a mixture that holds only what is not its base's, read together with that base."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CoterieError
from ..sources.checkpoint import Checkpoint
from ..sources.locate import Location, locate
from ..sources.names import Skeleton, View


def read_light(
    location: Location, cls: Any, named: dict[str, Any], base: str | None, token: str | None
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The configuration and all tensors of a light mixture.

    Args:
        location: the light mixture's directory.
        cls: the transformers class that it was built as.
        named: the base's id, revision and fingerprint; one without a fingerprint is taken as it is.
        base: where the base is instead, if it has moved.
        token: Hub token.

    Raises:
        CoterieError: the base is not the one that the mixture was built on.
    """
    source = base or (f"{named['id']}@{named['revision']}" if named["revision"] else named["id"])
    if not source:
        raise CoterieError(
            "holds only what was trained, of a base that came from no directory",
            str(location.path),
            "say where the base is: coterie.load(DIR, base=PATH_OR_HUB_ID)",
        )
    config = cls.config_class.from_pretrained(location.path)
    spec = dict(config.quantization_config)
    own = Checkpoint.open(location)
    beneath = (locate(source, token).json("config.json") or {}).get("quantization_config") or {}
    if beneath.get("quant_method") == "coterie":  # a mixture that was trained further
        config.quantization_config = {**spec, "base": None}
        if beneath.get("base"):
            tensors = read_light(locate(source, token), cls, beneath["base"], None, token)[1]
        else:
            whole = Checkpoint.open(locate(source, token))
            tensors = {name: whole.read(name) for name in whole.tensors}
        return config, tensors | {name: own.read(name) for name in own.tensors}
    view = base_view(locate(source, token), cls, config)
    skeleton = view.skeleton
    if named["fingerprint"] not in (None, view.fingerprint()):
        raise CoterieError(
            f"its base is not the one at {source} (their fingerprints differ)",
            str(location.path),
            "give the right one: coterie.load(DIR, base=PATH_OR_HUB_ID@REVISION)",
        )
    tensors = {name: own.read(name) for name in own.tensors}
    replaced = {skeleton.in_memory(name)[0] for name in tensors}
    for name in skeleton.tensors:
        kept_per_expert = any(name.startswith(f"{path}.") for path in spec["heads"])
        if name in view and name not in replaced and not kept_per_expert:
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in spec["layers"]:
                tensors |= skeleton.on_disk({f"{path}.base_weight": view.get(name)})
            else:
                tensors |= {disk: view.checkpoint.read(disk) for disk in view.names_on_disk(name)}
    config.quantization_config = {**spec, "base": None}
    return config, tensors


def base_view(location: Location, cls: Any, config: Any) -> View:
    """The base's tensors, as a class of transformers with the labels of a configuration names them."""
    import transformers

    plain = cls.config_class.from_pretrained(location.path)
    plain.id2label, plain.label2id = config.id2label, config.label2id
    return View(Checkpoint.open(location), Skeleton(getattr(transformers, cls.__name__), plain))
