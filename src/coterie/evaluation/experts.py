"""The experts of text8: how they are trained, and where the adapters that the package carries are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .suite import Task
from .text8 import base_dir
from .train import Job, Recipe

FULL = Recipe(kind="full", steps=500, learning_rate=3e-4)
LORA = Recipe(kind="lora", steps=300, learning_rate=1e-3)
SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""Task arithmetic's scales to choose from, on validation rows."""

COMMITTED = Path(__file__).parent / "text8_experts"


def jobs(tasks: tuple[Task, ...], recipe: Recipe, fingerprint: str, one_seed: bool = True) -> list[Job]:
    """One training for each task.

    Args:
        tasks: the suite.
        recipe: of every expert, except for the seed.
        fingerprint: of the base's weights.
        one_seed: all experts have the recipe's seed; else the i-th has i more.
    """
    return [
        Job(task, recipe if one_seed else replace(recipe, seed=recipe.seed + i), base_dir(), fingerprint)
        for i, task in enumerate(tasks)
    ]
