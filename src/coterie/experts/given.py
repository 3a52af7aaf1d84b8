"""Experts as adapters hold them: their own factors, for methods whose result depends on these and not on B A alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from ..errors import CoterieError
from ..sources.delta import Delta, Fitted, LowRank
from .bank import BankShape
from .factorise import factorise, frobenius
from .fit import FittedLayer, LayerByLayer, LayerReport, overlap, spread


@dataclass(frozen=True)
class GivenFactors(LayerByLayer):
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

    def fit(
        self,
        path: str,
        weight: torch.Tensor,
        deltas: Sequence[Delta | Fitted | None],
        biases: list[torch.Tensor | None],
        scales: list[float],
    ) -> FittedLayer | None:
        """One layer's experts; arguments and result as of `TruncatedSVD.fit`.

        Raises:
            CoterieError: an expert is no low-rank adapter.
        """
        d_out, d_in = weight.shape
        found: dict[int, Fitted] = {}
        for i, delta in enumerate(deltas):
            if delta is None:
                continue
            part = self._again(delta) if isinstance(delta, Fitted) else self._part(path, delta, biases[i], scales[i])
            if part.rank:
                found[i] = part
        if not found:
            return None
        candidates, parts = list(found), list(found.values())
        ranks = [len(part.down) for part in parts]
        most, several = max(ranks), len(found) > 1
        gate_rank = min(self.gate_rank, *(part.rank or 0 for part in parts)) if several else 0

        def stacked(blocks: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([F.pad(block.double(), (0, 0, 0, most - len(block))) for block in blocks])

        tensors = {"down": stacked([part.down for part in parts]), "up": stacked([part.up for part in parts])}
        if gate_rank:
            tensors["gate"] = torch.cat([part.gate[:gate_rank] for part in parts])
        changed = any(part.bias is not None for part in parts)
        if changed:
            none = torch.zeros(d_out)
            tensors["bias"] = torch.stack([none if part.bias is None else part.bias for part in parts])
        norm = frobenius(weight) or 1.0
        report = LayerReport(
            path,
            d_in,
            d_out,
            ranks=[*spread(candidates, ranks, len(deltas))],
            gate_rank=gate_rank,
            residuals=spread(candidates, [0.0] * len(parts), len(deltas)),
            excess=spread(candidates, [0.0] * len(parts), len(deltas)),
            norms=spread(candidates, [part.norm / norm for part in parts], len(deltas)),
            overlap=overlap([part.gate[:gate_rank].double() for part in parts]) if several else None,
            parameters=sum(t.numel() for t in tensors.values()),
        )
        shape = BankShape(tuple(candidates), (most,) * len(candidates), gate_rank, gate_rank > 0, changed)
        return FittedLayer(shape, tensors, report)

    def _again(self, part: Fitted) -> Fitted:
        if len(part.gate):
            return part
        f = factorise(LowRank(part.up.T, part.down))
        return replace(part, gate=f.vt[: self.gate_rank], rank=f.rank)

    def _part(self, path: str, delta: Delta, bias: torch.Tensor | None, scale: float) -> Fitted:
        if not isinstance(delta, LowRank):
            raise CoterieError(
                "an expert has no factors here: it is a full fine-tune, or DoRA",
                path,
                "this method mixes the factors of LoRA adapters; make one with `coterie extract`",
            )
        f = factorise(delta)
        up = delta.up.T.double() * scale
        return Fitted(
            f.vt[: self.gate_rank],
            f.rank,
            0.0,
            0.0,
            f.norm,
            delta.down,
            up,
            None,
            None if bias is None else scale * bias.float().cpu(),
        )
