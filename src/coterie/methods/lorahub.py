"""LoraHub: weights of experts, found by a gradient-free search on a few examples (Huang et al. 2023)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ..errors import CoterieError
from ..experts.given import GivenFactors
from ..routing.router import Routing
from .registry import Mixture, method

if TYPE_CHECKING:
    from torch import Tensor


@method("lorahub", cite="Huang et al. 2023, arXiv:2307.13269")
def assemble(
    weights: Annotated[
        list[float] | None, Field(description="of the experts, in order; none: 0, until coterie.lorahub finds them")
    ] = None,
) -> Mixture:
    """`(sum_i w_i B_i) (sum_i w_i A_i)`, the same for every input; coterie.lorahub finds the weights."""
    return Mixture(
        experts=GivenFactors(gate_rank=0),
        routing=Routing("fixed", "given", pool="task", combine="factors", score_options={"weights": weights}),
    )


def lorahub(
    mixture: Any,
    batches: Sequence[Any],
    *,
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    seed: int = 0,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Any:
    """The mixture with weights that suit a few examples; what is given stays as it is.

    Nevergrad's NGOpt, from zeros, minimises the examples' mean loss plus `penalty` times the weights' mean magnitude
    (arXiv:2307.13269, section 3.3). The result saves, loads, and becomes one PEFT adapter by
    `coterie.extract_expert(DIRECTORY, None, OUT, adapter=True)`.

    Args:
        mixture: built with the method `lorahub`.
        batches: of the examples, with labels, as the model takes them.
        budget: how many weights are tried, each on all examples.
        bound: on a weight's magnitude.
        penalty: on the weights' mean magnitude.
        seed: of the search.
        loss: (model, batch) -> the mean loss of a batch in any form that has a length; None: the model's own.

    Returns:
        The mixture in eval mode; its weights are `model.coterie.spec.parameters["weights"]`.

    Raises:
        CoterieError: it is no such mixture, there is no example with labels, a number is out of range, or nevergrad is
            not installed.
    """
    spec = mixture.coterie.spec
    if spec.method != "lorahub":
        raise CoterieError(f"is a mixture of {spec.method}", "coterie.lorahub", "build one with the method lorahub")
    if not batches or (loss is None and any("labels" not in batch for batch in batches)):
        raise CoterieError("there is a batch without labels, or none at all", "batches", "give examples with labels")
    if budget < 1 or bound <= 0 or penalty < 0:
        raise CoterieError(
            f"budget is {budget}, bound {bound}, penalty {penalty}", "coterie.lorahub", "take positive numbers"
        )
    weights = _search(_mean_loss(mixture, batches, loss), len(spec.experts), budget, bound, penalty, seed)
    return _with_weights(mixture, weights)


def _mean_loss(mixture: Any, batches: Sequence[Any], of: Callable[[Any, Any], Tensor] | None) -> Any:
    """Weights to the mean loss of the examples."""
    import torch

    names = mixture.coterie.expert_names

    def mean(weights: Sequence[float]) -> float:
        before, rows, total = mixture.training, 0, 0.0
        mixture.eval()
        with torch.no_grad(), mixture.coterie.route(dict(zip(names, map(float, weights), strict=True))):
            for batch in batches:
                size = len(batch if of else batch["labels"])
                total += size * float(of(mixture, batch) if of else mixture(**batch).loss)
                rows += size
        mixture.train(before)
        return total / rows

    return mean


def _search(loss: Any, experts: int, budget: int, bound: float, penalty: float, seed: int) -> list[float]:
    try:
        import nevergrad
    except ImportError:
        raise CoterieError("nevergrad is not installed", "coterie.lorahub", "pip install 'coterie[lorahub]'") from None
    import numpy as np

    space = nevergrad.p.Array(init=[0.0] * experts, lower=[-bound] * experts, upper=[bound] * experts)
    space.random_state = np.random.RandomState(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own optimisers, about small budgets
        search = nevergrad.optimizers.NGOpt(space, budget=budget)
        found = search.minimize(lambda weights: loss(weights) + penalty * float(np.abs(weights).mean()))
    return [float(weight) for weight in found.value]


def _with_weights(mixture: Any, weights: list[float]) -> Any:
    """A mixture that shares the given one's memory, with these weights."""
    from ..mixture.handle import attach
    from ..mixture.spec import reroute
    from ..training.wrap import shared_copy

    found, spec = shared_copy(mixture).eval(), mixture.coterie.spec
    parameters = {"weights": weights}
    routing = replace(spec.routing, score_options=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that heads are to be selected: as before
        spec = replace(spec, parameters=parameters, routing=routing)
        reroute(found, spec)
        attach(found, spec)
    if spec.heads:
        found.coterie.use_head(mixture.coterie.head)
    return found
