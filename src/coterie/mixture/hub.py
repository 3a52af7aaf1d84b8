"""How transformers loads a mixture: the registrable quantizer hook, which may replace modules before weights load.

Importing this module registers the hook. It is imported by a post-import hook on `transformers.quantizers.auto`, so
nothing here may import transformers' modeling code at the top.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CoterieError


@register_quantization_config("coterie")
class CoterieConfig(QuantizationConfigMixin):
    """The mixture's structure inside `config.json` (see `coterie.mixture.spec.MixtureSpec`)."""

    def __init__(self, quant_method: str = "coterie", **spec: Any):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.spec = spec

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **copy.deepcopy(self.spec)}


@register_quantizer("coterie")
class CoterieLoader(HfQuantizer):
    """Puts the mixture layers into the architecture before its weights load; quantises nothing."""

    requires_calibration = False
    quantization_config: CoterieConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Runs before the model is built: lift the guards that keep everyone else from building a dense model."""
        if not self.pre_quantized:
            raise CoterieError("is no way to load a dense model", "CoterieConfig", "use coterie.build")
        from .handle import GUARD

        if self.quantization_config.spec.get("base"):
            raise CoterieError(
                "this is a light mixture: it holds only what is not its base's",
                config.name_or_path or None,
                "load it with coterie.load",
            )
        if config._experts_implementation == GUARD:
            config._experts_implementation = None
        if config._attn_implementation == GUARD:
            config._attn_implementation = None
        return config

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        from .spec import MixtureSpec, insert

        spec = MixtureSpec.from_dict(self.quantization_config.spec)
        missing = [p for p in (*spec.layers, *spec.heads) if not _has(model, p)]
        if missing:
            raise CoterieError(
                f"{type(model).__name__} has no module {missing[0]!r}, which is a mixture layer",
                model.name_or_path,
                f"load it as {(model.config.architectures or ['its own class'])[0]}",
            )
        try:
            insert(model, spec)
        except (AttributeError, KeyError) as error:
            raise CoterieError(
                f"its structure does not fit a {type(model).__name__} ({error})",
                model.name_or_path,
                f"load it as {(model.config.architectures or ['its own class'])[0]}",
            ) from None

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        from .handle import attach
        from .spec import MixtureSpec

        # The mark that loading leaves would make Trainer refuse the model as "purely quantized".
        self.remove_quantization_config(model)
        for mark in ("is_quantized", "quantization_method"):
            model.__dict__.pop(mark, None)
        attach(model, MixtureSpec.from_dict(self.quantization_config.spec))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _has(model: Any, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
