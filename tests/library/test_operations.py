"""Arithmetic of deltas against the papers' formulas on dense float64 matrices, and as PEFT loads what comes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawer import deltas, library, raw, state
from hypothesis import given
from hypothesis import strategies as st

from coterie.errors import CoterieError
from coterie.library.operations import get, known
from coterie.sources.delta import LowRank
from zoo import load_dense, merged

M, N = 9, 7


def pair(rank: int | None, seed: int) -> LowRank | None:
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return None
    return LowRank(torch.randn(M, rank, generator=g).double(), torch.randn(rank, N, generator=g).double())


def dense(f: LowRank | None) -> np.ndarray:
    return np.zeros((M, N)) if f is None else f.up.numpy() @ f.down.numpy()


def ext_sub(first: np.ndarray, second: np.ndarray, alpha: float) -> np.ndarray:
    """Hu et al. 2023, equations 3 to 6, one row at a time."""
    out = np.empty_like(first)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        unit_a = a / np.linalg.norm(a) if np.any(a) else np.zeros_like(a)
        unit_b = b / np.linalg.norm(b) if np.any(b) else np.zeros_like(b)
        common = unit_a + unit_b
        length = np.linalg.norm(common)
        common = common / length if length > 1e-8 else np.zeros_like(common)
        out[i] = a - alpha * (b - np.dot(b, common) * common)
    return out


RANKS = [(3, 3), (2, 5), (4, 1), (None, 2), (2, None)]


@pytest.mark.parametrize("ranks", RANKS)
def test_linear_operations(ranks):
    factors = [pair(r, i) for i, r in enumerate(ranks)]
    one, two = map(dense, factors)
    close = dict(atol=1e-12)
    scales = [1.0, 1.0]
    np.testing.assert_allclose(dense(get("add").apply(factors, scales, scale=0.4)), 0.4 * (one + two), **close)
    np.testing.assert_allclose(dense(get("subtract").apply(factors, scales, scale=0.7)), one - 0.7 * two, **close)
    if ranks[0]:
        np.testing.assert_allclose(dense(get("negate").apply(factors[:1], scales)), -one, **close)
        np.testing.assert_allclose(dense(get("scale").apply(factors[:1], scales, factor=3.0)), 3 * one, **close)
    assert dense(get("ext-sub").apply(factors, scales)) == pytest.approx(ext_sub(one, two, 1.0), abs=1e-12)


def test_several_are_subtracted():
    factors = [pair(2, i) for i in range(4)]
    wanted = dense(factors[0]) - sum(dense(f) for f in factors[1:]) / 3
    np.testing.assert_allclose(dense(get("subtract").apply(factors, [1.0] * 4, scale=1 / 3)), wanted, atol=1e-12)


@given(st.integers(0, 2**20), st.floats(-2, 2), st.integers(1, 4), st.integers(1, 4))
def test_ext_sub_row_by_row(seed, alpha, r, s):
    """Rows of zeros on either side, equal rows and opposite rows among them."""
    one, two = pair(r, seed), pair(s, seed + 1)
    one.up[0] = two.up[1] = 0.0
    a, b = dense(one), dense(two)
    found = dense(get("ext-sub").apply([one, two], [1.0, 1.0], scale=alpha))
    np.testing.assert_allclose(found, ext_sub(a, b, alpha), atol=1e-10)
    np.testing.assert_allclose(found[0], 0, atol=1e-12)  # the first leaves this row alone
    np.testing.assert_allclose(found[1], a[1], atol=1e-12)  # the second does


def test_ext_sub_keeps_what_is_common_and_takes_what_is_opposite():
    one = pair(3, 0)
    assert dense(get("ext-sub").apply([one, one], [1.0, 1.0])) == pytest.approx(dense(one), abs=1e-12)
    opposite = LowRank(-2 * one.up, one.down)
    assert dense(get("ext-sub").apply([one, opposite], [1.0, 1.0])) == pytest.approx(3 * dense(one), abs=1e-7)


def test_rows_of_zeros_may_come_from_factors_that_are_not():
    one, two = pair(3, 0), pair(3, 1)
    one.up[2] = torch.tensor([1.0, -1.0, 0.0])
    one.down[1] = one.down[0]
    found = dense(get("ext-sub").apply([one, two], [1.0, 1.0]))
    np.testing.assert_allclose(found, ext_sub(dense(one), dense(two), 1.0), atol=1e-12)
    np.testing.assert_allclose(found[2], 0, atol=1e-12)


def test_the_published_code_of_genknowsub_is_no_difference():
    """(B - b)(A - a) with the task's scale: the general delta comes in with a plus, and cross terms with it."""
    g = torch.Generator().manual_seed(0)
    b1, b2 = (torch.randn(M, 3, generator=g).double() for _ in range(2))
    a1, a2 = (torch.randn(3, N, generator=g).double() for _ in range(2))
    found = dense(get("subtract-factors").apply([LowRank(2.0 * b1, a1), LowRank(0.5 * b2, a2)], [2.0, 0.5]))
    np.testing.assert_allclose(found, 2.0 * ((b1 - b2) @ (a1 - a2)).numpy(), atol=1e-12)
    np.testing.assert_allclose(found, 2.0 * (b1 @ a1 + b2 @ a2 - b1 @ a2 - b2 @ a1).numpy(), atol=1e-12)


