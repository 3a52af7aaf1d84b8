"""The mixture layer: a linear layer with a bank of experts and a router beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..experts.bank import Bank, BankShape
from ..routing.router import Router, Routing


class _Mixture(nn.Module):
    """What both kinds of mixture layer share: `y = base(x) + bank(x)`, experts chosen per token.

    The base weight is the parameter `base_weight`, and answers as `weight` too. Under its old name the architecture
    without its experts would load it, whatever configuration it is given, and be the base model.
    """

    bank: Bank
    router: Router
    base_weight: nn.Parameter

    @property
    def weight(self) -> nn.Parameter:
        return self.base_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = super().forward(x)
        x = x.to(next(self.bank.parameters()).dtype)
        z, scored = self.bank.project(x)
        return base + self.bank(x, z, self.router(scored)).to(base.dtype)


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


def add_experts(layer: Any, shape: BankShape, routing: Routing, tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """A mixture layer that shares the parameters of `layer`, which itself stays as it is.

    Args:
        layer: an `nn.Linear` or a `Conv1D`, of exactly that type.
        shape: what the bank holds.
        routing: how the layer routes.
        tensors: the bank's parameters by name; left empty (for the loader to fill) where None.
    """
    mixture = MIXTURE_OF[type(layer)].__new__(MIXTURE_OF[type(layer)])
    mixture.__dict__.update(layer.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        mixture.__dict__[kind] = dict(layer.__dict__[kind])
    mixture._parameters = {"base_weight": mixture._parameters.pop("weight"), **mixture._parameters}
    bank = Bank(shape, *widths(layer), dtype=layer.weight.dtype, device=layer.weight.device)
    for name, tensor in (tensors or {}).items():
        getattr(bank, name).data = tensor.to(layer.weight)
    mixture.bank = bank
    mixture.router = routing.router(bank.widths(), shape.gate_rank)
    return mixture


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, in every place where the old module stands (layers can be shared)."""
    old = model.get_submodule(path)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = module
