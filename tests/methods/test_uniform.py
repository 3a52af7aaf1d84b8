"""The baselines of routing over a library: all experts alike, and the known expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_library import apart, batch, drawer, mixture_of

import coterie

ARCHS = ("bert", "llama", "gpt2", "t5")


@pytest.fixture(scope="module")
def drawers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {arch: drawer(tmp_path_factory.mktemp(arch), arch) for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_uniform_is_the_average_of_the_deltas(arch: str, drawers: Any, tmp_path: Path) -> None:
    """An expert that leaves a layer alone counts as zero there."""
    recipe, given = drawers[arch], batch(arch)
    coterie.build(method="uniform", out=tmp_path / "m", **recipe)
    got = coterie.load(str(tmp_path / "m")).double()
    want = mixture_of(arch, recipe, None, weights=torch.full((3, 3), 1 / 3))
    for path in ("auto", "stacked", "grouped"):
        with got.coterie.use_path(path):
            assert apart(arch, got, want, given) < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_oracle_gives_each_example_its_expert(arch: str, drawers: Any, tmp_path: Path) -> None:
    recipe, given = drawers[arch], batch(arch)
    coterie.build(method="oracle", out=tmp_path / "m", **recipe)
    got = coterie.load(str(tmp_path / "m")).double()
    tasks = torch.tensor([2, 0, 1])
    want = mixture_of(arch, recipe, None, weights=torch.eye(3)[tasks])
    assert apart(arch, got, want, given, task_ids=tasks) < 1e-5
    for i, name in enumerate(got.coterie.expert_names):
        one = mixture_of(arch, recipe, None, weights=torch.eye(3)[[i, i, i]])
        with got.coterie.route(name):
            assert apart(arch, got, one, given) < 1e-5


def test_oracle_asks_for_the_task(drawers: Any, tmp_path: Path) -> None:
    coterie.build(method="oracle", out=tmp_path / "m", **drawers["bert"])
    got = coterie.load(str(tmp_path / "m"))
    with pytest.raises(coterie.CoterieError, match="task_ids"):
        got(**batch("bert"))
    with pytest.raises(coterie.CoterieError, match="there are 3 tasks"):
        got(**batch("bert"), task_ids=torch.tensor([0, 1, 3]))
