"""What routers must know of a call of the whole model beyond their layer's input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CoterieError


@dataclass(eq=False)
class Policy:
    """A router's sampled choices in one layer, for REINFORCE: the reward comes once the call's loss is known.

    Attributes:
        log_probability, entropy: of each row's choice, (batch,).
        value: the baseline's guess of the reward, (batch,).
    """

    log_probability: Tensor
    entropy: Tensor
    value: Tensor


@dataclass(eq=False)
class Call:
    """One call of the whole model.

    Attributes:
        batch: how many examples.
        device: of its inputs.
        training: whether losses are wanted: the model trains, and gradients flow.
        valid: (batch, tokens) bool, the tokens that count; None for all. In an encoder-decoder, the encoder's.
        decoder_valid: the same of the decoder.
        prompt: (batch, tokens) bool, tokens of the prompt, for routers that may read no others; None where the call
            has none.
        tasks: (batch,) int64, each example's task; None where none was given.
        key: (batch,) int64, a hash of each example's content; None where no router asks for it.
        states: (batch, tokens, d), the encoder's final hidden states, which cross-attention reads, and
        encoder: their masked mean, (batch, d).
        gates: (batch, tokens, layers or 1, E), decided by a pass of the whole model before.
        off: whether the experts are switched off: this is that pass.
        watched: number of the layer of which that pass keeps what it reads, and
        seen: what it read, (batch, tokens, width).
        votes: by number, the layers that vote in that pass, and each example's vote, (batch, candidates).
        kept: decisions that outlive the call, by layer, beside the KV cache: gates (batch, E); None without a cache.
            Under ("merged", layer), the experts that they merged; ("dense", layer), a weight and a bias that have such
            an expert in them; -1, `key`; -2, the cache of the pass before; -3, its gates.
        continues: whether the call goes on from a cache that holds decisions.
        losses: name -> one weighted term for each layer, added to the model's loss.
        policies: sampled choices that wait for their reward.
        open: whether it still runs; else a layer is being recomputed (gradient checkpointing).
    """

    batch: int
    device: torch.device
    training: bool = False
    valid: Tensor | None = None
    decoder_valid: Tensor | None = None
    prompt: Tensor | None = None
    tasks: Tensor | None = None
    key: Tensor | None = None
    states: Tensor | None = None
    encoder: Tensor | None = None
    gates: Tensor | None = None
    off: bool = False
    watched: int | None = None
    seen: Tensor | None = None
    votes: dict[int, Tensor | None] | None = None
    kept: dict[Any, Any] | None = None
    continues: bool = False
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    policies: list[Policy] = field(default_factory=list)
    open: bool = True

    @property
    def learns(self) -> bool:
        """Whether a layer's losses are wanted now; also where it is computed anew, which takes the same steps.

        Raises:
            CoterieError: gradients are switched off within a call that wants them.
        """
        if not self.training:
            return False
        if not torch.is_grad_enabled():
            raise CoterieError(
                "the routers' losses get no gradient through reentrant gradient checkpointing",
                "gradient_checkpointing_kwargs",
                'use {"use_reentrant": False}',
            )
        return True

    def add(self, name: str, term: Tensor) -> None:
        """Add a layer's term of a loss, once."""
        if self.open:
            self.losses.setdefault(name, []).append(term)

    def await_reward(self, policy: Policy) -> None:
        """Note a layer's sampled choices, once."""
        if self.open:
            self.policies.append(policy)


def repeated(rows: Tensor, batch: int) -> Tensor:
    """Rows for a batch in which each was repeated since (beams of one prompt)."""
    return rows if len(rows) == batch else rows.repeat_interleave(batch // len(rows), 0)
