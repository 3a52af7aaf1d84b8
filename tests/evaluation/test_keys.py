"""What is kept is of the very models that are compared: their weights, their heads, their configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

pytest.importorskip("datasets")

from test_own import world  # noqa: F401 (a fixture)

from coterie.evaluation.compare import compare


def other_head(expert: Path) -> None:
    file = expert / "model.safetensors"
    save_file({n: -t if "classifier" in n else t for n, t in load_file(file).items()}, file, {"format": "pt"})


def other_labels(expert: Path) -> None:
    config = json.loads((expert / "config.json").read_text())
    names = list(config["id2label"].values())[::-1]
    config["id2label"], config["label2id"] = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    (expert / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [other_head, other_labels])
def test_a_changed_expert_is_scored_again(
    change: Callable[[Path], None],
    world: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    second = tmp_path / "second"
    shutil.copytree(world["paths"]["second"], second)
    other_labels(second)
    other_labels(second)  # as it was, with names
    suite = {**world["suite"], "experts": {**world["suite"]["experts"], "second": str(second)}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))

    def skills(cache: str) -> list[Any]:
        found = compare(tmp_path / "suite.yaml", "average", tmp_path / "out", cache=tmp_path / cache)
        return [result["skill"] for result in found["comparisons"][0]["results"]]

    before = skills("cache")
    change(second)
    after = skills("cache")
    assert after != before
    assert after == skills("fresh")
