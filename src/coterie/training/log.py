"""What routers do while a Trainer trains, in its logs, and so wherever these go; and a halt where the loss is lost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from ..errors import CoterieError

DEAD = 0.01
"""An expert is dead where its load is below this part of an even share."""


def watch(trainer: Any) -> Watch:
    """Let a Trainer (or one of TRL's) log what the routers of its mixture do, and stop at a loss that is no number.

    Its logs, and with them TensorBoard and every other integration, get `routing_entropy` (mean entropy of a decision,
    0 where one expert answers, 1 where all do alike), `routing_load/NAME` (share of the decisions' weight that goes to
    an expert; padding does not count), `routing_dead` (share of the experts of all layers whose load is below a
    hundredth of an even share) and `loss_NAME` of every loss that routers add, each over the steps since the last log
    and all processes. Nothing waits for the device between logs.

    Where the Trainer makes the loss itself (label smoothing, `compute_loss_func`, TRL), the routers' losses are added.

    Args:
        trainer: a Trainer of a mixture, before `train()`.

    Returns:
        The callback.

    Raises:
        CoterieError: its model is no mixture. In training: the loss is not finite; says where, and what to try.
    """
    if not hasattr(trainer.accelerator.unwrap_model(trainer.model), "coterie"):
        raise CoterieError("the Trainer's model is no mixture", "coterie.watch", "wrap it: coterie.wrap")
    watcher = Watch(trainer)
    callbacks = trainer.callback_handler.callbacks
    first = next((i for i, each in enumerate(callbacks) if isinstance(each, DefaultFlowCallback)), -1)
    callbacks.insert(first + 1, watcher)  # before those that report
    trainer.compute_loss = watcher.compute_loss
    return watcher


class Watch(TrainerCallback):
    """The callback of `watch`.

    Attributes:
        meter: of the routers, since the last log.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.model = trainer, trainer.accelerator.unwrap_model(trainer.model)
        self.meter = Meter(self.model)
        self._compute_loss = trainer.compute_loss
        self._batch = self._epoch = self._before = 0
        self._lost: Tensor | None = None  # the first batch of this epoch whose loss is not finite, -1 for none

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own, with the routers' losses where a call did not add them."""
        labels, handle, args = inputs.get("labels"), self.model.coterie, self.trainer.args
        found = self._compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = found if return_outputs else (found, None)
        if handle._context.untaken is not None:
            share: Any = 1.0
            if num_items_in_batch is not None and labels is not None:
                processes = self.trainer.accelerator.num_processes if args.average_tokens_across_devices else 1
                share = processes * handle._forward.counted(labels) / num_items_in_batch
            loss = loss + share * handle.losses(labels).to(loss)
        if self.model.training and torch.is_grad_enabled():
            self.meter.take(handle._context.last_losses)
            self._check(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _check(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss).all()
        here = torch.where(finite, -1, self._batch)
        self._lost = here if self._lost is None else torch.where(self._lost < 0, here, self._lost)
        self._batch += 1
        # the Trainer's own filter waits for every loss as well
        if loss.device.type == "cpu" or self.trainer.args.logging_nan_inf_filter:
            self._halt()

    def _halt(self) -> None:
        """Stop if a loss was not finite.

        Raises:
            CoterieError: it was.
        """
        batch = -1 if self._lost is None else int(self._lost)
        if batch < 0:
            return
        terms = [name for name, term in self.model.coterie._context.last_losses.items() if not term.isfinite()]
        step = self._before + batch // self.trainer.args.gradient_accumulation_steps + 1
        raise CoterieError(
            f"the loss is not finite{f' (of the routers: {terms[0]})' if terms else ''}",
            f"step {step}, batch {batch} of epoch {self._epoch} (from 0)",
            "look at the rows of this batch (empty texts, labels), lower learning_rate or raise warmup_steps, "
            "and train in bf16 or float32 where it was fp16; checkpoints from before are whole",
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.stop()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch, self._batch, self._lost = int(state.epoch or 0), 0, None
        self._before = state.global_step
        try:
            steps = math.ceil(len(kwargs["train_dataloader"]) / args.gradient_accumulation_steps)
        except TypeError:
            return
        if not args.ignore_data_skip:  # resumed within an epoch
            done = state.global_step % max(steps, 1)
            self._before, self._batch = state.global_step - done, done * args.gradient_accumulation_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self._halt()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        values = self.meter.read()
        logs |= values
        state.log_history[-1] |= values


class Meter:
    """Sums over the training calls since it was last read, kept on their device.

    Args:
        model: a mixture.
        training: whether it counts calls in training (with gradients), or those in use.
    """

    def __init__(self, model: Any, training: bool = True):
        self.model, self.training = model, training
        self.experts = model.coterie.expert_names
        self._sums: dict[Any, Tensor] = {}  # layer -> each expert's load, then entropy and number of decisions
        self._losses: dict[str, list[Tensor]] = {}
        self._open = False
        self._masks: dict[bool, Tensor | None] = {}
        self._hooks: list[Any] = []

    def start(self) -> None:
        """Begin to count."""
        self.stop()
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        self.model.coterie.recorders.append(self._record)

    def stop(self) -> None:
        """Count no more."""
        if self._hooks:
            self.model.coterie.recorders.remove(self._record)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self, losses: dict[str, Tensor]) -> None:
        """Add a call's losses."""
        for name, term in losses.items():
            total, count = self._losses.get(name, (torch.zeros_like(term), torch.zeros_like(term)))
            self._losses[name] = [total + term, count + 1]

    def read(self) -> dict[str, float]:
        """The means since the last reading, over all processes; `watch` says which. Begins anew."""
        loads, losses = [*self._sums.items()], [*self._losses.items()]
        self._sums, self._losses = {}, {}
        if not loads:
            return {}
        sums = torch.stack([each for _, each in loads])
        terms = torch.stack([torch.stack(each) for _, each in losses]) if losses else sums.new_zeros(0, 2)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for each in (sums, terms):
                if each.numel():
                    torch.distributed.all_reduce(each)
        rows, pairs = sums.double().cpu(), terms.double().cpu()
        entropies, shares, dead = [], torch.zeros(len(self.experts), dtype=torch.double), []
        held = torch.zeros_like(shares)
        for (layer, _), row in zip(loads, rows, strict=True):
            candidates, count = list(layer.bank.shape.experts), row[-1].clamp(min=1)
            load = row[candidates] / count
            shares[candidates] += load
            held[candidates] += 1
            dead += (load < DEAD / len(candidates)).tolist()
            if len(candidates) > 1:
                entropies.append(float(row[-2] / count) / math.log(len(candidates)))
        values = {"routing_entropy": sum(entropies) / len(entropies)} if entropies else {}
        values |= {f"routing_load/{n}": float(s / h) for n, s, h in zip(self.experts, shares, held, strict=True) if h}
        values["routing_dead"] = sum(dead) / len(dead)
        return values | {f"loss_{name}": float(t / c) for (name, _), (t, c) in zip(losses, pairs, strict=True)}

    def _begin(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._open = (model.training and torch.is_grad_enabled()) == self.training
        masks = {False: kwargs.get("attention_mask"), True: kwargs.get("decoder_attention_mask")}
        labels = kwargs.get("labels")
        if masks[True] is None and isinstance(labels, Tensor) and labels.ndim == 2:
            masks[True] = labels != -100
        self._masks = {
            key: mask if isinstance(mask, Tensor) and mask.ndim == 2 else None for key, mask in masks.items()
        }

    def _end(self, *_: Any) -> None:
        self._open = False  # what follows is a layer computed anew (gradient checkpointing)

    def _record(self, layer: Any, gates: Tensor) -> None:
        if not self._open:
            return
        share = gates.detach().reshape(-1, gates.shape[-1]).float()
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-12)
        # a decoder's keys and values of cross-attention are of the encoder's tokens
        masks = (self._masks[layer.decodes], self._masks[False])
        mask = next((each for each in masks if each is not None and each.numel() == len(share)), None)
        counts = share.new_ones(len(share)) if mask is None else mask.flatten().to(share)
        sums = share.new_zeros(len(self.experts) + 2)
        sums[list(layer.bank.shape.experts)] = counts @ share
        sums[-2] = -(counts @ torch.xlogy(share, share)).sum()
        sums[-1] = counts.sum()
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums
