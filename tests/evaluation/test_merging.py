"""Merges equal their formulas, written out naively."""

import torch

from coterie.merging.linear import average, delta, task_arithmetic


def states(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, 4, generator=generator, dtype=torch.float64), "ids": torch.arange(3)} for _ in range(count)
    ]


def test_average_and_task_arithmetic() -> None:
    base, first, second = states(3)
    deltas = [delta(first, base), delta(second, base)]
    assert set(deltas[0]) == {"a"}
    torch.testing.assert_close(average(base, deltas)["a"], (first["a"] + second["a"]) / 2)
    expected = base["a"] + 0.3 * (first["a"] - base["a"] + second["a"] - base["a"])
    torch.testing.assert_close(task_arithmetic(base, deltas, 0.3)["a"], expected)
    assert task_arithmetic(base, deltas, 0.3)["ids"].equal(base["ids"])


def test_an_unchanged_tensor_counts_as_zero() -> None:
    base, first, second = states(3)
    second["a"] = base["a"].clone()
    deltas = [delta(first, base), delta(second, base)]
    assert deltas[1] == {}
    torch.testing.assert_close(average(base, deltas)["a"], (first["a"] + base["a"]) / 2)
