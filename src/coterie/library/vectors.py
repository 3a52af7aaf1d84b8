"""Vectors of an expert that its own data make: PHATGOOSE's gates, and average activations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import get_constant_schedule_with_warmup

from ..errors import CoterieError
from ..experts.fresh import Fresh
from ..merging.statistics import Batch, moved, over_inputs
from ..methods.registry import Mixture
from ..routing.router import Routing
from ..sources.names import Skeleton
from ..training.wrap import MixtureConfig, wrap

if TYPE_CHECKING:
    from .expert import Expert

WARMUP = 0.06
Loss = Callable[[Any, Any], Tensor]
"""(model, batch) -> () the mean loss of the batch, with gradients."""


def train_gates(
    model: Any, expert: Expert, batches: Iterable[Any], steps: int, learning_rate: float, loss: Loss | None = None
) -> dict[str, Tensor]:
    """Train `v` of `y = W x + B A x sigmoid(v . x)` for each layer of an expert, from 0, everything else frozen.

    AdamW without decay, a constant rate after a warm-up of 6% of the steps. [Muqeeth et al. 2024, arXiv:2402.05859,
    section 3 and code]

    Args:
        model: the base, with the head that the expert was trained with; stays as it is.
        expert: of a library.
        batches: keyword arguments of the model's forward with labels, from the expert's own data; where they are fewer
            than steps, they come again.
        steps: of the optimiser.
        learning_rate: its rate.
        loss: of a batch, which is then handed to it as it is; None: the model's own.

    Returns:
        Module path, as of the expert -> (in,) float32.

    Raises:
        CoterieError: no batches, or batches without labels.
    """
    mixture, paths = _alone(model, expert)
    gates = [layer.router.float().score.weight for layer in paths.values()]
    optimiser = torch.optim.AdamW(gates, learning_rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimiser, math.ceil(WARMUP * steps))
    for _, batch in zip(range(steps), again(batches, expert.name), strict=False):
        found = loss(mixture, batch) if loss else mixture(**moved(batch, mixture)).loss
        if found is None:
            raise without_loss(expert.name)
        found.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return {path: gate.detach()[0].cpu() for path, gate in zip(paths, gates, strict=True)}


def average_activation(model: Any, expert: Expert, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The mean of what each layer of an expert reads, of tokens that are no padding, the expert at work.

    The average-activation baseline of Muqeeth et al. 2024, arXiv:2402.05859. Arguments and result as of `train_gates`,
    but that no labels are needed.

    Raises:
        CoterieError: no batches.
    """
    mixture, paths = _alone(model, expert)
    sums = {path: torch.zeros(layer.bank.width, dtype=torch.float64) for path, layer in paths.items()}
    counts = dict.fromkeys(paths, 0)

    def add(path: str, x: Tensor) -> None:
        sums[path] += x.double().sum(0).cpu()
        counts[path] += len(x)

    with mixture.coterie.route(expert.name):
        over_inputs(mixture, batches, paths, add)
    idle = next((path for path, count in counts.items() if not count), None)
    if idle is not None:
        raise CoterieError(
            f"no input reaches {idle!r}", f"activations of {expert.name!r}", "give batches of the expert's own data"
        )
    return {path: (total / counts[path]).float() for path, total in sums.items()}


def _alone(model: Any, expert: Expert) -> tuple[Any, dict[str, Any]]:
    """A mixture of one expert, whose gates learn; and its layers, by their paths as of the expert."""
    expert.require_factors()
    rank = max((layer.rank for layer in expert.layers.values()), default=1)
    routing = Routing("vectors", "sigmoid", score_options={"normalise": False})
    how = MixtureConfig(method=Mixture(Fresh(rank), routing), experts={expert.name: str(expert.path)}, also_train=[])
    with warnings.catch_warnings():  # what the adapter holds whole is put in below
        warnings.filterwarnings("ignore", "expert .* are left out", UserWarning)
        mixture = wrap(model, how, train="routers")
    put_saved(mixture, expert)
    skeleton = Skeleton(type(model), model.config)
    return mixture, {path: mixture.get_submodule(skeleton.layer_in_memory(path)) for path in expert.layers}


def put_saved(model: Any, expert: Expert) -> None:
    """Put what an adapter holds whole (a head) into a model that has such modules.

    Raises:
        CoterieError: a shape differs.
    """
    named = dict(model.named_parameters())
    for name, disk in expert.saved.items():
        if name not in named:
            continue
        value = expert.checkpoint.read(disk)
        if value.shape != named[name].shape:
            raise CoterieError(
                f"the expert's {name!r} has shape {list(value.shape)}, and the model's {list(named[name].shape)}",
                f"expert {expert.name!r}",
                "give a model with the head that the expert was trained with",
            )
        named[name].data = value.to(named[name])


def without_loss(expert: str) -> CoterieError:
    return CoterieError("the model gives no loss", f"expert {expert!r}", "give batches with labels, or a loss")


def again(batches: Iterable[Any], expert: str) -> Iterator[Any]:
    """Batch after batch, from the first again after the last."""
    while True:
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise CoterieError(
                "there are no batches, or fewer than steps and they come once",
                f"data of {expert!r}",
                "give a list, or a DataLoader, of some of the expert's own data",
            )
