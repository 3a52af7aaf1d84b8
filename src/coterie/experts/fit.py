"""Experts from deltas: what one layer's bank holds, and what was measured on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch.nn import functional as F

from ..errors import CoterieError
from ..sources.delta import Delta, Dense, Fitted
from .bank import BankShape
from .factorise import factorise, frobenius, residual

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


class LayerByLayer:
    """Experts of which a layer's depend on no other layer's."""

    def finish(
        self,
        layers: Mapping[str, BankShape],
        sums: Mapping[str, list[list[float]]],
        reports: Mapping[str, LayerReport],
    ) -> dict[str, BankShape]:
        """The shapes once every layer is known: as they are."""
        return dict(layers)


@dataclass(frozen=True)
class TruncatedSVD(LayerByLayer):
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

    def fit(
        self,
        path: str,
        weight: torch.Tensor,
        deltas: Sequence[Delta | Fitted | None],
        biases: list[torch.Tensor | None],
        scales: list[float],
    ) -> FittedLayer | None:
        """One layer's experts.

        Args:
            path: the layer's name, for the report.
            weight: the base weight, (d_out, d_in).
            deltas: per expert, its delta of the weight, or None where that is zero; or what a fit made of it before.
            biases: per expert, its delta of the bias (d_out,), or None.
            scales: per expert, the factor on its delta (never on its score).

        Returns:
            The bank, or None where no expert changes the weight (a lone expert may change the bias alone).

        Raises:
            CoterieError: an expert that was fitted before has fewer directions than the others' scores need.
        """
        parts: dict[int, Fitted] = {}
        for i, delta in enumerate(deltas):
            if delta is not None:
                part = self._again(delta) if isinstance(delta, Fitted) else self.part(delta, biases[i], scales[i])
                if part.rank:
                    parts[i] = part
        if len(deltas) == 1 and not parts and biases[0] is not None:
            parts = {0: self.part(Dense(torch.zeros_like(weight)), biases[0], scales[0])}
        return self._join(path, weight, parts, len(deltas)) if parts else None

    def part(self, delta: Delta, bias: torch.Tensor | None, scale: float) -> Fitted:
        """One expert's part; arguments as of `fit`."""
        wanted = (
            self.gate_rank if self.rank == "dense" else None if self.rank == "full" else max(self.rank, self.gate_rank)
        )
        f = factorise(delta, wanted)
        dense = self.rank == "dense"
        k = len(f.s) if self.rank in ("full", "dense") else min(int(self.rank), len(f.s))
        part = Fitted(f.vt, f.rank, 0.0 if dense else residual(f.s[:k], f.norm), 0.0 if dense else f.excess, f.norm)
        if self.energies:
            part.down, part.up = f.s[:k, None] * f.vt[:k], scale * f.u[:, :k].T
        elif dense:
            part.dense = scale * delta.dense()
        else:
            part.down, part.up = f.vt[:k], (f.u[:, :k] * (scale * f.s[:k])).T
        part.bias = None if bias is None else scale * bias.float().cpu()
        return part

    def _again(self, part: Fitted) -> Fitted:
        """A part that was made before, with the directions that it is scored by."""
        if part.dense is not None:
            f = factorise(Dense(part.dense), self.gate_rank) if not len(part.gate) else None
            return part if f is None else replace(part, gate=f.vt, rank=f.rank)
        gate = F.normalize(part.down) if self.energies else part.gate if len(part.gate) else part.down
        rank, k = part.rank, len(part.down)
        if self.rank == "full" or k != self.rank or k >= self.gate_rank:
            rank = k
        elif rank is None:  # truncated to fewer directions than scores read, it may have had more
            rank = self.gate_rank
        return replace(part, gate=gate, rank=rank)

    def _join(self, path: str, weight: torch.Tensor, found: Mapping[int, Fitted], experts: int) -> FittedLayer:
        d_out, d_in = weight.shape
        candidates, parts = list(found), list(found.values())
        several, dense = len(candidates) > 1, self.rank == "dense"
        kept = [len(part.gate) if dense else len(part.down) for part in parts]
        gate_rank = min(self.gate_rank, *(part.rank or 0 for part in parts)) if several else 0
        if self.energies:
            gate_rank = max(kept) if several else 0
        elif any(len(part.gate) < gate_rank for part in parts):
            raise CoterieError(
                f"an expert of the mixture was kept with fewer directions than the {gate_rank} that scores need",
                path,
                "build the mixture anew",
            )
        tensors: dict[str, torch.Tensor] = {}
        if dense:
            tensors["dense"] = torch.stack([part.dense for part in parts if part.dense is not None])
        else:
            tensors["down"] = torch.cat([part.down for part in parts])
            tensors["up"] = torch.cat([part.up for part in parts])
        own_gate = several and (dense or gate_rank > min(kept))
        if own_gate and self.energies:  # rows of zeros make ranks equal, and add nothing to a norm
            tensors["gate"] = torch.cat([F.pad(part.down, (0, 0, 0, gate_rank - len(part.down))) for part in parts])
        elif own_gate:
            tensors["gate"] = torch.cat([part.gate[:gate_rank] for part in parts])
        changed = any(part.bias is not None for part in parts)
        if changed:
            zero = torch.zeros(d_out)
            tensors["bias"] = torch.stack([zero if part.bias is None else part.bias for part in parts])

        norm = frobenius(weight) or 1.0
        forms: list[int | str] = ["dense"] * len(parts) if dense else list(kept)
        report = LayerReport(
            path,
            d_in,
            d_out,
            ranks=spread(candidates, forms, experts),
            gate_rank=gate_rank,
            residuals=spread(candidates, [part.residual for part in parts], experts),
            excess=spread(candidates, [part.excess for part in parts], experts),
            norms=spread(candidates, [part.norm / norm for part in parts], experts),
            overlap=overlap([part.gate[:gate_rank].double() for part in parts]) if several else None,
            parameters=sum(t.numel() for t in tensors.values()),
        )
        shape = BankShape(tuple(candidates), None if dense else tuple(kept), gate_rank, own_gate, changed)
        return FittedLayer(shape, tensors, report)


T = TypeVar("T")


def spread(candidates: Sequence[int], values: Sequence[T], experts: int) -> list[T | None]:
    """Candidates' values as a list over all experts."""
    found = dict(zip(candidates, values, strict=True))
    return [found.get(i) for i in range(experts)]


def overlap(rows: list[torch.Tensor]) -> float:
    """The mean over pairs of `|V_i V_j^T|_F^2 / g`, of orthonormal rows (g, d)."""
    later = torch.cat(rows)
    energy = torch.zeros((), dtype=later.dtype)
    for row in rows[:-1]:
        later = later[len(row) :]
        energy += (row @ later.T).square().sum()
    return float(energy) / (max(len(rows[0]), 1) * math.comb(len(rows), 2))
