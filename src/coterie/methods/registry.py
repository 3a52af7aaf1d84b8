"""The registry of methods: name, citation, parameters; help, docs and validation are generated from it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from ..errors import CoterieError
from ..experts.fit import TruncatedSVD
from ..recipe import nearest
from ..routing.router import Routing


@dataclass(frozen=True)
class Mixture:
    """An assembly: where experts come from, and how a layer routes to them.

    Attributes:
        experts: makes a layer's bank from the experts' deltas.
        routing: score and selection.
    """

    experts: TruncatedSVD
    routing: Routing


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: what recipes and the command line call it.
        cite: authors, year, arXiv id.
        assemble: parameters -> assembly; its annotations are the parameters' types and ranges.
    """

    name: str
    cite: str
    assemble: Callable[..., Mixture]

    @property
    def summary(self) -> str:
        """One line of what it does."""
        return (inspect.getdoc(self.assemble) or "").splitlines()[0]

    def describe(self) -> list[dict[str, Any]]:
        """Each parameter's name, type, default and meaning."""
        schema = self._model().model_json_schema()["properties"]
        return [
            {"name": name, "default": p.default, "type": _type_of(schema[name]), "meaning": schema[name]["description"]}
            for name, p in inspect.signature(self.assemble).parameters.items()
        ]

    def parameters(self, given: dict[str, Any], experts: int) -> dict[str, Any]:
        """All parameters, the given ones checked and the others at their defaults.

        Raises:
            CoterieError: an unknown parameter, a value out of range, or `top_k` above the number of experts.
        """
        model = self._model()
        for name in given:
            if name not in model.model_fields:
                raise CoterieError(
                    f"unknown parameter {name!r}", f"method {self.name}", nearest(name, list(model.model_fields))
                )
        try:
            values = model.model_validate(given).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            wanted = _type_of(model.model_json_schema()["properties"][name])
            raise CoterieError(f"{name} is {given[name]!r}", f"method {self.name}", f"it must be {wanted}") from None
        if values.get("top_k", 1) > experts:
            raise CoterieError(
                f"top_k is {values['top_k']} and there are {experts} experts", f"method {self.name}", "lower top_k"
            )
        return values

    def _model(self) -> Any:
        hints = typing.get_type_hints(self.assemble, include_extras=True)
        fields: Any = {n: (hints[n], p.default) for n, p in inspect.signature(self.assemble).parameters.items()}
        return create_model(self.name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_type_of(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f'"{v}"' for v in schema.get("enum", [schema.get("const")]))
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    return {"integer": "a whole number"}.get(schema["type"], schema["type"]) + (f" >= {low}" if low is not None else "")


_METHODS: dict[str, Method] = {}


def method(name: str, cite: str) -> Callable[[Callable[..., Mixture]], Callable[..., Mixture]]:
    """Register the decorated assembly under `name`."""

    def register(assemble: Callable[..., Mixture]) -> Callable[..., Mixture]:
        _METHODS[name] = Method(name, cite, assemble)
        return assemble

    return register


def known() -> list[Method]:
    """Every registered method, by name."""
    return [_METHODS[name] for name in sorted(_METHODS)]


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        CoterieError: there is none; names the nearest.
    """
    if name not in _METHODS:
        raise CoterieError(f"unknown method {name!r}", "recipe", nearest(name, list(_METHODS)))
    return _METHODS[name]