@pytest.fixture(scope="module")
def shelf(drawer, tmp_path_factory):
    return library(drawer, tmp_path_factory.mktemp("operations") / "library", "task", "general", "same")


def of(drawer, *names: str) -> tuple[list[str], list[dict[str, np.ndarray]]]:
    """Paths that any of the adapters touches, and each one's deltas there, zeros where it has none."""
    found = [deltas(getattr(drawer, name)) for name in names]
    shapes = {path: delta.shape for each in found for path, delta in each.items()}
    return list(shapes), [{p: each.get(p, np.zeros(shapes[p])) for p in shapes} for each in found]


def wanted(operation: str, parts: list[np.ndarray]) -> np.ndarray:
    first, *rest = parts
    return {
        "add": lambda: sum(parts),
        "subtract": lambda: first - sum(rest),
        "scale": lambda: 0.5 * first,
        "negate": lambda: -first,
        "ext-sub": lambda: ext_sub(first, *rest, 1.0),
    }[operation]()


CASES = [("add", ("task", "general", "same")), ("subtract", ("task", "general")), ("subtract", ("general", "task")),
         ("scale", ("general",)), ("negate", ("same",)), ("ext-sub", ("task", "general"))]  # fmt: skip


@pytest.mark.parametrize(("operation", "names"), CASES)
def test_a_new_expert_is_exact(operation, names, shelf, drawer):
    """Unequal ranks, partly missing targets, rsLoRA and rank patterns."""
    name = f"{operation} {names}"
    report = shelf.combine(name, operation, names)
    paths, parts = of(drawer, *names)
    found = deltas(shelf[name].path)
    for path in paths:
        exact = wanted(operation, [part[path] for part in parts])
        if path in found:
            np.testing.assert_allclose(found[path], exact, atol=2e-6)
        else:
            np.testing.assert_allclose(exact, 0, atol=1e-12)
    assert report.residual < 1e-6 and report.difference is None
    assert shelf[name].entry.kind == "combined"
    kept = shelf[name].facts["provenance"]
    assert (
        kept["experts"] == list(names)
        and kept["weights"][names[0]] == shelf[names[0]].entry.sha256["adapter_model.safetensors"]
    )


@pytest.mark.parametrize(("operation", "names"), [CASES[1], CASES[5]])
def test_peft_loads_a_new_expert(operation, names, shelf, drawer):
    name = f"peft {operation}"
    shelf.combine(name, operation, names)
    base, ours = state(load_dense(drawer.base, "bert")), state(merged(drawer.base, shelf[name].path, "bert"))
    head = state(merged(drawer.base, drawer.task, "bert"))
    paths, parts = of(drawer, *names)
    for key in base:
        path = key.removesuffix(".weight")
        if path in paths:
            exact = base[key] + wanted(operation, [part[path] for part in parts])
        else:
            exact = head[key] if "classifier" in key else base[key]
        np.testing.assert_allclose(ours[key], exact, atol=5e-6, err_msg=key)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize(("operation", "names"), [CASES[0], CASES[1], CASES[5]])
