"""A router's decision: which experts answer each token, how strongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass
class Decision:
    """Gates of n tokens over E experts, in the form that they were made in.

    Attributes:
        experts: E.
        index: (n, k) int64, the experts that answer each token; None where `weight` is dense.
        weight: (n, k) gates of those, float32, or None where k = 1 and every gate is 1; (n, E) where `index` is None;
            (n, E, splits) where blocks of the dimensions have gates of their own.
        up: gates of the up-projections where they differ from `weight`, which then is of the down-projections.
    """

    experts: int
    index: torch.Tensor | None
    weight: torch.Tensor | None
    up: torch.Tensor | None = None

    @classmethod
    def constant(cls, weights: Sequence[float], n: int, device: torch.device) -> Decision:
        """The same weights, one per expert, for all n tokens."""
        used = [i for i, weight in enumerate(weights) if weight]
        index = torch.tensor(used, dtype=torch.long, device=device).expand(n, -1)
        weight = torch.tensor([weights[i] for i in used], dtype=torch.float32, device=device)
        return cls(len(weights), index, weight.expand(n, -1))

    def spread(self, tokens: int) -> Decision:
        """The same for each of so many tokens a row: of (n tokens) rows."""
        index = None if self.index is None else self.index.repeat_interleave(tokens, 0)
        return Decision(self.experts, index, None if self.weight is None else self.weight.repeat_interleave(tokens, 0))

    def gates(self) -> torch.Tensor:
        """(n, E) gates, float32, zero for the experts that do not answer. No data-dependent control flow."""
        if self.index is None:
            assert self.weight is not None
            return self.weight
        zeros = torch.zeros(len(self.index), self.experts, dtype=torch.float32, device=self.index.device)
        return zeros.scatter(-1, self.index, 1.0 if self.weight is None else self.weight.float())

    def by_expert(self) -> Iterator[tuple[int, torch.Tensor | None, torch.Tensor | None]]:
        """Per expert that answers at all: (expert, its tokens or None for all, their gates (tokens, 1) or None for 1).

        Reads the decision on the host.
        """
        if self.index is None:
            assert self.weight is not None
            for expert in range(self.experts):
                tokens = self.weight[:, expert].nonzero().squeeze(-1)
                if len(tokens):
                    yield expert, tokens, self.weight[tokens, expert, None]
        elif len(self.index) == 1:
            for slot, expert in enumerate(self.index[0].tolist()):
                yield expert, None, None if self.weight is None else self.weight[:, slot, None]
        else:
            tokens, gates, counts = self.sorted()
            start = 0
            for expert, count in enumerate(counts.tolist()):
                if count:
                    part = slice(start, start + count)
                    start += count
                    everyone = count == len(self.index)
                    yield expert, None if everyone else tokens[part], None if gates is None else gates[part]

    def sorted(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Tokens in the order of their experts: (tokens (n k), their gates (n k, 1) or None for 1, counts (E,))."""
        assert self.index is not None
        flat = self.index.flatten()
        # int16 sorts faster; a stable order keeps each expert's tokens ascending, so that memory is read forwards
        order = flat.to(torch.int16).argsort(stable=True)
        k = self.index.shape[-1]
        gates = None if self.weight is None else self.weight.flatten()[order, None]
        return order if k == 1 else order // k, gates, torch.bincount(flat, minlength=self.experts)
