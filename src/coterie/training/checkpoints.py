"""What the Trainer's checkpoints hold: what training changes, and no copy of the base."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

CHECKPOINT = re.compile(r"checkpoint-\d+")


class SavePretrained:
    """Stands in place of a wrapped model's `save_pretrained`.

    The Trainer saves checkpoints through it, into directories named `checkpoint-STEP`: these hold only the parameters
    that are trained, and their configuration says so, as a light mixture's does. Any other directory is complete.

    Args:
        model: the mixture.
    """

    def __init__(self, model: Any):
        self.model = model
        self.use_cache = getattr(model.config, "use_cache", None)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        save = type(model).save_pretrained
        if not CHECKPOINT.fullmatch(Path(save_directory).name):
            return save(model, save_directory, *args, **kwargs)
        config, ignored = model.config, model._keys_to_ignore_on_save
        complete, cached = config.quantization_config, getattr(config, "use_cache", None)
        from ..mixture.hub import CoterieConfig

        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        # buffers (of annealing routers, of batch norms) are state of the training as well
        kept = trained | {name for name, _ in model.named_buffers()}
        try:
            config.quantization_config = CoterieConfig(**{**model.coterie.spec.to_dict(), "base": self.base})
            model._keys_to_ignore_on_save = {*(ignored or ()), *(set(model.state_dict()) - kept)}
            if cached is not None:
                config.use_cache = self.use_cache  # the Trainer switches it off, and would have it saved so
            return save(model, save_directory, *args, **kwargs)
        finally:
            config.quantization_config, model._keys_to_ignore_on_save = complete, ignored
            if cached is not None:
                config.use_cache = cached

    @cached_property
    def base(self) -> dict[str, str | None]:
        """The base's id, and what tells it from another: its revision on the Hub, or the fingerprint of its files."""
        import transformers

        from ..mixture.light import base_view
        from ..sources.locate import Location
        from .finish import is_mixture

        model, name = self.model, self.model.name_or_path or ""
        found: dict[str, str | None] = {"id": name, "revision": None, "fingerprint": None}
        if not name or not Path(name).is_dir():
            return {**found, "revision": getattr(model.config, "_commit_hash", None) if name else None}
        place = Location(Path(name), name)
        with suppress(Exception):  # what cannot be read costs the check, and not the run
            if hasattr(transformers, type(model).__name__) and not is_mixture(place):
                view = base_view(place, type(model), model.config)
                if any(tensor in view for tensor in view.skeleton.tensors):
                    found["fingerprint"] = view.fingerprint()
        return found


def forgive(model: Any, keys: Any) -> None:
    """A checkpoint lacks what is frozen, which its model has: only what else is missing is worth a word.

    Args:
        model: a wrapped model whose `load_state_dict` has run.
        keys: torch's account of it, changed in place.
    """
    frozen = {name for name, tensor in model.state_dict(keep_vars=True).items() if not tensor.requires_grad}
    if not set(keys.missing_keys) - (frozen - {name for name, _ in model.named_buffers()}):
        keys.missing_keys.clear()
