"""The mixture layer: a linear layer with a bank of experts and a router beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..errors import CoterieError
from ..experts.bank import Bank, BankShape
from ..experts.derived import Derived, flows
from ..routing.decision import Decision
from ..routing.router import Router, Routing
from . import native
from .context import Context
from .cost import SHARED, cheapest
from .paths import Path, alike, grouped, stacked
from .pooled import add_pooled, merged_layer, vote

if TYPE_CHECKING:
    from .siblings import Siblings


class _Mixture(nn.Module):
    """What both kinds of mixture layer share: `y = base(x) + bank(x)`, experts chosen per token.

    The base weight is the parameter `base_weight`, and answers as `weight` too. Under its old name the architecture
    without its experts would load it, whatever configuration it is given, and be the base model.
    """

    bank: Bank
    router: Router
    base_weight: nn.Parameter
    context: Context
    siblings: Siblings | None
    index: int
    decodes: bool
    routing: Routing
    by_token: bool
    _merged: Derived
    _plain: bool

    @property
    def weight(self) -> nn.Parameter:
        return self.base_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if flows(self):
            self.drop()  # training follows, and fused optimisers leave no trace of their steps
        constant = self._constant()
        if not (self._plain or self._known(constant)):
            return self._forward_trained(x, constant)
        path = self._path(x, constant)
        if constant is not None and not any(constant):
            self._record(torch.tensor(constant, device=x.device), x.shape[:-1])
            return cast(torch.Tensor, super().forward(x))
        if path == "merged" and constant is not None:
            self._record(torch.tensor(constant, device=x.device), x.shape[:-1])
            return F.linear(x, *self.bank(lambda: self._merge_once(constant)))
        bank, flat = self.bank, x.reshape(-1, x.shape[-1])
        y = super().forward(flat)
        # Through the bank's own call, for the sake of hooks that bring its parameters from elsewhere (offloading).
        y = bank(lambda: self._add_experts(path, constant, x, flat.to(bank.dtype), y))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _known(self, weights: tuple[float, ...] | None) -> bool:
        """Whether the call's weights are known and of deltas of the weight, so that the layer is one dense layer."""
        if weights is None:
            return False
        bank = self.bank
        if not bank.linear or bank.shape.norm or (self.training and bank.shape.dropout):
            return False
        combine = self.routing.combine
        if combine == "slots" and self.context.weights is None:
            return False  # an expert that is alone reads mixtures of tokens, too
        return combine == "outputs" or [w for w in weights if w] == [1.0]

    def _forward_trained(self, x: torch.Tensor, constant: tuple[float, ...] | None) -> torch.Tensor:
        """Of routers that know the call, and of experts that are no deltas of the weight."""
        call = self.context.call
        if call is not None and call.watched == self.index:
            call.seen = x
        if call is not None and call.votes is not None and self.index in call.votes:
            before = call.votes[self.index]  # where a layer stands in several blocks
            call.votes[self.index] = vote(self, x, call) if before is None else before + vote(self, x, call)
        if (call is not None and call.off) or (self.context.weights is not None and not any(self.context.weights)):
            return cast(torch.Tensor, super().forward(x))
        bank, context = self.bank, self.context
        if context.path == "merged":
            dense = None if self.by_token else bank(lambda: merged_layer(self, x, call))
            if dense is None:
                raise _unmerged()
            return F.linear(x, *dense)
        y = super().forward(x)
        read = y if bank.shape.after else x
        read = read.to(bank.dtype)
        if not self.by_token:
            return cast(torch.Tensor, bank(lambda: add_pooled(self, read, y)))
        flat, onto = read.reshape(-1, read.shape[-1]), bank.linear and not bank.shape.norm

        def run() -> torch.Tensor:
            if constant is not None and not context.recorders:
                return alike(
                    bank, flat, constant, y.view(-1, y.shape[-1]) if onto else y.new_zeros(len(flat), y.shape[-1])
                )
            if constant is not None:
                decision = Decision.constant(constant, len(flat), flat.device)
            elif context.gates is not None:
                decision = context.given(read.shape[:-1], bank.shape.experts, flat.device)
            elif self.router.score.reads == "input":
                if call is None and self.training and self.routing.losses:
                    context.tell_of_part(self.routing.losses)
                decision = self.router.decide(flat, self._valid(x), call, self.index)
            else:
                decision = self.router(F.linear(flat, bank.score_rows()).unflatten(-1, (bank.experts, -1)))
            if context.recorders:
                self._record(decision.gates(), read.shape[:-1])
            into = y.view(-1, y.shape[-1]) if onto else y.new_zeros(len(flat), y.shape[-1])
            dense = decision.index is None or torch.compiler.is_compiling() or x.device.type != "cpu"
            if dense or context.path == "stacked":
                return stacked(bank, flat, bank.project(flat), decision, into)
            return grouped(bank, flat, decision, into)

        part = bank(run)
        return cast(torch.Tensor, part.view(y.shape) if onto else y + bank.after_mixing(part).view(y.shape))

    def _valid(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which of the layer's tokens count, flat; None for all."""
        call = self.context.call
        if call is None:
            return None
        valid = call.decoder_valid if self.decodes and x is not call.states else call.valid
        return valid.flatten() if valid is not None and valid.numel() == x.shape[:-1].numel() else None

    def _add_experts(
        self, path: Path, constant: tuple[float, ...] | None, x: torch.Tensor, flat: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        bank = self.bank
        if path == "native":
            router = self.router
            leading, scores = native.scores(bank, router.score, flat)
            decision = router.select(scores)
            if self.context.recorders:
                self._record(decision.gates(), x.shape[:-1])
            return native.add_experts(bank, flat, leading, decision, y)
        if constant is not None and path == "grouped":
            if self.context.recorders:
                self._record(torch.tensor(constant, device=x.device), x.shape[:-1])
            return alike(bank, flat, constant, y)
        z = bank.project(flat) if path == "stacked" and bank.shape.ranks is not None else None
        decision = self._decide(path, x, flat, z, constant)
        if self.context.recorders:
            self._record(decision.gates(), x.shape[:-1])
        return grouped(bank, flat, decision, y) if path == "grouped" else stacked(bank, flat, z, decision, y)

    def _merge_once(self, constant: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = tuple(p for p in (*self._parameters.values(), *self.bank._parameters.values()) if p is not None)
        # PEFT merges adapters through `.data`, which torch does not count: a few weights show it (on a GPU, the look
        # would wait for the device).
        weight = self.base_weight.detach()
        seen = weight[:: max(1, len(weight) // 4), 0].tolist() if weight.device.type == "cpu" else None
        return cast(Any, self._merged.get(own, lambda: self.merge(constant), (constant, str(seen))))

    def merge(self, weights: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`W + sum_i w_i delta_i`, (d_out, d_in), and the bias: the layer under one decision for every token.

        Args:
            weights: one per candidate.
        """
        return self.onto_base(*self.bank.delta(weights))

    def onto_base(self, delta: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base's weight and bias with deltas of them, (d_out, d_in) and (d_out,), in the base's dtype."""
        base = self.weight.T if isinstance(self, Conv1D) else self.weight
        bias = cast(Any, self.bias)
        if added is not None:
            bias = (added if bias is None else bias.to(added.dtype) + added).to(base.dtype)
        return (base.to(delta.dtype) + delta).to(base.dtype), bias

    def drop(self) -> None:
        """Forget what was derived from the parameters."""
        self._merged.drop()
        self.bank.drop()
        if self.siblings is not None:
            self.siblings.drop()

    def train(self, mode: bool = True) -> Any:
        self.drop()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop()
        super()._load_from_state_dict(*args, **kwargs)

    def _constant(self) -> tuple[float, ...] | None:
        """The weights of the layer's candidates where one decision holds for the call."""
        context, routing = self.context, self.routing
        if context.weights is not None:
            return tuple(context.weights[i] for i in self.bank.shape.experts)
        if context.gates is not None:
            return None
        if routing.score == "level" and routing.combine == "outputs":
            return (1 / self.router.score.experts,) * len(self.bank.shape.experts)
        bank, router = self.bank, self.router
        off = context.call is not None and context.call.off
        voted = routing.pool == "model"
        if len(bank.shape.experts) > 1 or bank.whole or off or voted or routing.select == "sigmoid":
            return None
        # A layer's only expert answers whatever is scored; but who is named may be one that has nothing here.
        return None if router.score.reads == "call" and router.candidates is not None else (1.0,)

    def _path(self, x: torch.Tensor, constant: tuple[float, ...] | None) -> Path:
        bank = self.bank
        if bank.whole:
            if constant is None:
                self.router.score(None)
            return "merged"
        forced = self.context.path
        if forced == "merged" and constant is None:
            raise _unmerged()
        if forced not in ("auto", "native"):
            return cast(Path, forced)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "stacked"  # nothing that depends on data
        if constant is not None:
            once = self.context.weights is not None or self.routing.score == "level"
            return "merged" if once and not flows(self) else "grouped"
        if x.device.type != "cpu":
            return "stacked"  # nothing that waits for the device
        asked = self.context.gates is None and (forced == "native" or native.enabled())
        if asked and native.serves(bank, self.router.score, x):
            return "native"
        k = self.router.select.k if self.context.gates is None else self.context.active
        return cheapest(x.shape[:-1].numel(), bank.shape, k, *widths(self), bank.dtype, torch.get_num_threads())

    def _decide(
        self,
        path: Path,
        x: torch.Tensor,
        flat: torch.Tensor,
        z: torch.Tensor | None,
        constant: tuple[float, ...] | None,
    ) -> Decision:
        bank = self.bank
        if constant is not None:
            return Decision.constant(constant, len(flat), flat.device)
        if self.context.gates is not None:
            return self.context.given(x.shape[:-1], bank.shape.experts, flat.device)
        if z is not None and not bank.shape.gate:
            return self.router(bank.leading(z))
        alone = self.siblings is None or len(flat) > SHARED or flows(bank) or hasattr(bank, "_hf_hook")
        if path == "grouped" and self.siblings is not None and not alone:
            return self.siblings.decide(self, x, flat)
        return self.router(F.linear(flat, bank.score_rows()).unflatten(-1, (bank.experts, -1)))

    def _record(self, gates: torch.Tensor, leading: torch.Size) -> None:
        for record in self.context.recorders:
            record(self, gates.expand(leading.numel(), -1).view(*leading, gates.shape[-1]))


def _unmerged() -> CoterieError:
    return CoterieError(
        "the merged path needs one decision for the whole call, of experts that are deltas of a weight",
        "model.coterie.use_path",
        'name the expert (model.coterie.route("name")), give one example to routers that decide by example, or leave '
        'the path at "auto"',
    )


class MixtureLinear(_Mixture, nn.Linear):  # type: ignore[misc]
    """An `nn.Linear` with experts; weight (d_out, d_in) and bias are the base model's."""


class MixtureConv1D(_Mixture, Conv1D):  # type: ignore[override]
    """A GPT-2 `Conv1D` with experts; weight (d_in, d_out) and bias are the base model's."""


MIXTURE_OF: dict[type[nn.Module], type[_Mixture]] = {nn.Linear: MixtureLinear, Conv1D: MixtureConv1D}


def is_mixture(module: nn.Module) -> bool:
    return isinstance(module, _Mixture)


def widths(layer: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    d_in, d_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    return int(d_in), int(d_out)


def add_experts(
    layer: Any,
    shape: BankShape,
    routing: Routing,
    tensors: dict[str, torch.Tensor] | None = None,
    read: int | None = None,
    experts: int | None = None,
) -> Any:
    """A mixture layer that shares the parameters of `layer`, which itself stays as it is.

    Args:
        layer: an `nn.Linear` or a `Conv1D`, of exactly that type.
        shape: what the bank holds.
        routing: how the layer routes.
        tensors: the bank's parameters by name; left empty (for the loader to fill) where None.
        read: width of what a router reads that decides by example; None for the experts' own input.
        experts: how many the mixture has; None for as many as the layer.
    """
    mixture = MIXTURE_OF[type(layer)].__new__(MIXTURE_OF[type(layer)])
    mixture.__dict__.update(layer.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        mixture.__dict__[kind] = dict(layer.__dict__[kind])
    mixture._parameters = {"base_weight": mixture._parameters.pop("weight"), **mixture._parameters}
    bank = shape.bank(*widths(layer), dtype=layer.weight.dtype, device=layer.weight.device)
    for name, tensor in (tensors or {}).items():
        own = getattr(bank, name)
        own.data = tensor.to(own)
    mixture.bank = bank
    mixture.context, mixture.siblings, mixture._merged = Context(), None, Derived()
    mixture.index, mixture.decodes = 0, False
    route(mixture, routing, read, bank.experts if experts is None else experts)
    return mixture


def route(layer: Any, routing: Routing, read: int | None, experts: int) -> None:
    """Give a mixture layer a router, its values undefined; arguments as of `add_experts`.

    Raises:
        CoterieError: factors are to be averaged, and the experts' do not fit each other.
    """
    bank, weight = layer.bank, layer.weight
    if routing.combine == "factors":
        _check_factors(bank, routing)
    width = bank.width if read is None or routing.by_token or routing.combine == "slots" else read
    layer.router = routing.router(width, bank.shape.experts, experts, weight.device, weight.dtype)
    layer.router.train(layer.training)
    layer.routing, layer.by_token = routing, routing.by_token
    simple = bank.linear and not bank.shape.norm and not bank.shape.dropout
    layer._plain = simple and routing.by_token and layer.router.score.reads == "rows"


def _check_factors(bank: Bank, routing: Routing) -> None:
    if len(set(bank.shape.ranks or (0, 1))) > 1:
        raise CoterieError(
            f"a layer's experts' ranks are {list(bank.shape.forms)}, and their factors are to be averaged",
            "rank",
            "take one rank for all, or a method that mixes outputs",
        )
    splits = routing.score_options.get("splits", 1)
    if any(width % splits for width in bank._widths):
        raise CoterieError(
            f"{splits} splits do not divide a layer's widths {bank._widths}",
            "splits",
            "take a common divisor, or leave such layers out by an exclude glob",
        )
    if routing.pool == "token" and not bank.linear:
        raise CoterieError(
            "factors that are mixed for each token must be of low-rank pairs", "expert", "take lora, or pool by example"
        )


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, in every place where the old module stands (layers can be shared)."""
    old = model.get_submodule(path)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = module
