"""Experts from deltas: what one layer's bank holds, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch.nn import functional as F

from ..sources.delta import Delta
from .bank import BankShape
from .factorise import factorise, frobenius, nothing, residual

Rank = int | Literal["full", "dense"]


@dataclass
class LayerReport:
    """What one layer became.

    Attributes:
        path: the layer's module path.
        d_in, d_out: its widths.
        ranks: per expert of the mixture: the rank kept, "dense", or None where it does not touch the layer.
        gate_rank: leading directions that score each candidate.
        residuals: per expert, `|delta - kept| / |delta|` in Frobenius norm, measured in float64, before what is kept
            is rounded to the dtype that is written.
        excess: per expert, certified: its residual is at most `1 + excess` times the least that its rank allows.
        norms: per expert, `|delta| / |W|`.
        overlap: mean over pairs of `|V_i V_j^T|_F^2 / g` between gate subspaces; None with fewer than two candidates.
        parameters: parameters of the bank.
    """

    path: str
    d_in: int
    d_out: int
    ranks: list[int | str | None]
    gate_rank: int
    residuals: list[float | None]
    excess: list[float | None]
    norms: list[float | None]
    overlap: float | None
    parameters: int

    @property
    def chance(self) -> float:
        """The overlap that random subspaces of these widths have."""
        return self.gate_rank / self.d_in


@dataclass
class FittedLayer:
    """A layer's bank: its structure, its tensors by name, the report, and what `finish` must know of it (numbers)."""

    shape: BankShape
    tensors: dict[str, torch.Tensor]
    report: LayerReport
    sums: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class TruncatedSVD:
    """Experts are truncated SVDs of the deltas; gates read their leading right singular vectors.

    `A_i = V_k^T` (orthonormal rows) and `B_i = S_k U_k^T` times the expert's weight, so that with `gate_rank <= rank`
    the projections `A_i x` serve the score as well (arXiv:2408.10174, section 4).

    Attributes:
        rank: directions kept per expert; "full" keeps all that are numerically non-zero, "dense" the delta itself.
        gate_rank: directions that score; the same number for all experts of a layer, at most the smallest
            numerical rank among them.
        energies: gates read `S_k V_k^T` instead, all kept directions weighted by their singular values, so that the
            norm of what they read is the norm of the expert's output (SpectR, arXiv:2504.03454).
    """

    rank: Rank
    gate_rank: int = 0
    energies: bool = False

    def plan(
        self, d_in: int, d_out: int, bounds: Sequence[int | None], bias: bool
    ) -> tuple[list[int | str | None], int]:
        """What a layer's bank will be, from headers alone.

        Args:
            d_in, d_out: the layer's widths.
            bounds: per expert, the most that its delta's rank can be; 0 where it does not touch the layer, None where
                that is unknown.
            bias: whether any expert has a bias.

        Returns:
            Per expert, its rank at most (None: untouched); and the bank's parameters, at most.
        """
        ranks: list[int | str | None] = []
        for bound in bounds:
            known = min(d_in, d_out) if bound is None else min(bound, d_in, d_out)
            full = "dense" if self.rank == "dense" else known if self.rank == "full" else min(self.rank, known)
            ranks.append(None if bound == 0 else full)
        touching = [r for r in ranks if r is not None]
        parameters = sum(d_in * d_out if r == "dense" else int(r) * (d_in + d_out) for r in touching)
        if len(touching) > 1 and self.energies:
            most = max(int(r) for r in touching)
            parameters += most * d_in * len(touching) if len(set(touching)) > 1 else 0
        elif len(touching) > 1:
            gate = min(self.gate_rank, d_in, d_out)
            if self.rank == "dense" or any(int(r) < gate for r in touching):
                parameters += gate * d_in * len(touching)
        return ranks, parameters + (d_out * len(touching) if bias else 0)

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
        """One layer's experts.

        Args:
            path: the layer's name, for the report.
            weight: the base weight, (d_out, d_in).
            deltas: per expert, its delta of the weight, or None where that is zero.
            biases: per expert, its delta of the bias (d_out,), or None.
            scales: per expert, the factor on its delta (never on its score).

        Returns:
            The bank, or None where no expert changes the weight (a lone expert may change the bias alone).
        """
        d_out, d_in = weight.shape
        wanted = (
            self.gate_rank if self.rank == "dense" else None if self.rank == "full" else max(self.rank, self.gate_rank)
        )
        found = {i: factorise(delta, wanted) for i, delta in enumerate(deltas) if delta is not None}
        found = {i: factors for i, factors in found.items() if factors.rank}
        if len(deltas) == 1 and not found and biases[0] is not None:
            found = {0: nothing(d_out, d_in)}
        if not found:
            return None
        candidates, factors = list(found), list(found.values())
        several = len(candidates) > 1
        gate_rank = min(self.gate_rank, *(f.rank for f in factors)) if several else 0
        dense = self.rank == "dense"
        kept = [len(f.s) if self.rank == "full" or dense else min(int(self.rank), len(f.s)) for f in factors]
        if self.energies:
            gate_rank = max(kept) if several else 0

        tensors: dict[str, torch.Tensor] = {}
        if self.energies:
            tensors["down"] = torch.cat([f.s[:k, None] * f.vt[:k] for f, k in zip(factors, kept, strict=True)])
            tensors["up"] = torch.cat(
                [scales[i] * f.u[:, :k].T for i, f, k in zip(candidates, factors, kept, strict=True)]
            )
        elif dense:
            tensors["dense"] = torch.stack(
                [scales[i] * (delta.dense() if (delta := deltas[i]) else torch.zeros_like(weight)) for i in candidates]
            )
        else:
            tensors["down"] = torch.cat([f.vt[:k] for f, k in zip(factors, kept, strict=True)])
            tensors["up"] = torch.cat(
                [(f.u[:, :k] * (scales[i] * f.s[:k])).T for i, f, k in zip(candidates, factors, kept, strict=True)]
            )
        own_gate = several and (dense or gate_rank > min(kept))
        if own_gate and self.energies:  # rows of zeros make ranks equal, and add nothing to a norm
            parts = tensors["down"].split(kept)
            tensors["gate"] = torch.cat([F.pad(part, (0, 0, 0, gate_rank - len(part))) for part in parts])
        elif own_gate:
            tensors["gate"] = torch.cat([f.vt[:gate_rank] for f in factors])
        changed = any(biases[i] is not None for i in candidates)
        if changed:
            zero = torch.zeros(d_out)
            tensors["bias"] = torch.stack(
                [zero if (b := biases[i]) is None else scales[i] * b.float().cpu() for i in candidates]
            )

        everyone = range(len(deltas))
        at = {expert: position for position, expert in enumerate(candidates)}
        norm = frobenius(weight) or 1.0
        report = LayerReport(
            path,
            d_in,
            d_out,
            ranks=[None if i not in at else "dense" if dense else kept[at[i]] for i in everyone],
            gate_rank=gate_rank,
            residuals=[
                None
                if i not in at
                else 0.0
                if dense
                else residual(factors[at[i]].s[: kept[at[i]]], factors[at[i]].norm)
                for i in everyone
            ],
            excess=[None if i not in at else 0.0 if dense else factors[at[i]].excess for i in everyone],
            norms=[factors[at[i]].norm / norm if i in at else None for i in everyone],
            overlap=overlap([f.vt[:gate_rank] for f in factors]) if several else None,
            parameters=sum(t.numel() for t in tensors.values()),
        )
        shape = BankShape(tuple(candidates), None if dense else tuple(kept), gate_rank, own_gate, changed)
        return FittedLayer(shape, tensors, report)


def overlap(rows: list[torch.Tensor]) -> float:
    """The mean over pairs of `|V_i V_j^T|_F^2 / g`, of orthonormal rows (g, d)."""
    pairs = [float((a @ b.T).square().sum()) / max(len(a), 1) for a, b in combinations(rows, 2)]
    return sum(pairs) / len(pairs)
