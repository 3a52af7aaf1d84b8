"""A small vision transformer read as CLIP is: class anchors are frozen embeddings of the label texts.

embedding = the class token's last hidden state, scaled to length one; logits = SCALE * embedding @ anchors.T. The
anchors are MiniLM's embeddings of the labels (see `anchors`) through a fixed random projection to the width of the
vision transformer. A random projection keeps angles (Johnson & Lindenstrauss 1984), needs no training, and is the same
for every base, so that images and labels meet in one space that nothing ever moves. [CLIP: Radford et al. 2021,
arXiv:2103.00020, section 3.1; a locked text tower: Zhai et al. 2022, arXiv:2111.07991.]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from .anchors import SCALE, AnchorReader
from .metrics import class_scores
from .reader import told
from .suite import Inputs, Split, Task, weights_sha256


@dataclass
class ImageReader:
    """A `Reader` of images (N, height, width, 3) uint8 by vision transformers (`ViTModel`, whose pooler is not used).

    Args:
        base: directory of the base.
        texts: directory of the sentence encoder that the anchors come from.
        device: where batches go.
    """

    base: Path
    texts: Path
    device: str = "cpu"
    blocks: str = "layers"
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.base_model()
        self._anchors: dict[tuple[str, ...], Tensor] = {}
        self.settings = {"logit_scale": SCALE, "anchors": weights_sha256(self.texts)}

    @cached_property
    def _sentences(self) -> AnchorReader:
        return AnchorReader(self.texts)

    def base_model(self) -> nn.Module:
        """A fresh copy of the base in float32, in eval mode."""
        return AutoModel.from_pretrained(self.base, dtype=torch.float32).eval().to(self.device)

    def anchors(self, labels: tuple[str, ...]) -> Tensor:
        """(C, D) unit-length anchors of the label texts."""
        if labels not in self._anchors:
            width = cast("Any", self.model).config.hidden_size
            self._anchors[labels] = projected(self._sentences.anchors(labels), width).to(self.device)
        return self._anchors[labels]

    def sizes(self, inputs: Inputs) -> np.ndarray:
        """(N,) int64: all images are the same size."""
        return np.ones(len(inputs), dtype=np.int64)

    def batches(self, inputs: Inputs, size: int = 128) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """(B,) row numbers and the batch (`pixel_values`) of those rows."""
        for start in range(0, len(inputs), size):
            rows = np.arange(start, min(start + size, len(inputs)))
            yield rows, {"pixel_values": pixels(cast("np.ndarray", inputs)[rows], self.device)}

    def loss(self, model: nn.Module, task: Task, rows: Split) -> Tensor:
        """() cross-entropy of the rows."""
        batch = {"pixel_values": pixels(cast("np.ndarray", rows.inputs), self.device)}
        logits = SCALE * embed(model, batch) @ self.anchors(task.labels).T
        return nn.functional.cross_entropy(logits, torch.as_tensor(rows.targets, device=self.device))

    def logits(self, task: Task, output: Any) -> Tensor:
        """(1, C) the scaled cosines, from the output for one image."""
        embedding = nn.functional.normalize(output.last_hidden_state[:, 0], dim=-1)
        return SCALE * embedding @ self.anchors(task.labels).T

    @torch.inference_mode()
    def embeddings(self, model: nn.Module, inputs: Inputs) -> np.ndarray:
        """(N, D) float32 unit-length embeddings of the images."""
        parts = []
        for rows, batch in self.batches(inputs):
            with told(model, (inputs[row] for row in rows), self.encoder):
                parts.append(embed(model, batch).float().cpu().numpy())
        return np.concatenate(parts)

    def features(self, inputs: Inputs) -> np.ndarray:
        """(N, D) float32 unit-length embeddings by the base."""
        return self.embeddings(self.model, inputs)

    def encoder(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, D) float32, by what routers that retrieve know images: the base's own features."""
        return self.features(np.stack(images))

    def scores(self, model: nn.Module, task: Task, split: Split) -> np.ndarray:
        """(N,) float64: whether the nearest anchor is the row's class."""
        logits = self.embeddings(model, split.inputs) @ self.anchors(task.labels).cpu().numpy().T
        return class_scores(logits, cast("np.ndarray", split.targets), task.metric)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, D) unit-length last hidden states of the class token."""
    return nn.functional.normalize(model(**batch).last_hidden_state[:, 0], dim=-1)


def pixels(images: np.ndarray, device: str = "cpu") -> Tensor:
    """(B, height, width, 3) uint8 -> (B, 3, height, width) float32 from -1 to 1."""
    return torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 127.5 - 1


def projected(embeddings: Tensor, width: int) -> Tensor:
    """(C, D) -> (C, width) of unit length, by a Gaussian matrix that depends on the shapes alone."""
    matrix = np.random.default_rng(0).standard_normal((embeddings.shape[1], width)).astype(np.float32)
    return nn.functional.normalize(embeddings.cpu() @ torch.from_numpy(matrix), dim=-1)
