"""coterie: a base model and its fine-tuned experts, as one mixture-of-experts model.

Importing this package is cheap (torch and transformers are imported when used) and makes transformers able to
load mixtures, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from .errors import CoterieError

__version__ = "0.1.0"

_EXPORTS = {
    "add_experts": "coterie.building.extend",
    "build": "coterie.building.build",
    "plan": "coterie.building.build",
    "BuildReport": "coterie.building.report",
    "compress": "coterie.building.compress",
    "extract": "coterie.building.extract_adapter",
    "extract_expert": "coterie.building.extract",
    "merge": "coterie.merging.merge",
    "MergeReport": "coterie.merging.report",
    "lorahub": "coterie.methods.lorahub",
    "smile": "coterie.methods.smile",
    "load": "coterie.mixture.load",
    "MixtureConfig": "coterie.training.wrap",
    "routing_trace": "coterie.mixture.trace",
    "Recipe": "coterie.recipe",
    "library": "coterie.library",
    "remove_experts": "coterie.building.extend",
    "methods": "coterie.methods",
    "train": "coterie.training.train",
    "watch": "coterie.training.log",
    "wrap": "coterie.training.wrap",
}

if TYPE_CHECKING:
    from .building.build import build, plan
    from .building.compress import compress
    from .building.extend import add_experts, remove_experts
    from .building.extract import extract_expert
    from .building.extract_adapter import extract
    from .building.report import BuildReport
    from .merging.merge import merge
    from .merging.report import MergeReport
    from .methods.lorahub import lorahub
    from .methods.smile import smile
    from .mixture.load import load
    from .mixture.trace import routing_trace
    from .recipe import Recipe
    from .training.log import watch
    from .training.train import train
    from .training.wrap import MixtureConfig, wrap

__all__ = [
    "BuildReport",
    "CoterieError",
    "MergeReport",
    "MixtureConfig",
    "Recipe",
    "add_experts",
    "build",
    "compress",
    "extract",
    "extract_expert",
    "library",
    "load",
    "lorahub",
    "merge",
    "methods",
    "plan",
    "remove_experts",
    "routing_trace",
    "smile",
    "train",
    "watch",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    module = importlib.import_module(_EXPORTS[name])
    return module if name in ("library", "methods") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


def _register_with_transformers(_module: Any) -> None:
    importlib.import_module("coterie.mixture.hub")


register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
