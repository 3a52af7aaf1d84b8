"""The bank: all experts of one layer, stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import CoterieError
from ..recipe import nearest
from .derived import Derived

# Older releases of torch lack it.
GROUPED_MM = getattr(F, "grouped_mm", None)


@dataclass(frozen=True)
class BankShape:
    """What a layer's bank holds; enough to rebuild it on the meta device.

    Attributes:
        experts: indices (in the mixture's order) of the experts that touch this layer: its candidates.
        ranks: each candidate's rank, or None for a dense bank.
        gate_rank: leading right singular directions that score a candidate (0 where there is one candidate).
        gate: whether the gate has rows of its own (the down-projection has fewer than `gate_rank` rows, or none).
        bias: whether any candidate changes the bias.
        scale: factor on every candidate's output (LoRA's alpha / r).
        activation: between down- and up-projection, a name that transformers knows; None: none. With one, the
            down-projection has a bias.
        after: whether the experts read what the base layer gives (bottleneck adapters) and not its input.
        norm: whether a layer norm follows on what they give together.
        dropout: on what they read, in training.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...] | None
    gate_rank: int = 0
    gate: bool = False
    bias: bool = False
    scale: float = 1.0
    activation: str | None = None
    after: bool = False
    norm: bool = False
    dropout: float = 0.0

    @classmethod
    def from_dict(cls, shape: dict[str, Any]) -> BankShape:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        usual = {f.name: f.default for f in fields(self)[5:]}
        given = {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}

    @property
    def forms(self) -> tuple[int | str, ...]:
        """How each candidate's delta is written: its rank, or a word."""
        return ("dense",) * len(self.experts) if self.ranks is None else self.ranks

    def bank(self, d_in: int, d_out: int, dtype: torch.dtype | None = None, device: Any = None) -> Bank:
        """A bank of this shape, values undefined."""
        return Bank(self, d_in, d_out, dtype, device)

    def tensors(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter of the bank."""
        n, d_in = len(self.experts), d_out if self.after else d_in
        shapes: dict[str, tuple[int, ...]] = {}
        if self.ranks is None:
            shapes["dense"] = (n, d_out, d_in)
        else:
            shapes["down"] = (sum(self.ranks), d_in)
            shapes["up"] = (sum(self.ranks), d_out)
        if self.gate:
            shapes["gate"] = (n * self.gate_rank, d_in)
        if self.bias:
            shapes["bias"] = (n, d_out)
        if self.activation is not None:
            shapes["down_bias"] = (sum(self.ranks or ()),)
        if self.norm:
            shapes |= {"norm_weight": (d_out,), "norm_bias": (d_out,)}
        return shapes


def activation(name: str | None) -> Any:
    """The function of that name; None for none.

    Raises:
        CoterieError: transformers knows no such function.
    """
    if name is None:
        return None
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise CoterieError(f"unknown activation {name!r}", "activation", nearest(name, list(ACT2FN)))
    return ACT2FN[name]


class Bank(nn.Module):
    """The experts of one layer: `sum_i g_i expert_i(x)`, all at once.

    Parameters (R is the sum of the ranks; each expert's rows are contiguous):
        down: (R, d_in), the down-projections A, orthonormal rows `V_i^T` in SMILE.
        up: (R, d_out), the up-projections B, singular values and the expert's weight folded in.
        dense: (n, d_out, d_in) instead of the two, for rank "dense".
        gate: (n * gate_rank, d_in), only where the score needs rows that `down` lacks.
        bias: (n, d_out), the experts' bias deltas, only where they have any.
        down_bias: (R,), only where there is an activation.
        norm_weight, norm_bias: (d_out,), only where a layer norm follows.

    Attributes:
        whole: whether its experts can only be merged, under one decision for the whole call.
        linear: whether an expert is a delta of the layer's weight.
    """

    whole = False
    linear: bool
    down: nn.Parameter
    up: nn.Parameter
    dense: nn.Parameter
    gate: nn.Parameter
    bias: nn.Parameter
    down_bias: nn.Parameter
    norm_weight: nn.Parameter
    norm_bias: nn.Parameter

    def __init__(self, shape: BankShape, d_in: int, d_out: int, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.shape = shape
        for name, size in shape.tensors(d_in, d_out).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=dtype, device=device)))
        self._score_rows = Derived()
        self._widths = (d_out if shape.after else d_in, d_out)
        self._phi = activation(shape.activation)
        self.linear = self._phi is None and not shape.after

    def forward(self, run: Callable[[], Any]) -> Any:
        """Run what reads the bank's parameters, between the hooks that it may have."""
        return run()

    @property
    def experts(self) -> int:
        """How many candidates there are."""
        return len(self.shape.experts)

    @property
    def width(self) -> int:
        """The width of what the experts read."""
        return self._widths[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""
        return (self.up if self.shape.ranks is not None else self.dense).dtype

    def rows(self, expert: int) -> slice:
        """The rows of `down` and `up` that belong to a candidate."""
        ranks = self.shape.ranks or ()
        start = sum(ranks[:expert])
        return slice(start, start + ranks[expert])

    def project(self, x: torch.Tensor, expert: int | None = None) -> torch.Tensor:
        """`scale * phi(x A^T + a)` of x (..., width): (..., R), or of one candidate (..., its rank)."""
        rows, x = slice(None) if expert is None else self.rows(expert), self.dropped(x)
        if self._phi is None:
            z = F.linear(x, self.down[rows])
        else:
            z = self._phi(F.linear(x, self.down[rows], self.down_bias[rows]))
        return z if self.shape.scale == 1 else z * self.shape.scale

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x as the experts read it (what routers read is whole)."""
        return F.dropout(x, self.shape.dropout, self.training) if self.shape.dropout else x

    def after_mixing(self, mixed: torch.Tensor) -> torch.Tensor:
        """What the layer adds, out of what the experts give together (..., d_out)."""
        if not self.shape.norm:
            return mixed
        return F.layer_norm(mixed, mixed.shape[-1:], self.norm_weight.to(mixed), self.norm_bias.to(mixed))

    def score_rows(self) -> torch.Tensor:
        """(n * gate_rank, d_in), what the router reads: each candidate's leading rows, contiguous."""
        if self.shape.gate:
            return self.gate
        g, ranks = self.shape.gate_rank, self.shape.ranks or ()
        if all(rank == g for rank in ranks):
            return self.down
        return self._score_rows.get(
            (self.down,), lambda: torch.cat([part[:g] for part in self.down.split(list(ranks))])
        )

    def leading(self, z: torch.Tensor) -> torch.Tensor:
        """(tokens, n, gate_rank), what the router scores, out of the down-projections z (tokens, R)."""
        g, ranks = self.shape.gate_rank, self.shape.ranks or ()
        if len(set(ranks)) == 1:
            return z.unflatten(-1, (len(ranks), ranks[0]))[..., :g]
        return torch.stack([part[..., :g] for part in z.split(list(ranks), dim=-1)], dim=-2)

    def weigh(self, z: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Down-projections z (tokens, R), each candidate's times its gate (tokens, n)."""
        ranks, gates = self.shape.ranks or (), gates.to(z.dtype)
        if len(set(ranks)) == 1:
            return (z.unflatten(-1, (len(ranks), ranks[0])) * gates[..., None]).flatten(-2)
        parts = [gates[..., i : i + 1].expand(*gates.shape[:-1], rank) for i, rank in enumerate(ranks)]
        return z * torch.cat(parts, dim=-1)

    def accumulate(
        self, y: torch.Tensor, x: torch.Tensor, expert: int, tokens: torch.Tensor | None, gates: torch.Tensor | None
    ) -> torch.Tensor:
        """Add one candidate's output to y (tokens, d_out), in place.

        Args:
            y: what is added to.
            x: (tokens, d_in).
            expert: the candidate.
            tokens: indices of its tokens; None for all.
            gates: (its tokens, 1), or None where all are 1.
        """
        x = x if tokens is None else x.index_select(0, tokens)
        gates = None if gates is None else gates.to(y.dtype)
        bias = self.bias[expert, None].to(y.dtype) if self.shape.bias else None
        if self.shape.ranks is None:
            part = F.linear(x, self.dense[expert]).to(y.dtype)
            part = part if bias is None else part + bias
            part = part if gates is None else part * gates
        else:
            z, up = self.project(x, expert).to(y.dtype), self.up[self.rows(expert)].to(y.dtype)
            z = z if gates is None else z * gates
            if bias is not None:  # one more rank: no pass over the outputs of its own
                z = torch.cat([z, z.new_ones(len(z), 1) if gates is None else gates], dim=-1)
                up = torch.cat([up, bias])
            if tokens is None:
                return y.addmm_(z, up)
            part = (z @ up).to(y.dtype)  # autocast has a mind of its own
        return y.add_(part) if tokens is None else y.index_add_(0, tokens, part)

    def groupable(self, x: torch.Tensor) -> bool:
        """Whether `by_counts` can be used: torch's grouped product wants equal ranks, in strides of 16 bytes."""
        ranks = self.shape.ranks or (0, 1)
        suits = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.device.type == "cpu"
        even = (
            len(set(ranks)) == 1
            and ranks[0] > 0
            and all(w * x.element_size() % 16 == 0 for w in (ranks[0], *self._widths))
        )
        plain = self._phi is None and self.shape.scale == 1 and not (self.training and self.shape.dropout)
        return GROUPED_MM is not None and plain and suits and even and not torch.is_autocast_enabled("cpu")

    def by_counts(self, x: torch.Tensor, gates: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
        """Weighted outputs (tokens, d_out), biases left out, of tokens that are sorted by candidate.

        Args:
            x: (tokens, d_in).
            gates: (tokens, 1), or None where all are 1.
            counts: (n,), how many tokens each candidate has.
        """
        assert GROUPED_MM is not None
        experts, (d_in, d_out) = self.experts, self._widths
        ends = counts.cumsum(0, dtype=torch.int32)
        z = GROUPED_MM(x, self.down.view(experts, -1, d_in).transpose(1, 2), offs=ends)
        z = z if gates is None else z * gates.to(z.dtype)
        return GROUPED_MM(z, self.up.view(experts, -1, d_out), offs=ends)

    def delta(self, weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`sum_i w_i delta_i` of the weight, (d_out, d_in), and of the bias, (d_out,), in float32 at least."""
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        used = [i for i, weight in enumerate(weights) if weight]
        if self.shape.ranks is None:
            total = torch.zeros_like(self.dense[0], dtype=dtype)
            for i in used:
                total = total.add(self.dense[i], alpha=weights[i])
        else:
            total = self.up.new_zeros(self.up.shape[1], self.down.shape[1], dtype=dtype)
            for i in used:
                up, down = self.up[self.rows(i)].to(dtype), self.down[self.rows(i)].to(dtype)
                total = total.addmm(up.T, down, alpha=weights[i] * self.shape.scale)
        if not self.shape.bias:
            return total, None
        scale = torch.tensor(weights, dtype=dtype, device=self.bias.device)
        return total, scale @ self.bias.to(dtype)

    def drop(self) -> None:
        """Forget what was derived from the parameters."""
        self._score_rows.drop()

    def extra_repr(self) -> str:
        return f"experts={list(self.shape.experts)}, ranks={self.shape.ranks or 'dense'}"
