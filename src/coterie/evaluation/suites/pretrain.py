"""Pretrain a suite's own base into the cache: once, resumable, without pickles."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from .. import checkpoint
from ..suite import digest, fingerprint

RECORD = "pretraining.json"


def pretrained(
    cache: Path,
    name: str,
    settings: dict[str, Any],
    build: Callable[[], Any],
    loss: Callable[[nn.Module, int], Tensor],
    extras: Callable[[Path], object] = lambda directory: None,
    device: str = "cpu",
) -> Path:
    """The directory of a pretrained model; trains it first if the cache lacks it, from its last checkpoint on.

    Args:
        cache: its `bases/` holds the directory, named by the content of `settings`.
        name: the directory's first part.
        settings: all that makes the model; `steps` and the peak `learning_rate` (AdamW, weight decay 0.01, warm-up
            for 6% of the steps, cosine to zero) are used here.
        build: makes the untrained transformers model; the seed is set before.
        loss: (model, step) -> the loss of that step's batch, which depends on nothing else, so that a stopped training
            goes on as if it had not been stopped.
        extras: writes what else belongs into the directory (a tokenizer).
        device: torch device of the training.
    """
    directory = cache / "bases" / f"{name}-{digest(settings)[:16]}"
    if directory.exists():
        if _whole(directory):
            return directory
        warnings.warn(f"{directory} is damaged: {name} is pretrained anew", stacklevel=2)
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_name(f".{directory.name}.safetensors")
    torch.manual_seed(0)
    model = build().train().to(device)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings["learning_rate"], weight_decay=0.01)
    steps = settings["steps"]
    done = checkpoint.resume(file, parameters, optimizer) or 0
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"pretraining {name}", total=steps, completed=done, visible=done < steps)
        for step in range(done, steps):
            rate = settings["learning_rate"] * _warm_cosine(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = loss(model, step)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            progress.update(bar, advance=1)
            if (step + 1) % checkpoint.EVERY == 0:
                progress.update(bar, description=f"pretraining {name}, loss {value.item():.3f}")
                checkpoint.save(file, parameters, optimizer, step + 1)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory.parent))
    try:
        model.eval().save_pretrained(unfinished)
        extras(unfinished)
        (unfinished / RECORD).write_text(json.dumps({"sha256": fingerprint(unfinished)}) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    file.unlink(missing_ok=True)
    return directory


def _whole(directory: Path) -> bool:
    """Whether a pretrained model is as it was written."""
    try:
        return bool(json.loads((directory / RECORD).read_text())["sha256"] == fingerprint(directory))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _warm_cosine(step: int, steps: int) -> float:
    warmup = max(1, round(0.06 * steps))
    return min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / max(1, steps - warmup))))
