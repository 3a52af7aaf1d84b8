"""Clusters of a library, against the paper's steps in numpy, and their merges."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
import torch
from drawer import deltas, library, raw
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import coterie
from coterie.cli import app
from coterie.library.clusters import embeddings
from zoo import base_model, make_adapter

GROUPS = [["a0", "b0", "c0"], ["a1", "b1"], ["a2"]]


@pytest.fixture(scope="module")
def grouped(drawer, tmp_path_factory):
    """A library whose experts are noisy copies of three, of which one has a rank and targets of its own."""
    root = tmp_path_factory.mktemp("grouped")
    made = coterie.library.create(root / "library", drawer.base)
    for name in ("a0", "a1", "b0", "a2", "b1", "c0"):
        group = int(name[1])
        rank, targets = (2, ["value"]) if group == 2 else (4, ["query", "value"])
        make_adapter(drawer.base, root / name, group, rank, targets, arch="bert")
        file = root / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(ord(name[0]))
        tensors = {k: t + 0.02 * torch.randn(t.shape, generator=generator) for k, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        made.add(name, root / name)
    return made


def naive(folders, keep):
    """Unit vectors of all parameters, those below an expert's quantile set to zero: their cosines."""
    parts = [raw(folder) for folder in folders]
    most = {path: max(p[path][1].shape[0] for p in parts if path in p) for p in parts for path in p}
    rows = []
    for part in parts:
        row, own = [], []
        for path, rank in most.items():
            shapes = next(p[path] for p in parts if path in p)
            a, b = np.zeros((rank, shapes[1].shape[1])), np.zeros((shapes[0].shape[0], rank))
            if path in part:
                up, down, _ = part[path]
                a[: len(down)], b[:, : up.shape[1]] = down, up
                own += [abs(down).ravel(), abs(up).ravel()]
            row += [a.ravel(), b.ravel()]
        row = np.concatenate(row)
        least = np.sort(np.concatenate(own))[::-1][round(keep * sum(map(len, own))) - 1]
        row = np.where(abs(row) >= least, row, 0)
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows) @ np.stack(rows).T


@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_embeddings_keep_the_cosines(drawer, grouped, tmp_path, keep):
    """Unequal ranks and targets; as many dimensions as experts lose nothing."""
    made = library(drawer, tmp_path / "library", "task", "general", "same")
    points = embeddings(made, keep=keep)
    want = naive([drawer.task, drawer.general, drawer.same], keep)
    np.testing.assert_allclose(points @ points.T, want, atol=1e-5)
    fewer = embeddings(grouped, keep=keep, dimensions=3)
    assert fewer.shape == (6, 3)
    np.testing.assert_allclose(np.linalg.norm(fewer, axis=1), 1)


def test_finds_what_was_copied(grouped):
    assert coterie.library.cluster(grouped, 3) == GROUPS
    assert coterie.library.cluster(grouped, 6) == [["a0"], ["a1"], ["b0"], ["a2"], ["b1"], ["c0"]]
    assert coterie.library.cluster(grouped, 1) == [list(grouped)]


def test_merges_are_means_of_deltas(grouped, tmp_path):
    merged = coterie.library.merge_clusters(grouped, GROUPS, tmp_path / "merged")
    assert list(merged) == ["cluster 0", "cluster 1", "cluster 2"]
    assert merged.base.fingerprint == grouped.base.fingerprint and not merged.verify()
    for number, names in enumerate(GROUPS):
        got, members = deltas(merged[f"cluster {number}"].path), [deltas(grouped[name].path) for name in names]
        for path in got:
            np.testing.assert_allclose(got[path], sum(each[path] for each in members) / len(names), atol=1e-6)
    again = coterie.library.open(tmp_path / "merged")
    assert again["cluster 0"].entry.description == "of a0, b0, c0"
    low = coterie.library.merge_clusters(grouped, GROUPS, tmp_path / "low", rank=2)
    assert {layer.rank for name in low for layer in low[name].layers.values()} == {2}


