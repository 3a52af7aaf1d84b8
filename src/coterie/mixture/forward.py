"""The forward of a mixture whose routers must know the whole call: it sets the call up, and adds their losses."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CoterieError
from ..routing.call import Call, repeated
from ..routing.gumbel import Gumbel
from ..routing.known import Skills, Task
from ..routing.prepass import freeze
from .context import Context
from .following import Following, carry
from .kinds import check_routing, is_causal, is_seq2seq
from .layer import is_mixture
from .losses import check_classes, example_losses, reward
from .pooled import rows_of, signals
from .tokens import by_example, content_hash, counted, counting, mean_of, unless_all

INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
# Declared beside the model's own arguments, so that `generate` and the Trainer let them through.
ARGUMENTS = {
    "task_ids": "(batch,) int64, each example's task",
    "prompt_lengths": "(batch,) int64, tokens of each example's prompt, padding not counted",
}


class Forward:
    """Stands in place of the model's `forward`.

    Args:
        model: the mixture.
        context: its layers'.
        routing: its layers'.
    """

    def __init__(self, model: Any, context: Context, routing: Any):
        self.model, self.context, self.routing = model, context, routing
        self.causal = is_causal(model)
        check_routing(model, routing)
        self._signal = _signal_layer(model, routing) if routing.score == "signal" else None
        self._voters = _voters(model) if routing.pool == "model" else {}
        modules = list(model.modules())
        self._annealed = [module for module in modules if isinstance(module, Gumbel)]
        self._tasks = next((module.tasks for module in modules if isinstance(module, (Skills, Task))), None)
        model._replicate_for_data_parallel = _no_data_parallel
        self._by_prompt = self.causal and routing.pool in ("prompt", "segment", "model")
        self._whole_prompts = self._by_prompt and hasattr(model, "_prefill")
        if self._whole_prompts:
            model._prefill = self._prefill
        self._hooks = [
            model.register_forward_pre_hook(self._before_fused, with_kwargs=True),
            model.register_forward_hook(self._after_fused, with_kwargs=True, always_call=True),
        ]
        self._encoder = model.get_encoder() if is_seq2seq(model) else None
        if self._encoder is not None:
            self._hooks += [
                self._encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True),
                self._encoder.register_forward_hook(self._after_encoder, always_call=True),
            ]

    def remove(self) -> None:
        """Give the model its own forward back."""
        for hook in self._hooks:
            hook.remove()
        del self.model.forward, self.model._replicate_for_data_parallel
        if self._whole_prompts:
            del self.model._prefill

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.model).forward.__get__(self.model))
        before = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        rest = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        named = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ARGUMENTS]
        return own.replace(parameters=[*before, *named, *rest])

    @property
    def __code__(self) -> Any:
        """What `torch.export` asks a forward for, to say where it stands."""
        return type(self.model).forward.__code__

    def __call__(
        self, *args: Any, task_ids: Tensor | None = None, prompt_lengths: Tensor | None = None, **kwargs: Any
    ) -> Any:
        names = list(inspect.signature(type(self.model).forward).parameters)[1:] if args else []
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        if isinstance(inputs.get("labels"), Tensor):
            kwargs.pop("num_items_in_batch", None)  # not every architecture heeds it: see _with_losses
        call = self._begin(inputs, task_ids, prompt_lengths)
        self._start(call)
        if self.routing.decides_before and not self._decided:
            self._decide_before(call, inputs)
        with self.context.during(call):
            output = type(self.model).forward(self.model, *args, **kwargs)
        call.open = False
        if call.training and "consistency" in self.routing.losses and isinstance(inputs.get("labels"), Tensor):
            again = self._begin(inputs, task_ids, prompt_lengths)
            apart = self._disagreement(output, again, inputs["labels"], args, kwargs)
            call.losses["consistency"] = [self.routing.losses["consistency"] * apart]
        cache = getattr(output, "past_key_values", None)
        if call.kept is not None and cache is not None:
            cache.coterie = call.kept
            if not call.continues:
                Following.let(cache, call.kept)
        return self._with_losses(output, call, inputs)

    def _start(self, call: Call) -> None:
        if not call.training:
            return
        self.context.untaken = None
        for select in self._annealed:
            select.step += 1
        if not torch.compiler.is_compiling():
            carry(self.model, self.context)

    @property
    def _decided(self) -> bool:
        """Whether the answering experts were named from outside."""
        return self.context.weights is not None or self.context.gates is not None

    def _decide_before(self, call: Call, inputs: dict[str, Any]) -> None:
        """A pass without experts, which gives the gates of the pass with them (X-LoRA, LoGo, votes)."""
        frozen = self.routing.pool in ("prompt", "model")
        if frozen and call.continues:
            assert call.kept is not None
            call.gates = repeated(call.kept[-3], call.batch)
            return
        from transformers import DynamicCache

        model, cache, own = self.model, None, inputs.get("past_key_values")
        if call.kept is not None and call.continues:
            cache = call.kept[-2]
        elif call.kept is not None:  # of the same kind, which the mask is made for
            cache = DynamicCache(config=model.config.get_text_config()) if own is None else copy.deepcopy(own)
            call.kept |= {} if frozen else {-2: cache}
        base = getattr(model, model.base_model_prefix, model)
        run = partial(type(model).forward, model) if base is model else base
        accepted = inspect.signature(base.forward).parameters
        taken = ("past_key_values", "use_cache", "return_dict", *ARGUMENTS)
        given = {name: value for name, value in inputs.items() if name in accepted and name not in taken}
        if "past_key_values" in accepted:
            given |= {"past_key_values": cache, "use_cache": cache is not None}
        watched = None if self._signal is None else self._signal.index
        before = replace(call, off=True, training=False, kept=None, watched=watched)
        before.votes = dict.fromkeys(self._voters) if self._voters else None
        with torch.no_grad(), self.context.during(before):
            hidden = run(**given, return_dict=True)[0]
        if self._signal is not None or self._voters:
            call.gates = self._by_signal(before) if self._signal is not None else self._by_votes(before)
            if call.kept is not None:
                call.kept[-3] = call.gates
            return
        call.gates = model.coterie_router(hidden)
        if frozen and call.prompt is not None:
            call.gates, last = freeze(call.gates, call.prompt)
            if call.kept is not None:
                call.kept[-3] = last.detach()

    def _by_signal(self, before: Call) -> Tensor:
        """LoGo: gates (batch, 1, 1, E), of what experts would give for the prompt's last token in one layer."""
        layer: Any = self._signal
        options = self.routing.score_options
        assert before.seen is not None
        x = rows_of(before.seen, before)
        counted = before.valid if before.prompt is None else before.prompt
        if counted is None:
            last = x[:, -1]
        else:
            places = torch.arange(x.shape[1], device=x.device)
            last = x[torch.arange(len(x), device=x.device), torch.where(counted, places, -1).amax(1)]
        scores = signals(layer.bank, last, options["signal"], options["weights"])
        return layer.router.select(scores).gates()[:, None, None]

    def _by_votes(self, before: Call) -> Tensor:
        """Gates (batch, 1, 1, E): the k experts with the most votes (the first of equals), by shares of theirs."""
        votes = torch.zeros(before.batch, len(self.model.coterie.expert_names), device=before.device)
        assert before.votes is not None
        for number, given in before.votes.items():
            if given is not None:  # else the pass did not come by this layer
                votes[:, list(self._voters[number])] += given.to(votes.device)
        most, best = (each[:, : self.routing.k] for each in votes.sort(dim=-1, descending=True, stable=True))
        gates = torch.zeros_like(votes).scatter(-1, best, most / most.sum(-1, keepdim=True).clamp(min=1))
        return gates[:, None, None]

    def _disagreement(self, output: Any, call: Call, labels: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Half the symmetric KL divergence from a second pass, with other choices (arXiv:2205.12410, equation 5)."""
        with self.context.during(call):
            other = type(self.model).forward(self.model, *args, **kwargs)
        call.open = False
        a, b = ((o["logits"] if isinstance(o, dict) else o[1]).float().log_softmax(-1) for o in (output, other))
        each = ((a.exp() - b.exp()) * (a - b)).sum(-1) / 2
        if self.causal:
            each, labels = each[:, :-1], labels[:, 1:]
        counted = labels != -100
        return each[counted].mean() if counted.shape == each.shape else each.mean()

    def _begin(self, inputs: dict[str, Any], task_ids: Tensor | None, prompt_lengths: Tensor | None) -> Call:
        main = next((inputs[n] for n in INPUTS if isinstance(inputs.get(n), Tensor)), None)
        decoded = next((inputs[n] for n in ("decoder_input_ids", "labels") if isinstance(inputs.get(n), Tensor)), None)
        encoded = inputs.get("encoder_outputs")
        if main is None:
            main = encoded[0] if encoded is not None else decoded
        if main is None:
            raise CoterieError("the call has no input", "forward", f"give one of {', '.join(INPUTS)}")
        training = self.model.training and torch.is_grad_enabled()
        call = Call(len(main), main.device, training, tasks=self._tasks_of(task_ids, main))
        labels = inputs.get("labels")
        if isinstance(labels, Tensor):
            check_classes(self.model, labels)
        tokens = main.shape[1] if main.ndim > 1 else 1
        mask = counting(inputs.get("attention_mask"), inputs.get("past_key_values"), tokens)
        if self._encoder is not None:
            call.valid = None if mask is None else unless_all(counted(self.model, inputs, mask))
            own = inputs.get("decoder_attention_mask")
            if isinstance(own, Tensor) and decoded is not None:
                call.decoder_valid = own[:, -decoded.shape[1] :].bool()
            elif isinstance(labels, Tensor) and labels.ndim == 2:
                call.decoder_valid = labels != -100
            if encoded is not None:
                call.states, call.encoder = encoded[0], mean_of(encoded[0], call.valid)
        elif mask is not None:
            mask = mask[:, -tokens:]
            call.valid = unless_all(counted(self.model, inputs, mask))
        if self._by_prompt and not self._decided:
            self._prompt(call, inputs, main, prompt_lengths)
        elif self.causal and self.routing.score == "prepass" and not call.training:
            self._continue(call, inputs)
            call.kept = {} if call.kept is None else call.kept
        if self.routing.score == "hash" and encoded is not None:
            call.key = self._encoded_key(encoded, len(main))
        elif self.routing.score == "hash" and call.key is None:
            call.key = content_hash(main, call.prompt if self.causal else mask)
            if call.kept is not None:
                call.kept[-1] = call.key
        return call

    @staticmethod
    def _encoded_key(encoded: Any, batch: int) -> Tensor:
        """The hash of what the encoder read."""
        if not hasattr(encoded, "coterie"):
            raise CoterieError(
                "the routers go by what the encoder read, and these states were not made by this mixture's",
                "encoder_outputs",
                "pass what model.get_encoder()(...) returns, or the encoder's inputs",
            )
        return repeated(encoded.coterie, batch)

    def _tasks_of(self, task_ids: Tensor | None, main: Tensor) -> Tensor | None:
        if task_ids is None:
            return None
        tasks = by_example("task_ids", task_ids, main)
        if self._tasks is not None and not torch.compiler.is_compiling():
            low, high = tasks.min().item(), tasks.max().item()
            if low < 0 or high >= self._tasks:
                raise CoterieError(
                    f"task_ids go from {low} to {high}, and there are {self._tasks} tasks",
                    "task_ids",
                    f"number tasks from 0 to {self._tasks - 1}, or wrap with more",
                )
        return tasks

    def _prompt(self, call: Call, inputs: dict[str, Any], main: Tensor, lengths: Tensor | None) -> None:
        """Which tokens the decision may read; or that the call goes on from one that was made."""
        cache, labels = inputs.get("past_key_values"), inputs.get("labels")
        if self._continue(call, inputs):
            return
        valid = (
            call.valid if call.valid is not None else torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
        )
        if lengths is not None:
            call.prompt = valid & (valid.cumsum(1) <= by_example("prompt_lengths", lengths, main)[:, None])
        elif isinstance(labels, Tensor):
            call.prompt = valid & ((labels != -100).cumsum(1) == 0)
            if self.routing.pool == "segment" and not torch.compiler.is_compiling() and not bool(call.prompt.any()):
                call.prompt = None
        elif cache is not None:
            call.prompt = valid  # the first step of `generate`, which may have drafts at its end to check
            kept = inputs.get("logits_to_keep")
            if isinstance(kept, int) and kept > 1:
                call.prompt = valid & (torch.arange(valid.shape[1], device=valid.device) <= valid.shape[1] - kept)
        if call.prompt is None and self.routing.pool == "segment":
            return
        # Within a graph nothing may look at what a tensor holds.
        if call.prompt is None or not (torch.compiler.is_compiling() or bool(call.prompt.any(1).all())):
            raise CoterieError(
                "the routers decide by the prompt, and the call does not say where it ends",
                "prompt_lengths",
                "pass prompt_lengths=(batch,), each at least 1, or labels that are -100 on the prompt; "
                "`generate` needs neither, with its cache",
            )
        if not call.training:
            call.kept = {}

    @staticmethod
    def _continue(call: Call, inputs: dict[str, Any]) -> bool:
        """Whether the call goes on from a cache; then with what was decided before."""
        cache = inputs.get("past_key_values")
        if cache is None or not int(cache.get_seq_length()):
            return False
        call.kept = getattr(cache, "coterie", None)
        if call.kept is None:
            raise CoterieError(
                "the cache was not filled by this mixture, and holds no decision for its prompt",
                "past_key_values",
                "start from the prompt",
            )
        call.continues = True
        call.key = repeated(call.kept[-1], call.batch) if -1 in call.kept else None
        return True

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Stands in place of the model's own, the step of `generate` that reads the prompt."""
        size, cache = generation_config.prefill_chunk_size, model_kwargs.get("past_key_values")
        decided = cache is not None and int(cache.get_seq_length())
        if size is not None and size < input_ids.shape[1] and not decided:
            raise CoterieError(
                "the routers decide by the whole prompt, and would see its first chunk alone",
                "prefill_chunk_size",
                "leave it out",
            )
        return type(self.model)._prefill(self.model, input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _before_fused(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """TRL's trainers put a forward of theirs in this one's place, which calls the base model and makes no loss."""
        if not kwargs.get("fused_lm_head"):
            return None
        own = {name: kwargs.pop(name) for name in ARGUMENTS if name in kwargs}
        call = self._begin(kwargs, own.get("task_ids"), own.get("prompt_lengths"))
        self._start(call)
        if self.routing.decides_before and not self._decided:
            self._decide_before(call, kwargs)
        block = self.context.during(call)
        block.__enter__()
        module.__dict__["_coterie_fused"] = block, call
        return args, kwargs

    def _after_fused(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        block, call = module.__dict__.pop("_coterie_fused", (None, None))
        if block is None:
            return
        block.__exit__(None, None, None)
        call.open = False
        if output is not None and (call.losses or call.policies):
            self._leave(call, output, output["log_probs"])

    def _before_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """`generate` calls the encoder by itself: that is a call of its own."""
        own = {name: kwargs.pop(name) for name in ARGUMENTS if name in kwargs}
        if self.context.call is None:
            inputs = {**kwargs, **({INPUTS[0]: args[0]} if args else {})}
            self.context.enter(self._begin(inputs, own.get("task_ids"), None))
        return args, kwargs

    def _after_encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.context.call
        alone = self.context.leave()
        if call is None or output is None:  # it broke off
            return
        if call.key is not None:
            output.coterie = call.key
        if not alone:
            call.states, call.encoder = output[0], mean_of(output[0], call.valid)

    def _with_losses(self, output: Any, call: Call, inputs: dict[str, Any]) -> Any:
        named, labels = isinstance(output, dict), inputs.get("labels")
        if output.get("loss") is None if named else labels is None:
            if call.losses or call.policies:
                self._leave(call, output, output["logits"] if named and "logits" in output else output[0])
            return output
        loss = output["loss"] if named else output[0]
        total = loss + self.losses(call, self.example_losses(call, output, labels)).to(loss)
        items = inputs.get("num_items_in_batch")
        if items is not None and isinstance(
            labels, Tensor
        ):  # a part of the mean over all labels of an optimiser's step
            count = self.counted(labels)
            total = torch.where(count > 0, total, torch.zeros_like(total)) * count / items
        if named:
            output["loss"] = total
            return output
        return (total, *output[1:])

    def losses(self, call: Call, examples: Tensor | None) -> Tensor:
        """The sum of the routers' losses of a call, each term the mean over layers.

        Args:
            call: that ran in training.
            examples: (batch,) each example's own loss, for routers that learn from it.

        Raises:
            CoterieError: they do, and it is not known.
        """
        terms = {name: torch.stack(each).mean() for name, each in call.losses.items()}
        if call.policies:
            if examples is None:
                raise CoterieError(
                    "the routers learn from each example's loss, and it is not known",
                    "forward",
                    "pass labels with the batch, or to model.coterie.losses(labels)",
                )
            terms |= reward(call, examples, self.routing.losses)
        self.context.last_losses = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum() if terms else torch.zeros((), device=call.device)

    def example_losses(self, call: Call, output: Any, labels: Tensor | None) -> Tensor | None:
        """(batch,) each example's own loss, where routers learn from it and the labels are known."""
        if not call.policies:
            return None
        if isinstance(output, dict) and output.get("log_probs") is not None:
            return -output["log_probs"].sum(1) / output["label_mask"].sum(1).clamp(min=1)
        if labels is None:
            return None
        logits = output["logits"] if isinstance(output, dict) else output[0 if output[0].ndim else 1]
        config = getattr(self.model, "config", None)
        several = getattr(config, "problem_type", None) == "multi_label_classification"
        return example_losses(logits, labels, self.causal, several)

    def counted(self, labels: Tensor) -> Tensor:
        """How many labels the mean of the model's loss is over."""
        return ((labels[:, 1:] if self.causal else labels) != -100).sum()

    def _leave(self, call: Call, output: Any, logits: Tensor) -> None:
        """Keep the losses of a call without labels for who makes a loss of it; a loss without them is told of."""
        self.context.untaken = left = (call, output)
        if torch.compiler.is_compiling() or self.context.told or not logits.requires_grad:
            return

        def tell(_: Tensor) -> None:
            if self.context.untaken is left and not self.context.told:
                self.context.told = True
                warnings.warn(
                    f"the losses of the routers ({', '.join(call.losses) or 'policy'}) are not part of the loss that "
                    "is differentiated, for the call had no labels; add model.coterie.losses() to it "
                    "(a Trainer that smooths labels or makes a loss of its own: coterie.watch(trainer))",
                    stacklevel=2,
                )

        logits.register_hook(tell)


def _no_data_parallel() -> Any:
    """Threads that share one model would share its calls."""
    raise CoterieError(
        "routers that know the whole call cannot run under torch's DataParallel, which the Trainer takes for several "
        "GPUs in one process",
        "DataParallel",
        "start a process for each GPU (torchrun, accelerate launch), or show but one (CUDA_VISIBLE_DEVICES)",
    )


def _voters(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Number -> experts of each mixture layer that votes: those that have the most, so that none is at a loss."""
    layers: list[Any] = [module for module in model.modules() if is_mixture(module)]
    found = {layer.index: layer.bank.shape.experts for layer in layers}
    most = max(map(len, found.values()), default=0)
    return {number: experts for number, experts in found.items() if len(experts) == most}


def _signal_layer(model: nn.Module, routing: Any) -> Any:
    """The mixture layer that a glob names; of several, the last."""
    glob = routing.score_options["layer"]
    found = [m for name, m in model.named_modules() if hasattr(m, "router") and fnmatchcase(name, glob)]
    if not found:
        raise CoterieError(f"no mixture layer matches {glob!r}", "layer", "see model.coterie.layers")
    return found[-1]
