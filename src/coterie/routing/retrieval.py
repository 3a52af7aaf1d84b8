"""Retrieval: experts are chosen for a whole example, by the embedding of its text, before the model is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CoterieError
from .call import Call
from .precise import precise


class Embeddings(nn.Module):
    """Text embeddings of the experts of a mixture, and the cosines of other texts with them.

    Args:
        width: of an embedding.
        counts: how many each expert has; their nearest counts.
        encoder: by what they were made.
    """

    def __init__(self, width: int, counts: Sequence[int], encoder: str):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(counts), width), requires_grad=False)
        self.counts, self.encoder = list(counts), encoder

    @precise
    def forward(self, texts: Tensor) -> Tensor:
        """(n, experts) float32, of each text's embedding (n, width) and an expert's nearest the cosine."""
        cosines = F.linear(F.normalize(texts.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))
        return torch.stack([part.amax(-1) for part in cosines.split(self.counts, dim=-1)], dim=-1)


class Retrieval(nn.Module):
    """No score of the layer's: gates come with the call (`model.coterie.retrieve`). Options are those of `Embeddings`.

    Raises:
        CoterieError: they do not.
    """

    reads = "call"

    def __init__(self, _: int, experts: int, /, **options: Any):
        super().__init__()

    def forward(self, call: Call, layer: int) -> Tensor:
        raise CoterieError(
            "this mixture retrieves experts by each example's text, and the call comes without",
            "model.coterie.retrieve",
            "say the texts, one for each row: `with model.coterie.retrieve(texts): model(**batch)`",
        )