def test_recompression_is_the_truncated_svd_and_its_residual_is_reported(operation, names, rank, shelf, drawer):
    name = f"{operation} at {rank}"
    report = shelf.combine(name, operation, names, rank=rank)
    paths, parts = of(drawer, *names)
    found, squares, missed = deltas(shelf[name].path), 0.0, 0.0
    lines = {line.path: line for line in report.layers}
    for path in paths:
        exact = wanted(operation, [part[path] for part in parts])
        if np.linalg.norm(exact) < 1e-12:
            continue
        u, s, vt = np.linalg.svd(exact)
        np.testing.assert_allclose(found[path], (u[:, :rank] * s[:rank]) @ vt[:rank], atol=5e-6)
        away = np.linalg.norm(exact - found[path])
        assert lines[path].residual == pytest.approx(away / np.linalg.norm(exact), rel=1e-6)
        assert lines[path].rank == min(rank, np.linalg.matrix_rank(exact))
        squares, missed = squares + np.linalg.norm(exact) ** 2, missed + away**2
    assert report.residual == pytest.approx((missed / squares) ** 0.5, rel=1e-6)


def test_factorwise_subtraction_says_how_wrong_it_is(drawer, tmp_path):
    made = library(drawer, tmp_path / "library", "task", "twin")
    report = made.combine("as published", "subtract-factors", ["task", "twin"])
    squares = exacts = 0.0
    task, twin, found = raw(drawer.task), raw(drawer.twin), deltas(made["as published"].path)
    for path in task:
        (b1, a1, s1), (b2, a2, s2) = task[path], twin[path]
        published, exact = s1 * (b1 - b2) @ (a1 - a2), s1 * b1 @ a1 - s2 * b2 @ a2
        np.testing.assert_allclose(found[path], published, atol=2e-6)
        squares, exacts = squares + np.linalg.norm(published - exact) ** 2, exacts + np.linalg.norm(exact) ** 2
    assert report.difference == pytest.approx((squares / exacts) ** 0.5, rel=1e-4)
    assert report.difference > 0.5
    assert made["as published"].facts["provenance"]["difference"] == report.difference
    assert made["as published"].facts["provenance"]["instead_of"] == "subtract"
    assert "differs from `subtract`" in report.summary()


def test_what_cancels_leaves_nothing(shelf):
    with pytest.raises(CoterieError, match="nothing is left"):
        shelf.combine("nothing", "subtract", ["task", "task"])
    assert "nothing" not in shelf and not shelf.verify()


def test_every_operation_is_described():
    assert {o.name for o in known()} == {"add", "subtract", "scale", "negate", "ext-sub", "subtract-factors"}
    for o in known():
        assert o.summary and o.cite
        assert all(p["meaning"] for p in o.describe())


@pytest.mark.parametrize(
    ("operation", "names", "how", "says"),
    [
        ("substract", ["task", "general"], {}, "did you mean 'subtract'"),
        ("subtract", ["task"], {}, "it takes 2 or more"),
        ("negate", ["task", "general"], {}, "it takes 1"),
        ("ext-sub", ["task", "general", "same"], {}, "it takes 2"),
        ("subtract", ["task", "nobody"], {}, "holds no expert 'nobody'"),
        ("subtract", ["task", "general"], {"scales": 2.0}, "did you mean 'scale'"),
        ("subtract", ["task", "general"], {"scale": "much"}, "it must be number"),
        ("subtract", ["task", "general"], {"scale": float("nan")}, "scale"),
        ("subtract", ["task", "general"], {"rank": 0}, "rank"),
        ("subtract-factors", ["task", "general"], {}, "same layers and ranks"),
    ],
)
def test_what_cannot_be_combined(operation, names, how, says, shelf):
    before = list(shelf)
    with pytest.raises(CoterieError, match=says):
        shelf.combine("new", operation, names, **how)
    assert list(shelf) == before and not shelf.verify()
