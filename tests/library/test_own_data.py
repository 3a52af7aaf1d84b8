"""What experts get of their own data by the command line: gates, activations, embeddings."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from drawer import library
from transformers import BertTokenizer

import coterie
from coterie.cli import app
from coterie.errors import CoterieError
from coterie.library.data import read
from coterie.library.vectors import average_activation, train_gates


@pytest.fixture(scope="module")
def texts(drawer, tmp_path_factory):
    """A file of texts with classes, and beside it the base with a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    shutil.copytree(drawer.base, folder / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "a", "film", "you", "are"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    rows = [f"{'what a film' if i % 2 else 'you are a film'},{'abc'[i % 3]}" for i in range(9)]
    (folder / "rows.csv").write_text("text,class\n" + "\n".join(rows))
    return folder / "rows.csv"


def run(*words):
    """What a command prints as JSON."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["library", *map(str, words), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_by_the_command_line_as_in_python(drawer, texts, tmp_path):
    made = library(drawer, tmp_path / "library", "task", "general")
    how = ["--task", "text-classification", "--target", "class", "--base", texts.parent / "base"]
    run("train-gates", made.path, "task", texts, *how, "--steps", 3, "--batch-size", 4)
    run("average-activation", made.path, "task", texts, *how)
    torch.manual_seed(0)
    model, batches = read(str(texts.parent / "base"), "text-classification", texts, target="class", batch_size=4)
    gates = train_gates(model, made["task"], batches, 3, 5e-3)
    found = made.statistics("task", "gate")
    assert found.keys() == gates.keys() == made["task"].layers.keys()
    for path, gate in gates.items():
        assert gate.any()
        torch.testing.assert_close(found[path], gate)
    model, batches = read(str(texts.parent / "base"), "text-classification", texts, target="class", batch_size=2)
    for path, mean in average_activation(model, made["task"], batches).items():
        torch.testing.assert_close(made.statistics("task", "activation")[path], mean, atol=1e-5, rtol=1e-5)


def test_the_head_is_the_experts_own(drawer, texts, tmp_path):
    """An adapter that holds a head trains its gates under it; the model that was given stays."""
    made = coterie.library.create(tmp_path / "library", drawer.base)
    made.add("full", drawer.full, rank=3, head="save")
    saved = {name: made["full"].checkpoint.read(disk) for name, disk in made["full"].saved.items()}
    assert any(name.startswith("classifier") for name in saved)
    model, batches = read(str(texts.parent / "base"), "text-classification", texts, target="class")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = train_gates(model, made["full"], batches, 2, 5e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    state = dict(model.named_parameters())
    for name, tensor in saved.items():
        state[name].data = tensor.clone()
    _, batches = read(str(texts.parent / "base"), "text-classification", texts, target="class")
    for path, gate in train_gates(model, made["full"], batches, 2, 5e-3).items():
        torch.testing.assert_close(given[path], gate)


def test_refusals(drawer, texts, tmp_path):
    base = str(texts.parent / "base")
    with pytest.raises(CoterieError, match="unknown task 'text'"):
        read(base, "text", texts)
    with pytest.raises(CoterieError, match="no column 'words'"):
        read(base, "text-classification", texts, "words", "class")
    with pytest.raises(CoterieError, match=r"data\.target is missing"):
        read(base, "text-classification", texts)
    with pytest.raises(CoterieError, match="'c' in column 'class' is no label"):
        read(base, "text-classification", texts, "text", "class", ["a", "b"])
    made = library(drawer, tmp_path / "library", "task", "dora")
    model, batches = read(base, "text-classification", texts, "text", "class")
    with pytest.raises(CoterieError, match="no plain pair of factors"):
        made.average_activation("dora", model, batches)
    with pytest.raises(CoterieError, match=r"holds no expert 'tusk'.*task"):
        made.train_gates("tusk", model, batches)
    with pytest.raises(CoterieError, match="come once"):
        made.train_gates("task", model, (batch for batch in batches))
    made.add("full", drawer.full, rank=3, head="save")
    model, batches = read(base, "text-classification", texts, "text", "class", ["a", "b", "c", "d"])
    with pytest.raises(CoterieError, match="the head that the expert was trained with"):
        made.train_gates("full", model, batches)
