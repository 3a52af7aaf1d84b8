"""A sentence encoder read as CLIP is: class anchors are its own embeddings of the label texts, and they never move.

embedding = masked mean of the last hidden states, scaled to length one; logits = SCALE * embedding @ anchors.T. No
head is trained, so the base is a true zero-shot classifier and every expert answers in the same space. [CLIP: Radford
et al. 2021, arXiv:2103.00020, section 3.1; the embedding is that of Sentence-BERT, Reimers & Gurevych 2019,
arXiv:1908.10084.]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from .ladder import blocks_of
from .metrics import class_scores
from .reader import most_tokens, told
from .suite import Inputs, Split, Task

SCALE = 20.0
MAX_TOKENS = 32


@dataclass
class AnchorReader:
    """A `Reader` of texts: the base's tokenizer, and the frozen anchors that any model of its architecture is read by.

    Args:
        base: directory of the base.
        device: where batches go.
        max_tokens: of a text; what is longer, or than the base has positions for, is cut.
    """

    base: Path
    device: str = "cpu"
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = self.base_model()
        self.blocks = blocks_of(self.model)
        self.max_tokens = most_tokens(self.model, self.max_tokens)
        self.settings: dict[str, Any] = {"logit_scale": SCALE, "max_tokens": self.max_tokens}
        self._anchors: dict[tuple[str, ...], Tensor] = {}

    def base_model(self) -> nn.Module:
        """A fresh copy of the base in float32, in eval mode."""
        return AutoModel.from_pretrained(self.base, dtype=torch.float32).eval().to(self.device)

    def anchors(self, labels: tuple[str, ...]) -> Tensor:
        """(C, D) unit-length embeddings of the label texts by the base."""
        if labels not in self._anchors:
            with torch.inference_mode():
                anchors = embed(self.model, self.batch(self.tokenize(labels)))
            self._anchors[labels] = anchors.clone()
        return self._anchors[labels]

    def tokenize(self, texts: Inputs) -> list[list[int]]:
        """Token ids of each text, at most `max_tokens`."""
        return self.tokenizer(list(cast("tuple[str, ...]", texts)), truncation=True, max_length=self.max_tokens)[
            "input_ids"
        ]

    def sizes(self, inputs: Inputs) -> np.ndarray:
        """(N,) int64: tokens of each text."""
        return np.array([len(row) for row in self.tokenize(inputs)])

    def batch(self, ids: list[list[int]]) -> dict[str, Tensor]:
        """(B, T) int64 `input_ids` and `attention_mask`, padded on the right."""
        padded = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        return {name: padded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def batches(self, inputs: Inputs, size: int = 128) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """(B,) row numbers and the batch of those rows; rows of similar length come together."""
        ids = self.tokenize(inputs)
        order = np.argsort([len(row) for row in ids], kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield rows, self.batch([ids[row] for row in rows])

    def features(self, inputs: Inputs) -> np.ndarray:
        """(N, D) float32 unit-length embeddings by the base."""
        return self.embeddings(self.model, inputs)

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, texts: Inputs) -> np.ndarray:
        """(N, D) float32 unit-length embeddings of the texts."""
        order: list[int] = []
        parts: list[np.ndarray] = []
        for rows, batch in self.batches(texts):
            order.extend(rows.tolist())
            with told(model, (texts[row] for row in rows)):
                parts.append(embed(model, batch).float().cpu().numpy())
        return np.concatenate(parts)[np.argsort(order)]

    def loss(self, model: nn.Module, task: Task, rows: Split) -> Tensor:
        """() the cross-entropy of the scaled cosines."""
        logits = SCALE * embed(model, self.batch(self.tokenize(rows.inputs))) @ self.anchors(task.labels).T
        return nn.functional.cross_entropy(logits, torch.as_tensor(rows.targets, device=self.device))

    def logits(self, task: Task, output: Any) -> Tensor:
        """(1, C) the scaled cosines, from the output for one text."""
        embedding = nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)
        return SCALE * embedding @ self.anchors(task.labels).T

    def scores(self, model: nn.Module, task: Task, split: Split) -> np.ndarray:
        """(N,) float64: 1 where the model's nearest anchor is the row's class, else 0."""
        cosines = self.embeddings(model, split.inputs) @ self.anchors(task.labels).cpu().numpy().T
        return class_scores(cosines, np.asarray(split.targets), task.metric)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, D) unit-length masked means of the last hidden states."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
