"""REINFORCE: one sampled expert answers, and learns from the example's loss against a learned baseline."""

from __future__ import annotations

from ..routing.router import Routing
from .parts import Alpha, Dropout, Kind, PromptPool, Rank, Weight, fresh
from .registry import Mixture, method


@method("reinforce", cite="Bengio et al. 2016, arXiv:1511.06297; as in Muqeeth et al. 2024, arXiv:2306.03745")
def assemble(
    rank: Rank = 16,
    expert: Kind = "lora",
    alpha: Alpha = None,
    dropout: Dropout = 0.0,
    policy: Weight = 0.01,
    policy_entropy: Weight = 5e-4,
    value: Weight = 0.01,
    pool: PromptPool = "sequence",
) -> Mixture:
    """One sampled expert answers; the router is rewarded with the example's loss, less a learned baseline."""
    return Mixture(
        experts=fresh(rank, expert, alpha, dropout),
        routing=Routing(
            score="linear",
            select="reinforce",
            pool=pool,
            losses={"policy": policy, "policy_entropy": policy_entropy, "value": value},
        ),
    )
