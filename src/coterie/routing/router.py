"""The router of a layer: pooling, a score and a selection, each chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import CoterieError
from .balance import LOSSES
from .call import Call
from .decision import Decision
from .dselect import DSelect
from .energy import SubspaceEnergy
from .gumbel import Gumbel
from .known import Hash, Level, Skills, Task
from .linear import Linear, Soft
from .pooling import Pool
from .prepass import Prepass
from .reinforce import Reinforce
from .retrieval import Retrieval
from .scalars import Fixed, Scalars
from .select import First, Given, Shares, Sigmoid, Softmax, TopK
from .tag import Tag
from .uniform import Uniform
from .vectors import Vectors

# outputs: of the experts. factors: their parameters, before they are applied (a different function, also without a
# non-linearity). slots: mixtures of tokens go to the experts (Soft MoE).
Combine = Literal["outputs", "factors", "slots"]

SCORES: dict[str, Any] = {
    "subspace_energy": SubspaceEnergy,
    "tag": Tag,
    "linear": Linear,
    "soft": Soft,
    "dselect": DSelect,
    "task": Task,
    "skills": Skills,
    "hash": Hash,
    "level": Level,
    "prepass": Prepass,
    "signal": Prepass,
    "fixed": Fixed,
    "scalars": Scalars,
    "vectors": Vectors,
    "retrieval": Retrieval,
}
SELECTIONS: dict[str, Any] = {
    "top_k": TopK,
    "softmax": Softmax,
    "given": Given,
    "first": First,
    "shares": Shares,
    "sigmoid": Sigmoid,
    "gumbel": Gumbel,
    "reinforce": Reinforce,
    "uniform": Uniform,
}


@dataclass(frozen=True)
class Routing:
    """How a mixture's layers route, in plain data.

    Attributes:
        score: how well an expert suits an input (a name in `SCORES`).
        select: which experts answer, how strongly (a name in `SELECTIONS`).
        k: how many experts answer, where the selection has a number.
        pool: over what a router decides.
        combine: what is mixed.
        segment: tokens of a segment, where that is what a router decides over.
        score_options, select_options: keywords of the score and the selection.
        losses: name (in `LOSSES`, or of the score's or selection's own) -> its weight in the model's loss, where it is
            averaged over the layers.

    Raises:
        CoterieError: a name is unknown, or a number out of range.
    """

    score: str
    select: str
    k: int = 1
    pool: Pool = "token"
    combine: Combine = "outputs"
    segment: int = 0
    score_options: dict[str, Any] = field(default_factory=dict)
    select_options: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, name, known in (
            ("score", self.score, SCORES),
            ("select", self.select, SELECTIONS),
            ("pool", self.pool, get_args(Pool)),
            ("combine", self.combine, get_args(Combine)),
        ):
            if name not in known:
                raise CoterieError(f"unknown {what} {name!r}", "routing", f"known: {', '.join(known)}")
        dropout = self.select_options.get("dropout", 0.0)
        if not 0 <= dropout < 1:
            raise CoterieError(f"dropout is {dropout}", "routing", "some expert must be left: 0 or more, below 1")
        if self.pool == "segment" and self.segment < 1:
            raise CoterieError(f"segment is {self.segment}", "routing", "say how many tokens make one")
        parts = (SCORES[self.score], SELECTIONS[self.select])
        terms = {*LOSSES, *(name for part in parts for name in getattr(part, "losses", ()))}
        # slots, and gates of a pass before, are no decision of a layer
        terms = set() if self.combine == "slots" or self.decides_before else terms
        if wrong := set(self.losses) - terms:
            raise CoterieError(
                f"no loss {min(wrong)!r} of score {self.score} and selection {self.select}",
                "routing",
                f"known: {', '.join(sorted(terms)) or 'none'}",
            )
        if self.k < 1:
            raise CoterieError(f"k is {self.k}", "routing", "some expert must answer: 1 or more")
        if self.select == "reinforce" and self.pool in ("token", "segment"):
            raise CoterieError(
                f"reinforce is rewarded for an example, and its pool is {self.pool}", "routing", "pool by example"
            )

    def to_dict(self) -> dict[str, Any]:
        usual = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k in ("score", "select", "k") or v != usual[k]}

    @property
    def by_token(self) -> bool:
        """Whether a token is routed by itself alone, so that nothing of the call need be known."""
        return self.pool == "token" and SCORES[self.score].reads != "call" and self.combine == "outputs"

    @property
    def decides_before(self) -> bool:
        """Whether a pass of the whole model without experts decides before the call."""
        return self.score in ("prepass", "signal") or self.pool == "model"

    @property
    def by_call(self) -> bool:
        """Whether layers must know of the model's call, or it of them (losses; steps that are counted)."""
        return not self.by_token or bool(self.losses) or self.select == "gumbel"

    @property
    def couples(self) -> bool:
        """Whether tokens of one example reach each other by the very definition, in both directions."""
        return self.pool == "sequence" or self.combine == "slots"

    def router(
        self,
        width: int,
        candidates: Sequence[int],
        experts: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """A layer's router.

        Args:
            width: of what the layer's router reads.
            candidates: the layer's experts.
            experts: how many the mixture has; scores that read the call are of all of them.
            device, dtype: of its parameters.
        """
        with torch.device(device or "cpu"):
            options = dict(self.select_options) | ({"width": width} if self.select == "reinforce" else {})
            scored = experts if SCORES[self.score].reads == "call" else len(candidates)
            slots = scored * self.k if self.combine == "slots" else scored
            score = SCORES[self.score](width, slots, **self.score_options)
            router = Router(self, score, SELECTIONS[self.select](self.k, **options))
            if len(candidates) < experts:
                router.candidates = list(candidates)
        return router if dtype is None else router.to(dtype)


class Router(nn.Module):
    """A decision from what the router reads: scored, then selected, in float32.

    Args:
        routing: what it was made of.
        score: what is read -> scores (n, E).
        select: scores -> decision.

    Attributes:
        candidates: the layer's experts, where it has not all of them.
    """

    candidates: list[int] | None = None

    def __init__(self, routing: Routing, score: Any, select: Any):
        super().__init__()
        self.routing, self.score, self.select = routing, score, select

    def forward(self, z: Tensor) -> Decision:
        """The decision for n tokens from the bank's leading projections, (n, E, g)."""
        decision: Decision = self.select(self.score(z))
        return decision

    def decide(self, read: Tensor | None, valid: Tensor | None, call: Call | None, layer: int) -> Decision:
        """The decision for n rows, and what it adds to the loss.

        Args:
            read: (n, width), or the bank's projections of that (n, E, g), or None, as the score reads.
            valid: (n,) bool, the rows that count in losses; None for all.
            call: of the whole model.
            layer: the layer's number.
        """
        if self.score.reads == "call":
            scores = self.score(call, layer)
            scores = scores if self.candidates is None else scores[:, self.candidates]
        else:
            scores = self.score(read)
        decision: Decision = self.select(scores)
        # consistency is the whole call's, and no layer's
        wanted = {name: weight for name, weight in self.routing.losses.items() if name != "consistency"}
        if wanted and call is not None and call.learns:
            own: dict[str, Tensor] = {}
            for part in (self.score, self.select):
                if hasattr(part, "loss"):
                    own |= part.loss(read, scores, decision, valid, call)
            for name, weight in wanted.items():
                if name in own:
                    call.add(name, weight * own[name])
                elif name in LOSSES:
                    call.add(name, weight * LOSSES[name](scores, decision, valid))
        return decision

    def reset(self, generator: torch.Generator) -> None:
        """Fresh parameters."""
        for part in (self.score, self.select):
            if hasattr(part, "reset"):
                part.reset(generator)
