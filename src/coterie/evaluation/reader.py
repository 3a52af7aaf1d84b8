"""How models of a suite's base are read: what a row scores, and what training makes smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import CoterieError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .suite import Inputs, Split, Task


TEXTS = "take tasks over texts, or a router that reads the layers' inputs"


class Reader(Protocol):
    """Reads any model that has the base's architecture: the base, an expert, a merge, a mixture.

    A suite makes one from (directory of the base, torch device); what makes it must be picklable (a class, or a
    function of a module), because experts are trained in processes of their own.

    Attributes:
        base: directory of the base.
        device: where models and batches go.
        model: the base in float32, in eval mode, on the device; never changed.
        blocks: module path of the stack of blocks ("encoder.layer"). Everything in it is what a full fine-tune trains;
            its `nn.Linear`s are what LoRA adapts and what the ladder keeps.
        settings: everything else that a loss or a score depends on, as JSON values (a scale, the most tokens of an
            input, the fingerprint of a second model): a part of the key of every expert and of every finished cell.

    One that answers tasks by their experts' heads has `experts`, task -> directory, too: a part of the cells' keys. One
    whose inputs are no texts may have `encoder`, by which routers that retrieve know them: inputs -> (n, D).
    """

    base: Path
    device: str
    model: nn.Module
    blocks: str
    settings: dict[str, Any]

    def base_model(self) -> nn.Module:
        """A fresh copy of the base in float32, in eval mode, on the device."""

    def sizes(self, inputs: Inputs) -> np.ndarray:
        """(N,) int64: tokens of each input (or all the same); training puts rows of like size into one batch."""

    def batches(self, inputs: Inputs) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """(B,) row numbers and the keyword arguments of a call of the model on those rows.

        Where rows are padded, `attention_mask` (B, T) says what is not padding.
        """

    def loss(self, model: nn.Module, task: Task, rows: Split) -> Tensor:
        """() the mean loss of one batch of training rows, with gradients."""

    def logits(self, task: Task, output: Any) -> Tensor:
        """(1, ..., classes) from the model's output for one row: what its Fisher information is about."""

    def scores(self, model: nn.Module, task: Task, split: Split) -> np.ndarray:
        """(N,) float64: one score for each row, as `task.metric` reads it (see `metrics`); NaN where the model's
        answer is no number."""

    def features(self, inputs: Inputs) -> np.ndarray:
        """(N, D) float32: the frozen base's features of the inputs, from which the gates' probe names the task."""


def told(
    model: Any, inputs: Iterable[Any], encoder: Callable[[Sequence[Any]], Any] | None = None
) -> AbstractContextManager[None]:
    """In this block the model knows the inputs of its batch, if it is a mixture that retrieves experts by them.

    Args:
        model: any; where `route` or `retrieve` has said who answers, that holds.
        inputs: the rows of the batch, in order.
        encoder: of the inputs; None: they are texts, and it is MiniLM.

    Raises:
        CoterieError: it retrieves, and the rows are no texts; or its experts were embedded by another encoder.
    """
    handle = getattr(model, "coterie", None)
    if handle is None or handle.spec.routing.score != "retrieval" or handle.routed:
        return nullcontext()
    rows = list(inputs)
    if not rows:
        return nullcontext()
    if encoder is None and not all(isinstance(row, str) for row in rows):
        raise CoterieError(
            f"it retrieves by texts, and the inputs are {type(rows[0]).__name__}", handle.spec.method, TEXTS
        )
    standing: AbstractContextManager[None] = handle.retrieve(rows, encoder)
    return standing


def most_tokens(model: Any, wanted: int) -> int:
    """So many tokens, or as many as the model has positions for."""
    positions: int = getattr(model.config, "max_position_embeddings", None) or wanted
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa counts from there
    return min(wanted, positions)


def as_prompts(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with to see its routing: where it writes and its routers decide by the prompt, each row is
    one, unless the batch says where prompts end: by `prompt_lengths`, or by `labels` that begin with -100."""
    from ..mixture.kinds import is_causal

    handle = getattr(model, "coterie", None)
    if handle is None or handle.spec.routing.pool not in ("prompt", "model") or not is_causal(model):
        return batch
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None:
        mask = batch["input_ids"].new_ones(batch["input_ids"].shape)
    first = mask.long().argmax(1, keepdim=True)
    if "prompt_lengths" in batch or (labels is not None and bool((labels.gather(1, first) == -100).all())):
        return batch
    return {**batch, "prompt_lengths": mask.sum(1)}
