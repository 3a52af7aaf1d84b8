"""An adapter of another base is told of, as far as that can be told."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import coterie
from zoo import base_model, fine_tune, make_adapter, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    base = base_model("bert")
    save(base, folder / "base")
    save(fine_tune(base, 1), folder / "other")
    save(copy.deepcopy(base).bfloat16(), folder / "narrow")
    broken = copy.deepcopy(base)
    torch.nn.init.constant_(broken.bert.encoder.layer[0].attention.self.query.weight, float("nan"))
    save(broken, folder / "damaged")
    make_adapter(folder / "base", folder / "adapter", 3, arch="bert")
    return folder


CASES = {
    "the same directory": ("base", None),
    "the same weights elsewhere": ("copy", None),
    "another model that is here": (
        "other",
        "was trained on .*other, another model than the base: its .*weight differs",
    ),
    "a name that leads nowhere": ("/nowhere/model", None),
    "a Hub id, and the base a directory": ("org/model", None),
    "no name": (None, None),
    "the same weights in another dtype": ("narrow", None),
    "a damaged directory": ("damaged", None),
    "a directory that holds no model": ("adapter", None),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_the_adapter_names(case: str, folder: Path, tmp_path: Path) -> None:
    said, wanted = CASES[case]
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    shutil.copytree(here / "base", here / "copy")
    if said and (here / said).is_dir():
        said = str(here / said)
    found = notes(here, said, tmp_path / "out")
    assert len(found) == (0 if wanted is None else 2)  # one for each of the two experts
    assert all(re.search(wanted or "", text) for text in found)


def notes(here: Path, said: str | None, out: Path) -> list[str]:
    file = here / "adapter" / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": said}))
    report = coterie.build(
        method="arrow",
        base=str(here / "base"),
        experts={"a": str(here / "adapter"), "b": str(here / "adapter")},
        out=out,
    )
    return [text for text in report.warnings if "trained on" in text]


def test_hub_ids_are_told_apart_by_the_repositorys_name(folder: Path) -> None:
    from coterie.building.trained_on import base_notes
    from coterie.sources.locate import Location

    def notes(said: str) -> int:
        adapter: Any = SimpleNamespace(name="a", adapted=[], config={"base_model_name_or_path": said})
        return len(
            base_notes(Location(folder / "base", "google-bert/bert-base-uncased", "abc"), cast(Any, None), [adapter])
        )

    assert notes("google-bert/bert-base-cased") == 1
    for alike in ("google-bert/bert-base-uncased", "bert-base-uncased", "/scratch/me/bert", "../models/bert"):
        assert notes(alike) == 0
