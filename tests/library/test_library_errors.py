"""Bad input through the real command line: exit code 2, one sentence, and a library that is as it was."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
import torch
from drawer import library
from safetensors.torch import load_file, save_file

import coterie
from coterie.cli import main


@pytest.fixture
def place(drawer, tmp_path, monkeypatch):
    """A directory with a library of `task` and `general`, and links to what the drawer holds."""
    for name, path in vars(drawer).items():
        (tmp_path / name).symlink_to(path)
    library(drawer, tmp_path / "lib", "task", "general")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; its exit code, what it printed, and what it complained of."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["coterie", "library", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return command


def refused(run, *words: str) -> str:
    code, _, err = run(*words)
    assert code == 2 and err.startswith("coterie: error: ") and err.count("\n") == 1, err
    return err


def test_the_commands(place, run):
    assert run("create", "new", "--base", "base")[0] == 0
    (place / "texts.txt").write_text("one\n\ntwo\n")
    given = ["--description", "what it is for", "--examples", "texts.txt"]
    assert run("add", "new", "the task", "task", *given)[0] == 0
    code, out, _ = run("add", "new", "full", "full", "--rank", "2", "--json")
    assert code == 0 and json.loads(out)["kind"] == "extracted"
    code, out, _ = run("list", "new", "--json")
    assert code == 0 and list(json.loads(out)) == ["the task", "full"]
    assert json.loads(out)["the task"]["description"] == "what it is for"
    assert "the task" in run("list", "new")[1]
    code, out, _ = run("show", "new", "the task", "--json")
    assert json.loads(out)["examples"] == ["one", "two"]
    assert "bert.encoder.layer.0.attention.self.query" in run("show", "new", "the task")[1]
    code, out, _ = run(
        "combine", "new", "subtract", "the task", "full", "--name", "rest", "--set", "scale=0.5", "--json"
    )
    assert code == 0 and json.loads(out)["parameters"] == {"scale": 0.5}
    assert "residual" in run("combine", "new", "ext-sub", "the task", "full", "-n", "less", "--rank", "2")[1]
    assert run("verify", "new")[0] == 0 and json.loads(run("verify", "new", "--json")[1]) == []
    assert run("remove", "new", "full")[0] == 0
    assert list(coterie.library.open("new")) == ["the task", "rest", "less"]
    assert "subtract-factors" in run("operations")[1] and json.loads(run("operations", "--json")[1])


CASES = {
    "a name twice": (["add", "lib", "task", "same"], "holds an expert 'task' already"),
    "no such library": (["list", "nowhere"], "nowhere"),
    "no library": (["list", "base"], "is no library"),
    "an unknown expert": (["show", "lib", "tusk"], "did you mean 'task'"),
    "nothing to remove": (["remove", "lib", "tusk"], "did you mean 'task'"),
    "no such source": (["add", "lib", "new", "nowhere/to/be"], "no such directory"),
    "an adapter of another base": (["add", "lib", "new", "elsewhere"], "fingerprint"),
    "an adapter that is said to be of another base": (["add", "lib", "new", "same", "--base", "other"], "fingerprint"),
    "a full fine-tune of another base": (
        ["add", "lib", "new", "full", "--rank", "2", "--base", "other"],
        "fingerprint",
    ),
    "a full fine-tune without a rank": (["add", "lib", "new", "full"], "say its rank"),
    "a rank for an adapter": (["add", "lib", "new", "same", "--rank", "2"], "is an adapter already"),
    "a rank of nothing": (["add", "lib", "new", "full", "--rank", "0"], "rank is 0"),
    "a base that is none": (["create", "new", "--base", "task"], "is an adapter"),
    "a directory that is nowhere": (["add-all", "lib", "nowhere"], "no such directory"),
    "a directory of no adapters": (["add-all", "lib", "base"], "no directory of an adapter"),
    "a place that is taken": (["create", "lib", "--base", "base"], "exists already"),
    "a name of nothing": (["add", "lib", " ", "same"], "is empty"),
    "a name with a line break": (["add", "lib", "a\nb", "same"], "control characters"),
    "no file of examples": (["add", "lib", "new", "same", "--examples", "nowhere.txt"], "cannot be read"),
    "an empty description": (["add", "lib", "new", "same", "--description", " "], "description is empty"),
    "a parameter without a value": (["combine", "lib", "add", "task", "general", "-n", "x", "--set", "scale"], "'='"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, place, run):
    before = sorted(p for p in (place / "lib").rglob("*") if p.name != ".lock")
    words, says = CASES[case]
    assert says in refused(run, *words)
    assert sorted(p for p in (place / "lib").rglob("*") if p.name != ".lock") == before
    assert not (place / "new").exists() and list(coterie.library.open("lib")) == ["task", "general"]


def changed(file, how):
    content = bytearray(file.read_bytes())
    how(content)
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "expert.json"])
@pytest.mark.parametrize("how", ["a byte", "cut", "gone", "a link"])
def test_verify_names_a_tampered_file(file, how, place, run):
    target = coterie.library.open("lib")["general"].path / file
    if how == "a byte":
        changed(target, lambda content: content.__setitem__(-2, content[-2] ^ 1))
    elif how == "cut":
        changed(target, lambda content: content.__delitem__(slice(-9, None)))
    elif how == "gone":
        target.unlink()
    else:
        shutil.move(target, place / "outside")
        target.symlink_to(place / "outside")
    error = refused(run, "verify", "lib")
    assert "'general'" in error and file in error and "'task'" not in error
    code, out, _ = run("verify", "lib", "--json")
    assert code == 2 and [fault["expert"] for fault in json.loads(out)] == ["general"]


def test_verify_names_tampered_statistics(place, run):
    found = coterie.library.open("lib")
    found.statistics("task", "prototype")
    file = found["task"].path / "statistics/prototype.safetensors"
    changed(file, lambda content: content.__setitem__(-1, content[-1] ^ 1))
    assert "prototype.safetensors" in refused(run, "verify", "lib")
    with pytest.raises(coterie.CoterieError, match="was changed"):
        found.statistics("task", "prototype")


def test_a_changed_expert_is_no_source(place):
    """What was said of its layers is believed only as long as it is what was said."""
    found = coterie.library.open("lib")
    file = found["task"].path / "expert.json"
    file.write_text(file.read_text().replace('"scale": 1.5', '"scale": 9.5'))
    with pytest.raises(coterie.CoterieError, match="was changed since it was added"):
        found.statistics("task", "gram")


def test_a_recipe_takes_no_tampered_adapter(place, tmp_path):
    file = coterie.library.open("lib")["task"].path / "adapter_model.safetensors"
    changed(file, lambda content: content.__setitem__(-1, content[-1] ^ 1))
    recipe = {"method": "arrow", "base": str(place / "base"), "experts": {n: f"lib#{n}" for n in ("task", "general")}}
    with pytest.raises(coterie.CoterieError, match="was changed since it was added to the library"):
        coterie.build(recipe, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def copied(place, name="bad"):
    shutil.copytree(place / "same", place / name)
    return place / name


def test_links_out_of_an_adapter_are_refused(place, run):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        bad = copied(place, f"bad-{file}")
        secret = place / f"secret-{file}"
        shutil.move(bad / file, secret)
        (bad / file).symlink_to(secret)
        assert "leads out of its directory" in refused(run, "add", "lib", "new", str(bad))
        (bad / file).unlink()
        (bad / file).symlink_to(os.path.relpath(secret, bad))
        assert "leads out of its directory" in refused(run, "add", "lib", "new", str(bad))
    assert list(coterie.library.open("lib")) == ["task", "general"]


def test_shards_elsewhere_are_refused(place, run):
    bad = copied(place)
    (bad / "adapter_model.safetensors").rename(place / "shard.safetensors")
    names = load_file(place / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../shard.safetensors")}
    (bad / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert "adapter_model.safetensors" in refused(run, "add", "lib", "new", "bad")


@pytest.mark.parametrize("folder", ["../../task", "/etc", "..", "0123456789abcde/", "0123456789ABCDEF"])
def test_a_manifest_that_leads_elsewhere_is_refused(folder, place, run):
    file = place / "lib/library.json"
    manifest = json.loads(file.read_text())
    manifest["experts"]["task"]["folder"] = folder
    file.write_text(json.dumps(manifest))
    assert "library.json" in refused(run, "list", "lib")
    with pytest.raises(coterie.CoterieError, match="folder"):
        coterie.build(method="smile", base="base", experts={"a": "lib#task"}, out="mixture")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=2),
        lambda m: m.update(more=1),
        lambda m: m.pop("base"),
        lambda m: m["experts"]["task"]["sha256"].update({"../x": "0" * 64}),
        lambda m: m["experts"]["task"].update(ranks="many"),
    ],
)
def test_a_damaged_manifest(change, place, run):
    file = place / "lib/library.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    assert "restore the file" in refused(run, "list", "lib")


@pytest.mark.parametrize("how", ["a link", "gone"])
def test_an_experts_folder_that_is_not_there(how, place, run):
    folder = coterie.library.open("lib")["task"].path
    shutil.move(folder, place / "moved")
    if how == "a link":
        folder.symlink_to(place / "moved")
    says = "leads out of the library" if how == "a link" else "is missing"
    assert says in refused(run, "verify", "lib") and says in refused(run, "show", "lib", "task")
    with pytest.raises(coterie.CoterieError, match=says):
        coterie.build(method="smile", base="base", experts={"a": "lib#task"}, out="mixture")
    assert run("list", "lib")[0] == 0 and run("remove", "lib", "task")[0] == 0 and run("verify", "lib")[0] == 0


def test_recipes_name_what_a_library_holds(place):
    how = dict(method="smile", base="base", out="mixture", parameters={"rank": 2, "gate_rank": 1})
    with pytest.raises(coterie.CoterieError, match="holds no expert 'tasks'; did you mean 'task'"):
        coterie.build(experts={"a": "lib#tasks", "b": "lib#general"}, **how)
    with pytest.raises(coterie.CoterieError, match="is no library"):
        coterie.build(experts={"a": "base#task", "b": "lib#general"}, **how)
    (coterie.library.open("lib")["task"].path / "adapter_model.safetensors").unlink()
    with pytest.raises(coterie.CoterieError, match="is missing"):
        coterie.build(experts={"a": "lib#task", "b": "lib#general"}, **how)
    assert not (place / "mixture").exists()


def test_an_adapter_that_is_not_finite(place, run):
    bad = copied(place) / "adapter_model.safetensors"
    tensors = load_file(bad)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, bad)
    assert "NaN" in refused(run, "add", "lib", "new", "bad")


def test_an_adapter_whose_base_is_nowhere(place, run, drawer):
    bad = copied(place)
    config = json.loads((bad / "adapter_config.json").read_text())
    for base in (None, "org/unheard-of", str(place / "gone")):
        (bad / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert "--base" in refused(run, "add", "lib", "new", "bad")
    assert run("add", "lib", "new", "bad", "--base", str(drawer.base))[0] == 0


def test_a_base_that_changed_or_went(drawer, tmp_path):
    base = shutil.copytree(drawer.base, tmp_path / "base")
    made = coterie.library.create(tmp_path / "lib", base)
    made.add("before", drawer.task)
    tensors = load_file(base / "model.safetensors")
    tensors["bert.pooler.dense.bias"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(coterie.CoterieError, match="has the fingerprint"):
        coterie.library.open(made.path).add("after", drawer.full, rank=2)
    shutil.rmtree(base)
    with pytest.raises(coterie.CoterieError, match="no such directory"):
        coterie.library.open(made.path).add("after", drawer.full, rank=2)
    found = coterie.library.open(made.path)
    assert found.statistics("before", "sigma") and not found.verify()
    with pytest.raises(coterie.CoterieError, match="has the fingerprint"):
        coterie.library.open(made.path, base=drawer.other)
    moved = coterie.library.open(made.path, base=drawer.base)
    moved.combine("less", "negate", ["before"])
    moved.add("full", drawer.full, rank=2)
    coterie.library.open(made.path).add("by hand", drawer.full, rank=2, base=drawer.base)
    assert list(moved) == ["before", "less", "full", "by hand"] and not moved.verify()


def test_a_source_that_is_removed_later_is_not_missed(drawer, tmp_path):
    source = shutil.copytree(drawer.task, tmp_path / "source")
    made = coterie.library.create(tmp_path / "lib", drawer.base)
    made.add("task", source)
    shutil.rmtree(source)
    assert not made.verify() and made.statistics("task", "prototype")


def test_an_adapter_that_adapts_nothing(place, run):
    bad = copied(place) / "adapter_model.safetensors"
    save_file({"base_model.model.classifier.weight": torch.zeros(3, 32)}, bad)
    assert "adapts no layer" in refused(run, "add", "lib", "new", "bad")