def test_experts_are_trained_on_all_data_of_their_clusters(grouped, tmp_path):
    """And a cluster of one keeps its expert."""
    model = base_model("bert").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    data = {}
    for label, name in enumerate(("a1", "b1")):
        ids = torch.randint(4, 60, (4, 6), generator=draw)
        data[name] = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full((4,), label)}]
    made = coterie.library.train_clusters(
        grouped, [["a1", "b1"], ["a2"]], tmp_path / "trained", model, data, steps=40, learning_rate=1e-2
    )
    assert list(made) == ["cluster 0", "cluster 1"] and not made.verify()
    assert made["cluster 0"].entry.ranks == [4, 4] and made["cluster 0"].entry.targets == ["query", "value"]
    kept, wanted = deltas(made["cluster 1"].path), deltas(grouped["a2"].path)
    assert all(np.allclose(kept[path], wanted[path]) for path in wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), made["cluster 0"].path).eval()
    for batches in data.values():
        with torch.no_grad():
            assert tuned(**batches[0]).loss < 0.7 * model(**batches[0]).loss


def test_heads_in_clusters(drawer, tmp_path):
    """One that all hold is put in, and stays; heads that differ are no cluster; without any, the model's is trained."""
    made = coterie.library.create(tmp_path / "heads", drawer.base)
    for name, seed, head in (("a", 1, 1), ("b", 2, 1), ("c", 3, 3), ("d", 4, None), ("e", 5, None)):
        task = {} if head is None else {"task_type": "SEQ_CLS"}
        make_adapter(drawer.base, tmp_path / name, seed, 2, ["query"], arch="bert", **task)
        if head and head != seed:
            file = tmp_path / name / "adapter_model.safetensors"
            heads = {k: v for k, v in load_file(tmp_path / "a" / file.name).items() if "classifier" in k}
            save_file(load_file(file) | heads, file, {"format": "pt"})
        made.add(name, tmp_path / name)
    ids = torch.arange(4, 12).view(2, 4)
    data = {key: [{"input_ids": ids, "labels": torch.tensor([0, 1])}] for key in "abcde"}
    model = base_model("bert").eval()
    assert made["a"].saved and not made["d"].saved
    with pytest.raises(coterie.CoterieError, match="its head is not that of 'a'"):
        coterie.library.train_clusters(made, [["a", "c"]], tmp_path / "m", model, data, steps=2)
    trained = coterie.library.train_clusters(made, [["a", "b"], ["d", "e"]], tmp_path / "m", model, data, steps=2)
    both, own = trained["cluster 0"], trained["cluster 1"]
    for name, disk in made["a"].saved.items():
        assert torch.equal(both.checkpoint.read(both.saved[name]), made["a"].checkpoint.read(disk))
    name = "classifier.weight"
    assert not torch.equal(own.checkpoint.read(own.saved[name]), model.state_dict()[name])
    without = {key: [{"input_ids": ids}] for key in "de"}
    with pytest.raises(coterie.CoterieError, match="gives no loss"):
        coterie.library.train_clusters(made, [["d", "e"]], tmp_path / "n", model, without, steps=2)
    for bad in ({"rank": 0}, {"steps": 1}):
        with pytest.raises(coterie.CoterieError, match=r"rank is .* and steps"):
            coterie.library.train_clusters(made, [["d", "e"]], tmp_path / "n", model, data, **{"steps": 2} | bad)
    assert not (tmp_path / "n").exists()


def test_on_the_command_line(grouped, tmp_path):
    given = ["library", "cluster", str(grouped.path), "--clusters", "3", "--merge", str(tmp_path / "m"), "--json"]
    ran = CliRunner().invoke(app, given)
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["clusters"] == GROUPS
    assert len(coterie.library.open(tmp_path / "m")) == 3


def test_refusals(grouped, tmp_path):
    for match, run in (
        ("7 clusters of 6", lambda: coterie.library.cluster(grouped, 7)),
        ("keep is 0", lambda: coterie.library.cluster(grouped, 2, keep=0)),
        ("empty cluster", lambda: coterie.library.merge_clusters(grouped, [["a0"], []], tmp_path / "m")),
        ("a9", lambda: coterie.library.merge_clusters(grouped, [["a9"]], tmp_path / "m")),
        (
            "expert 'b1'.*it has no batches",
            lambda: coterie.library.train_clusters(grouped, GROUPS[1:], tmp_path / "m", base_model("bert"), {"a1": []}),
        ),
        ("exists already", lambda: coterie.library.merge_clusters(grouped, GROUPS, grouped.path)),
    ):
        with pytest.raises(coterie.CoterieError, match=match):
            run()
    assert not (tmp_path / "m").exists()
