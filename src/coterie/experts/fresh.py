"""Experts that training starts from: low-rank pairs, or bottleneck adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..errors import CoterieError
from .bank import Bank, BankShape


@dataclass(frozen=True)
class Fresh:
    """Experts of one kind and size for every layer.

    Attributes:
        rank: of a low-rank pair; or the bottleneck's width.
        kind: "lora", `x -> scale B A x` beside a layer, A Kaiming-uniform and B zero, so that the model starts as its
            base (arXiv:2106.09685); or "bottleneck", `h -> U phi(D h + d)` added to what a layer gives
            (arXiv:1902.00751), all weights N(0, 0.01^2), as SMEAR's (arXiv:2306.03745).
        alpha: LoRA's: the scale is alpha / rank; None: the scale is 1.
        stabilised: the scale is alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
        dropout: on what the experts read, in training.
        activation: of a bottleneck.
        norm: whether a layer norm follows on a bottleneck's mixed output.

    Raises:
        CoterieError: a number is out of range.
    """

    rank: int
    kind: Literal["lora", "bottleneck"] = "lora"
    alpha: float | None = None
    stabilised: bool = False
    dropout: float = 0.0
    activation: str = "silu"
    norm: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise CoterieError(f"rank is {self.rank}", "Fresh", "take 1 or more")
        if not 0 <= self.dropout < 1:
            raise CoterieError(f"dropout is {self.dropout}", "Fresh", "take 0 or more, below 1")

    def shape(self, experts: int, d_in: int, d_out: int) -> BankShape:
        """What a layer's bank holds, for so many experts."""
        rank = min(self.rank, d_in, d_out)
        everyone, ranks = tuple(range(experts)), (rank,) * experts
        if self.kind == "bottleneck":
            return BankShape(
                everyone, ranks, activation=self.activation, after=True, norm=self.norm, dropout=self.dropout
            )
        alpha = float(rank if self.alpha is None else self.alpha)
        scale = alpha / (math.sqrt(rank) if self.stabilised else rank)
        return BankShape(everyone, ranks, scale=scale, dropout=self.dropout)

    def reset(self, bank: Bank, generator: torch.Generator) -> None:
        """Fresh parameters, expert by expert."""
        for name, parameter in bank.named_parameters():
            if name == "norm_weight":
                nn.init.ones_(parameter)
            elif name in ("down_bias", "norm_bias") or (name == "up" and self.kind == "lora"):
                nn.init.zeros_(parameter)
            elif name == "down" and self.kind == "lora":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                nn.init.normal_(parameter, std=0.01, generator=generator)
