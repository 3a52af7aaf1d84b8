"""Uniform mixing and known experts: the baselines of routing over a library."""

from __future__ import annotations

from ..experts.fit import TruncatedSVD
from ..routing.router import Routing
from .parts import BuiltRank
from .registry import Mixture, method


@method("uniform", cite="the merged-experts baseline of Muqeeth et al. 2024, arXiv:2402.05859")
def uniform(rank: BuiltRank = "full") -> Mixture:
    """All experts answer alike: the average of their deltas, kept as a mixture whose experts can still be named."""
    return Mixture(TruncatedSVD(rank), Routing("level", "given", pool="task"))


@method("oracle", cite="the oracle baseline of Muqeeth et al. 2024, arXiv:2402.05859")
def oracle(rank: BuiltRank = "full") -> Mixture:
    """The expert of the example's task answers: `task_ids`, in the experts' order, or `model.coterie.route`."""
    return Mixture(TruncatedSVD(rank), Routing("task", "given", pool="task"))
