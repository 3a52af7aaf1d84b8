"""An adapter of another base is told of, as far as that can be told."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import coterie
from zoo import base_model, fine_tune, make_adapter, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lineage")
    base = base_model("bert")
    save(base, folder / "base")
    save(fine_tune(base, 1), folder / "other")
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
