"""What is put into a library comes out of it: as a PEFT adapter, through recipes, elsewhere, from the Hub."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from drawer import deltas, library
from safetensors.torch import load_file

import coterie
from coterie.sources.locate import hub_id, locate
from zoo import inputs, merged

NAMES = ("task", "general", "same")


@pytest.fixture(scope="module")
def shelf(drawer, tmp_path_factory):
    """A library that nothing changes."""
    return library(drawer, tmp_path_factory.mktemp("shelf") / "library", *NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_stays_what_peft_makes_of_it(name, drawer, shelf):
    source, kept = getattr(drawer, name), shelf[name].path
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (kept / file).read_bytes() == (source / file).read_bytes()
    batch = inputs("bert")
    with torch.no_grad():
        ours, theirs = (merged(drawer.base, folder, "bert")(**batch).logits for folder in (kept, source))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_factors_need_neither_base_nor_source(name, drawer, shelf):
    expert = shelf[name]
    wanted = deltas(getattr(drawer, name))
    assert set(expert.layers) == set(wanted)
    for path, delta in wanted.items():
        factors = expert.factors(path)
        np.testing.assert_allclose((factors.up @ factors.down).numpy(), delta, atol=1e-12)
        assert expert.layers[path].shape == delta.shape
        assert expert.layers[path].rank == factors.up.shape[1]


def test_the_manifest_says_what_is_there(drawer, shelf):
    entries = coterie.library.open(shelf.path).entries()
    assert list(entries) == list(shelf) == list(NAMES)
    assert len(shelf) == 3 and "task" in shelf and "nobody" not in shelf
    assert entries["task"].ranks == [4, 4] and entries["same"].ranks == [2, 4]
    assert entries["general"].targets == ["dense", "query"] and entries["general"].alpha == 6
    assert entries["task"].source == str(drawer.task) and entries["task"].kind == "adapter"
    assert shelf["task"].saved and all("classifier" in name for name in shelf["task"].saved)
    about = json.loads(json.dumps(shelf["general"].to_dict()))
    assert about["base"]["fingerprint"] == shelf.base.fingerprint and about["architecture"].startswith("Bert")


def test_the_fingerprint_is_that_of_the_base(drawer, tmp_path, shelf):
    shutil.copytree(drawer.base, tmp_path / "moved")
    again = coterie.library.create(tmp_path / "again", tmp_path / "moved")
    assert again.base.fingerprint == shelf.base.fingerprint
    other = coterie.library.create(tmp_path / "of-another", drawer.other)
    assert other.base.fingerprint != shelf.base.fingerprint


def test_a_copy_of_the_base_is_the_base(drawer, tmp_path):
    shutil.copytree(drawer.base, tmp_path / "moved")
    made = coterie.library.create(tmp_path / "library", tmp_path / "moved")
    made.add("by its own account", drawer.task)
    made.add("as somebody says", drawer.general, base=drawer.base)
    assert len(made) == 2


def test_names_are_free_text(drawer, tmp_path):
    made = coterie.library.create(tmp_path / "library", drawer.base)
    names = ["../../up", "a/b", "Stimmung: ä#1", "  spaced  ", "x" * 300, "a", "A", '"quoted" [bold]']
    for name in names:
        made.add(name, drawer.task)
    assert list(coterie.library.open(made.path)) == names
    assert sorted(p.parent.name for p in made.path.glob("experts/*/adapter_config.json")) == sorted(
        entry.folder for entry in made.entries().values()
    )
    assert locate(f"{made.path}#Stimmung: ä#1").path == made["Stimmung: ä#1"].path
    assert not made.verify()


@pytest.mark.parametrize("how", [{"rank": 3}, {"residual": 0.4}])
def test_a_full_fine_tune_is_extracted(how, drawer, tmp_path):
    made = coterie.library.create(tmp_path / "library", drawer.base)
    expert = made.add("full", drawer.full, description="of all", examples=["x", "y"], head="save", **how)
    coterie.extract(drawer.base, drawer.full, tmp_path / "alone", head="save", **how)
    alone = load_file(tmp_path / "alone/adapter_model.safetensors")
    kept = load_file(expert.path / "adapter_model.safetensors")
    assert alone.keys() == kept.keys() and all(torch.equal(alone[n], kept[n]) for n in alone)
    assert made.entries()["full"].kind == "extracted" and made.entries()["full"].description == "of all"
    assert expert.examples == ["x", "y"] and expert.facts["provenance"]["rank"] == how.get("rank")
    assert not made.verify() and expert.checkpoint.tensors


def test_a_whole_directory_is_added(drawer, tmp_path):
    """Known names are left alone, so that it can be called again."""
    adapters, names = tmp_path / "adapters", sorted(NAMES)
    for name in names:
        shutil.copytree(getattr(drawer, name), adapters / name)
    (adapters / "no adapter").mkdir()
    shutil.copytree(getattr(drawer, names[0]), adapters / ".hidden")
    made, said = coterie.library.create(tmp_path / "library", drawer.base), []
    (adapters / names[-1] / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(coterie.CoterieError, match=names[-1]):
        made.add_all(adapters, say=said.append)
    assert said == list(made) == names[:-1]
    shutil.rmtree(adapters / names[-1])
    shutil.copytree(getattr(drawer, names[-1]), adapters / names[-1])
    assert made.add_all(adapters) == names[-1:]
    assert made.add_all(adapters) == []
    with pytest.raises(coterie.CoterieError, match="no directory of an adapter"):
        made.add_all(drawer.base)


def test_removed_is_gone_and_the_name_is_free(drawer, tmp_path):
    made = library(drawer, tmp_path / "library", "task", "general")
    folder = made["task"].path
    made.remove("task")
    assert list(made) == ["general"] and not folder.exists() and drawer.task.is_dir()
    made.add("task", drawer.same)
    assert made["task"].entry.sha256 != made["general"].entry.sha256 and list(made) == ["general", "task"]


def test_what_another_process_adds_is_seen(drawer, tmp_path):
    one = library(drawer, tmp_path / "library", "task")
    two = coterie.library.open(one.path)
    two.add("general", drawer.general)
    assert list(one) == ["task", "general"]
    one.remove("task")
    assert list(two) == ["general"]


def test_a_recipe_names_experts_of_a_library(drawer, shelf, tmp_path):
    how = dict(method="smile", base=str(drawer.base), parameters={"rank": 4, "gate_rank": 2})
    coterie.build(out=tmp_path / "from-library", experts={n: f"{shelf.path}#{n}" for n in NAMES}, **how)
    coterie.build(out=tmp_path / "from-sources", experts={n: str(getattr(drawer, n)) for n in NAMES}, **how)
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("from-library", "from-sources"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    card = (tmp_path / "from-library/README.md").read_text()
    assert "base_model" not in card.split("---")[1]
    coterie.merge(method="concatenate", base=str(drawer.base), out=tmp_path / "merged",
                  experts={n: f"{shelf.path}#{n}" for n in ("general", "same")})  # fmt: skip
    assert (tmp_path / "merged/adapter_model.safetensors").is_file()


def test_a_source_names_its_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawer").mkdir()
    assert hub_id("drawer") is hub_id("drawer#sentiment") is None
    assert hub_id("org/lib@main#senti@ment") == hub_id("org/lib") == "org/lib"


@pytest.fixture
def on_the_hub(shelf, tmp_path, monkeypatch):
    """The library as the Hub's cache keeps a snapshot: every file a link into `blobs`."""
    from huggingface_hub import constants

    repo, sha = tmp_path / "cache/models--org--shelf", "0123456789abcdef0123456789abcdef01234567"
    shelf["task"].path.joinpath("statistics").mkdir(exist_ok=True)
    for number, file in enumerate(p for p in sorted(shelf.path.rglob("*")) if p.is_file()):
        blob = repo / f"blobs/{number}"
        link = repo / "snapshots" / sha / file.relative_to(shelf.path)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(sha)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return "org/shelf", sha


