"""Loading a mixture directory."""

from __future__ import annotations

from typing import Any

from ..errors import CoterieError
from ..sources.locate import Location, locate


def read_spec(location: Location) -> dict[str, Any]:
    """The mixture's structure as its `config.json` holds it.

    Raises:
        CoterieError: not a mixture.
    """
    spec = (location.json("config.json") or {}).get("quantization_config")
    if not isinstance(spec, dict) or spec.get("quant_method") != "coterie":
        raise CoterieError("is not a coterie mixture", str(location.path), "build one with `coterie build`")
    return spec


def load(source: str, **kwargs: Any) -> Any:
    """Load a mixture, ready to run, in eval mode.

    Args:
        source: a mixture directory, or a Hub id (`id@revision`).
        **kwargs: what `from_pretrained` takes (`dtype`, `device_map`, `token`, ...), and for a light mixture `base`,
            where its base is if it has moved.

    Returns:
        The model, of the transformers class that it was built as.

    Raises:
        CoterieError: not a mixture, a damaged one, or a light one whose base is not the one it was built on.
    """
    import transformers
    from safetensors import SafetensorError

    location = locate(str(source), kwargs.get("token"))
    spec = read_spec(location)
    raw = location.json("config.json") or {}
    cls = getattr(transformers, (raw.get("architectures") or [""])[0], None)
    if cls is None:
        raise CoterieError(
            f"its class {raw.get('architectures')} is unknown to transformers {transformers.__version__}",
            str(source),
            "upgrade transformers",
        )
    base = kwargs.pop("base", None)
    if not spec.get("base"):
        if base is not None:
            raise CoterieError("holds its own base", str(source), "leave out base=")
        try:
            return cls.from_pretrained(location.path, **kwargs)
        except SafetensorError as error:
            raise CoterieError(f"is truncated or damaged ({error})", str(source), "build or fetch it again") from None

    from .light import read_light

    config, tensors = read_light(location, cls, spec["base"], base, kwargs.get("token"))
    model = cls.from_pretrained(None, config=config, state_dict=tensors, **kwargs)
    model.name_or_path = model.config.name_or_path = str(location.path)
    return model
