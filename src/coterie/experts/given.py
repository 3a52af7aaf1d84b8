"""Experts as adapters hold them: their own factors, for methods whose result depends on these and not on B A alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import CoterieError
from ..sources.delta import Delta, LowRank
from .bank import BankShape
from .factorise import Factors, factorise, frobenius
from .fit import FittedLayer, LayerReport, overlap


@dataclass(frozen=True)
class GivenFactors:
    """`down` is A, `up` is B times the adapter's scale and the expert's weight; rows of zeros make ranks equal.

    Gates read each expert's leading right singular vectors, as of `TruncatedSVD`.

    Attributes:
        gate_rank: how many.
    """

    gate_rank: int = 1

    def plan(
        self, d_in: int, d_out: int, bounds: Sequence[int | None], bias: bool
    ) -> tuple[list[int | str | None], int]:
        """As of `TruncatedSVD`."""
        known = [min(d_in, d_out) if bound is None else bound for bound in bounds]
        most, touching = max(known, default=0), sum(1 for bound in known if bound)
        parameters = touching * (most * (d_in + d_out) + (d_out if bias else 0))
        parameters += touching * self.gate_rank * d_in if touching > 1 else 0
        return [None if bound == 0 else most for bound in known], parameters

    def finish(
        self,
        layers: Mapping[str, BankShape],
        sums: Mapping[str, list[list[float]]],
        reports: Mapping[str, LayerReport],
    ) -> dict[str, BankShape]:
        """The shapes once every layer is known: as they are."""
        return dict(layers)

    def fit(
        self,
        path: str,
        weight: torch.Tensor,
        deltas: list[Delta | None],
        biases: list[torch.Tensor | None],
        scales: list[float],
    ) -> FittedLayer | None:
        """One layer's experts; arguments and result as of `TruncatedSVD.fit`.

        Raises:
            CoterieError: an expert is no low-rank adapter.
        """
        d_out, d_in = weight.shape
        found: dict[int, tuple[LowRank, Factors]] = {}
        for i, delta in enumerate(deltas):
            if delta is None:
                continue
            if not isinstance(delta, LowRank):
                raise CoterieError(
                    "an expert has no factors here: it is a full fine-tune, or DoRA",
                    path,
                    "this method mixes the factors of LoRA adapters; make one with `coterie extract`",
                )
            factors = factorise(delta)
            if factors.rank:
                found[i] = delta, factors
        if not found:
            return None
        candidates = list(found)
        ranks = [len(delta.down) for delta, _ in found.values()]
        most, several = max(ranks), len(found) > 1
        gate_rank = min(self.gate_rank, *(f.rank for _, f in found.values())) if several else 0
        blocks = [
            (F.pad(d.down, (0, 0, 0, most - r)), F.pad(d.up.T, (0, 0, 0, most - r)))
            for (d, _), r in zip(found.values(), ranks, strict=True)
        ]
        tensors = {
            "down": torch.cat([down.double() for down, _ in blocks]),
            "up": torch.cat([up.double() * scales[i] for i, (_, up) in zip(candidates, blocks, strict=True)]),
        }
        if gate_rank:
            tensors["gate"] = torch.cat([f.vt[:gate_rank] for _, f in found.values()])
        changed = any(biases[i] is not None for i in candidates)
        if changed:
            none = torch.zeros(d_out)
            tensors["bias"] = torch.stack(
                [none if (b := biases[i]) is None else scales[i] * b.float().cpu() for i in candidates]
            )
        norm = frobenius(weight) or 1.0
        everyone = range(len(deltas))
        report = LayerReport(
            path,
            d_in,
            d_out,
            ranks=[len(found[i][0].down) if i in found else None for i in everyone],
            gate_rank=gate_rank,
            residuals=[0.0 if i in found else None for i in everyone],
            excess=[0.0 if i in found else None for i in everyone],
            norms=[found[i][1].norm / norm if i in found else None for i in everyone],
            overlap=overlap([f.vt[:gate_rank] for _, f in found.values()]) if several else None,
            parameters=sum(t.numel() for t in tensors.values()),
        )
        shape = BankShape(tuple(candidates), (most,) * len(candidates), gate_rank, gate_rank > 0, changed)
        return FittedLayer(shape, tensors, report)
