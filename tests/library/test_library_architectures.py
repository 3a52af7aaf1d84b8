"""Transposed weights, renamed modules, two stacks: what is added and combined is what PEFT makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from drawer import state

import coterie
from zoo import base_model, load_dense, make_adapter, merged, save


@pytest.mark.parametrize("arch", ["gpt2", "vit", "t5", "llama"])
def test_subtraction(arch, tmp_path):
    save(base_model(arch), tmp_path / "base")
    for seed, rank in ((1, 2), (2, 5)):
        make_adapter(tmp_path / "base", tmp_path / str(rank), seed, rank, arch=arch)
    shelf = coterie.library.create(tmp_path / "library", tmp_path / "base")
    shelf.add("task", tmp_path / "2")
    shelf.add("general", tmp_path / "5")
    shelf.combine("rest", "subtract", ["task", "general"], scale=0.5)
    base = state(load_dense(tmp_path / "base", arch))
    task, general, rest = (state(merged(tmp_path / "base", shelf[n].path, arch)) for n in ("task", "general", "rest"))
    changed = 0
    for name in base:
        wanted = task[name] - 0.5 * (general[name] - base[name])
        changed += not np.allclose(wanted, base[name])
        np.testing.assert_allclose(rest[name], wanted, atol=1e-5, err_msg=name)
    assert changed >= len(shelf["task"].layers) > 0
