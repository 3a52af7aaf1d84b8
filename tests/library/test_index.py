"""Retrieval against a search that looks at everything."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CoterieError
from coterie.library.index import EXACT, Index


def brute(vectors, owners, query, k):
    """Experts by the largest cosine of any of their vectors."""
    best: dict[str, float] = {}
    for vector, owner in zip(vectors.astype(float), owners, strict=True):
        lengths = np.linalg.norm(vector) * np.linalg.norm(query)
        best[owner] = max(best.get(owner, -2.0), vector @ query / lengths if lengths else 0.0)
    return sorted(best.items(), key=lambda item: -item[1])[:k]


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**20))
def test_all_are_looked_at_where_there_are_few(n, experts, k, seed):
    rng = np.random.default_rng(seed)
    vectors, query = rng.standard_normal((n, 5)), rng.standard_normal(5)
    owners = [str(i) for i in rng.integers(experts, size=n)]
    found = Index(vectors, owners).nearest(query, k)
    wanted = brute(vectors, owners, query, k)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in wanted], atol=1e-5)


def clustered(n: int, seed: int = 0, width: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((50, width))
    return centres[rng.integers(50, size=n)] + 0.3 * rng.standard_normal((n, width))


def test_an_index_finds_what_looking_at_all_finds():
    pytest.importorskip("faiss")
    vectors = clustered(EXACT + 1000)
    owners = [str(i // 3) for i in range(len(vectors))]
    index, all_of_them = Index(vectors, owners), Index(vectors, owners, exact=True)
    assert not index.exact and all_of_them.exact
    noise = 0.1 * np.random.default_rng(1).standard_normal((13, 32))
    for query in vectors[::400] + noise:
        found, wanted = index.nearest(query, 4), brute(vectors, owners, query, 4)
        assert [n for n, _ in all_of_them.nearest(query, 4)] == [n for n, _ in wanted]
        assert len(dict(found).keys() & dict(wanted).keys()) >= 3
    for query in vectors[::500]:
        (name, score), *_ = index.nearest(query)
        assert name == all_of_them.nearest(query)[0][0] and score == pytest.approx(1, abs=1e-5)


def test_an_index_looks_further_where_one_expert_owns_all_that_is_near():
    pytest.importorskip("faiss")
    vectors = np.concatenate([clustered(300, 0) * 0.01 + 5.0, clustered(40, 1)])
    owners = ["crowd"] * 300 + [str(i) for i in range(40)]
    index = Index(vectors, owners, exact=False)
    found = index.nearest(np.full(32, 5.0), 41)
    assert found[0][0] == "crowd" and len(dict(found)) == 41
    assert [n for n, _ in found] == [n for n, _ in brute(vectors, owners, np.full(32, 5.0), 41)]


def test_the_same_vectors_make_the_same_index():
    pytest.importorskip("faiss")
    vectors = clustered(600)
    owners = [str(i) for i in range(600)]
    one, two = (Index(vectors, owners, exact=False) for _ in range(2))
    assert all(one.nearest(v, 5) == two.nearest(v, 5) for v in clustered(20, seed=2))


def test_without_faiss_many_vectors_are_an_error_that_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors, owners = clustered(EXACT + 1), ["one"] * (EXACT + 1)
    with pytest.raises(CoterieError, match=r"coterie\[library\]"):
        Index(vectors, owners)
    assert Index(vectors, owners, exact=True).nearest(vectors[0]) == [("one", pytest.approx(1.0))]


def test_zero_is_near_nothing():
    found = Index(np.array([[0.0, 0.0], [1.0, 0.0]]), ["zero", "one"]).nearest([1.0, 0.0], 2)
    assert found == [("one", 1.0), ("zero", 0.0)]


@pytest.mark.parametrize(("shape", "owners"), [((2, 3), ["a"]), ((0, 3), []), ((3,), ["a", "b", "c"])])
def test_bad_vectors(shape, owners):
    with pytest.raises(CoterieError, match="index"):
        Index(np.ones(shape), owners)