def test_a_library_on_the_hub_is_read(on_the_hub, drawer, shelf):
    repo, sha = on_the_hub
    found = coterie.library.open(repo)
    assert list(found) == list(NAMES) and found.place.revision == sha
    assert not found.verify(["task"])
    ours, theirs = found.statistics("general", "sigma"), shelf.statistics("general", "sigma")
    assert all(torch.equal(ours[path], theirs[path]) for path in theirs)
    place = locate(f"{repo}@{sha}#task")
    assert place.path == found["task"].path and place.revision == sha
    with pytest.raises(coterie.CoterieError, match="read only"):
        found.add("another", drawer.task)
    with pytest.raises(coterie.CoterieError, match="read only"):
        found.remove("task")


def test_module_paths_are_found_in_other_classes_of_the_family(shelf):
    """What a router does that is built into a class other than the one an expert was added under."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    from coterie.sources.names import Skeleton

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    bare, classifier = Skeleton(BertModel, config), Skeleton(BertForSequenceClassification, config)
    assert shelf["task"].prefix == "bert"
    for path in shelf["task"].layers:
        there = bare.in_memory(f"{path}.weight")[0]
        assert there == f"{path.removeprefix('bert.')}.weight" and there in bare.tensors
        assert classifier.in_memory(there)[0] == f"{path}.weight"
