"""Experts as masks: one delta that all experts of a layer share, a bit per element and expert, and a scale each.

Such an expert is a delta of full rank that only the whole layer can bear, so the layer runs it merged: one decision for
the call, given by name (`model.coterie.route`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..sources.delta import Delta
from .bank import Bank, BankShape
from .factorise import frobenius
from .fit import FittedLayer, LayerReport

BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def pack(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes, its elements in row-major order, the first in the lowest bit: (ceil(numel / 8),)."""
    flat = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) * BITS.to(flat.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of that shape that `pack` made bytes of."""
    flat = (packed[:, None] & BITS.to(packed.device)) != 0
    return flat.flatten()[: torch.Size(shape).numel()].view(*shape)


@dataclass(frozen=True)
class MaskedShape(BankShape):
    """A bank of masks.

    Attributes:
        scales: each candidate's factor on what its mask keeps.
    """

    scales: tuple[float, ...] = ()

    @property
    def forms(self) -> tuple[str, ...]:
        return ("mask",) * len(self.experts)

    def tensors(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        n = len(self.experts)
        shapes: dict[str, tuple[int, ...]] = {"shared": (d_out, d_in), "masks": (n, -(-d_in * d_out // 8))}
        return shapes | ({"bias": (d_out,), "bias_masks": (n, -(-d_out // 8))} if self.bias else {})

    def bank(self, d_in: int, d_out: int, dtype: torch.dtype | None = None, device: Any = None) -> Bank:
        return MaskedBank(self, d_in, d_out, dtype, device)


class MaskedBank(Bank):
    """The experts of one layer as masks over the delta that they share.

    Parameters and buffers:
        shared: (d_out, d_in), the shared delta.
        masks: (n, ceil(d_out d_in / 8)) uint8, a bit per element of it.
        bias: (d_out,) and bias_masks: (n, ceil(d_out / 8)), the same of the bias, only where an expert changes it.
    """

    whole = True
    shape: MaskedShape
    shared: nn.Parameter
    masks: Tensor
    bias_masks: Tensor

    def __init__(self, shape: MaskedShape, d_in: int, d_out: int, dtype: torch.dtype | None = None, device: Any = None):
        nn.Module.__init__(self)
        self.shape, self._widths, self._phi, self.linear = shape, (d_in, d_out), None, True
        for name, size in shape.tensors(d_in, d_out).items():
            if name.endswith("masks"):
                self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device=device))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))

    @property
    def dtype(self) -> torch.dtype:
        return self.shared.dtype

    def delta(self, weights: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        total = self._masked(self.shared, self.masks, weights)
        return total, self._masked(self.bias, self.bias_masks, weights) if self.shape.bias else None

    def _masked(self, shared: Tensor, masks: Tensor, weights: Sequence[float]) -> Tensor:
        dtype = torch.promote_types(shared.dtype, torch.float32)
        factor = torch.zeros(shared.shape, dtype=dtype, device=shared.device)
        for weight, scale, mask in zip(weights, self.shape.scales, masks, strict=True):
            if weight:
                factor.add_(unpack(mask, shared.shape), alpha=weight * scale)
        return factor * shared.to(dtype)

    def drop(self) -> None:
        pass

    def extra_repr(self) -> str:
        return f"experts={list(self.shape.experts)}, masks"


def shape_from_dict(shape: dict[str, Any]) -> BankShape:
    """A bank's shape from plain data, of its own kind."""
    return (MaskedShape if "scales" in shape else BankShape).from_dict(shape)


@dataclass(frozen=True)
class Masked:
    """Experts are masks over one delta that unifies theirs.

    Attributes:
        unify: the experts' deltas of one tensor, each of its shape, to the shared one.
        mask: (an expert's delta, the shared one) to the elements of it that the expert keeps.
        rescale: whether an expert's scale gives it back its sum of magnitudes over all layers; else it is 1.
    """

    unify: Callable[[Sequence[Tensor]], Tensor]
    mask: Callable[[Tensor, Tensor], Tensor]
    rescale: bool

    def plan(
        self, d_in: int, d_out: int, bounds: Sequence[int | None], bias: bool
    ) -> tuple[list[int | str | None], int]:
        """As of `TruncatedSVD`; the bits of the masks are counted as if they were numbers of two bytes."""
        forms: list[int | str | None] = [None if bound == 0 else "mask" for bound in bounds]
        numbers = (d_in + bias) * d_out
        return forms, numbers + -(-numbers * forms.count("mask") // 16)

    def fit(
        self,
        path: str,
        weight: Tensor,
        deltas: list[Delta | None],
        biases: list[Tensor | None],
        scales: list[float],
    ) -> FittedLayer | None:
        """One layer's experts; arguments and result as of `TruncatedSVD.fit`. Their scales come with `finish`."""
        candidates = [i for i, delta in enumerate(deltas) if delta is not None or biases[i] is not None]
        if not candidates:
            return None
        d_out, d_in = weight.shape
        zero, none = torch.zeros_like(weight, dtype=torch.float32), torch.zeros(d_out, device=weight.device)
        own = [zero if (d := deltas[i]) is None else d.dense().float() * scales[i] for i in candidates]
        parts = {"shared": own}
        changed = any(bias is not None for bias in biases)
        if changed:
            own = [none if (b := biases[i]) is None else b.float().to(none.device) * scales[i] for i in candidates]
            parts["bias"] = own
        tensors: dict[str, Tensor] = {}
        sums = torch.zeros(len(candidates), 5, dtype=torch.float64)
        for name, taus in parts.items():
            shared = self.unify(taus)
            masks = [self.mask(tau, shared) for tau in taus]
            tensors[name] = shared
            tensors["masks" if name == "shared" else "bias_masks"] = torch.stack([pack(mask) for mask in masks])
            for row, tau, mask in zip(sums, taus, masks, strict=True):
                kept = shared * mask
                values = (tau.abs(), kept.abs(), tau * tau, tau * kept, kept * kept)
                row += torch.stack([value.sum(dtype=torch.float64) for value in values]).cpu()
        everyone = range(len(deltas))
        norm = frobenius(weight) or 1.0
        norms = {i: float(row[2].sqrt()) / norm for i, row in zip(candidates, sums, strict=True)}
        report = LayerReport(
            path,
            d_in,
            d_out,
            ranks=["mask" if i in norms else None for i in everyone],
            gate_rank=0,
            residuals=[None] * len(deltas),
            excess=[None] * len(deltas),
            norms=[norms.get(i) for i in everyone],
            overlap=None,
            parameters=sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("masks")),
        )
        shape = MaskedShape(tuple(candidates), None, bias=changed, scales=(1.0,) * len(candidates))
        return FittedLayer(shape, tensors, report, sums.tolist())

    def finish(
        self,
        layers: Mapping[str, BankShape],
        sums: Mapping[str, list[list[float]]],
        reports: Mapping[str, LayerReport],
    ) -> dict[str, BankShape]:
        """The shapes with the experts' scales, once every layer is known; residuals go to the reports.

        Args:
            layers: module path -> shape, as `fit` gave it.
            sums: module path -> per candidate, over its weight and bias: the sums of |delta|, of |kept|, of their
                squares and, between these, of their product.
            reports: module path -> report.
        """
        totals: dict[int, list[float]] = {}
        for path, shape in layers.items():
            for expert, row in zip(shape.experts, sums[path], strict=True):
                totals[expert] = [a + b for a, b in zip(totals.get(expert, [0.0, 0.0]), row[:2], strict=True)]
        scales = {i: tau / kept if self.rescale and kept else 1.0 for i, (tau, kept) in totals.items()}
        for path, shape in layers.items():
            for expert, (_, _, tau, both, kept) in zip(shape.experts, sums[path], strict=True):
                missed = tau - 2 * scales[expert] * both + scales[expert] ** 2 * kept
                reports[path].residuals[expert] = (max(missed, 0.0) / tau) ** 0.5 if tau else 0.0
        return {
            path: replace(shape, scales=tuple(scales[i] for i in shape.experts))  # type: ignore[call-arg]
            for path, shape in layers.items()
        }
