"""The registry of methods: name, citation, parameters; help, docs and validation are generated from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CoterieError
from ..experts.fit import TruncatedSVD
from ..experts.fresh import Fresh
from ..experts.given import GivenFactors
from ..experts.masked import Masked
from ..recipe import nearest
from ..registration import Registered
from ..routing.router import Routing

Fitted = TruncatedSVD | GivenFactors | Masked


@dataclass(frozen=True)
class Mixture:
    """An assembly: where experts come from, and how a layer routes to them.

    Attributes:
        experts: makes a layer's bank from the experts' deltas; or what training starts from.
        routing: score and selection.
        statistics: the kind of the experts' statistics that the routers hold; None where they need none.
    """

    experts: Fitted | Fresh
    routing: Routing
    statistics: str | None = None

    @property
    def fitted(self) -> Fitted:
        """The experts of a method that is built."""
        assert not isinstance(self.experts, Fresh)
        return self.experts


class Method(Registered):
    """A registered method: an assembly of parts."""

    def parameters(self, given: dict[str, Any], experts: int) -> dict[str, Any]:
        """All parameters, the given ones checked and the others at their defaults.

        Raises:
            CoterieError: an unknown parameter, a value out of range, or `top_k` above the number of experts.
        """
        values = self.check(given)
        if "top_k" in values and "top_k" not in given:
            values["top_k"] = min(values["top_k"], experts)
        if values.get("top_k", 1) > experts:
            raise CoterieError(
                f"top_k is {values['top_k']} and there are {experts} experts", f"method {self.name}", "lower top_k"
            )
        if len(values.get("weights") or range(experts)) != experts:
            raise CoterieError(
                f"{len(values['weights'])} weights for {experts} experts", f"method {self.name}", "give one for each"
            )
        return values

    @property
    def trained(self) -> bool:
        """Whether its experts come from training, and not from a build."""
        return isinstance(self.assemble(**self.defaults).experts, Fresh)

    def assemble(self, **parameters: Any) -> Mixture:
        """The assembly for these parameters."""
        return self.function(**parameters)


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
