"""What every mixture of a drawer must do: save and load, ignore padding and batch mates, write causally, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_library import batch, drawer

import coterie

METHODS: dict[str, dict[str, Any]] = {
    "arrow": {"top_k": 2},
    "arrow_factors": {"top_k": 2},
    "spectr": {"top_k": 2},
    "smile": {"rank": 6, "gate_rank": 2, "top_k": 2},
    "uniform": {},
    "oracle": {},
}
POOLED = [(method, {**METHODS[method], "pool": "prompt"}) for method in ("arrow", "arrow_factors", "spectr", "smile")]
CASES = [*METHODS.items(), *POOLED]
TASKS = torch.tensor([1, 0, 2])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], Path]:
    """A causal mixture, the arguments that its calls need beside a batch, and its directory."""
    method, parameters = request.param
    root = tmp_path_factory.mktemp("drawer")
    coterie.build(method=method, parameters=parameters, out=root / "m", **drawer(root, "llama"))
    more = {"task_ids": TASKS} if method == "oracle" else {}
    if parameters.get("pool") == "prompt":
        more["prompt_lengths"] = torch.tensor([3, 3, 2])
    return coterie.load(str(root / "m")), more, root / "m"


def logits(model: Any, given: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, **more).logits


def test_saves_and_loads_bit_for_bit(made: Any, tmp_path: Path) -> None:
    model, more, folder = made
    want = logits(model, batch("llama"), **more)
    assert torch.equal(logits(type(model).from_pretrained(folder), batch("llama"), **more), want)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(coterie.load(str(tmp_path / "again")), batch("llama"), **more), want)
    assert [n.startswith("e/") for n in model.coterie.expert_names] == [True] * 3


def test_padding_and_batch_mates_do_not_matter(made: Any) -> None:
    model, more, _ = made
    given = batch("llama")
    together = logits(model, given, **more)
    for row, length in enumerate(given["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1, :length] for name, value in given.items()}
        own = logits(model, alone, **{name: value[row : row + 1] for name, value in more.items()})
        torch.testing.assert_close(own[0], together[row, :length], rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one(made: Any) -> None:
    model, more, _ = made
    given = batch("llama", padded=False)
    before = logits(model, given, **more)
    changed = {**given, "input_ids": given["input_ids"].clone()}
    changed["input_ids"][:, 5:] = 9
    torch.testing.assert_close(logits(model, changed, **more)[:, :5], before[:, :5], rtol=1e-5, atol=1e-6)


def test_generates_with_a_cache_as_without(made: Any) -> None:
    model, more, _ = made
    given = batch("llama", padded=False)
    given = {name: value[:, :5] for name, value in given.items()}
    tasks = {name: value for name, value in more.items() if name == "task_ids"}
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    cached = model.generate(**given, **tasks, **settings)
    ids = given["input_ids"]
    pooled = {"prompt_lengths": torch.full((3,), 5)} if "prompt_lengths" in more else {}
    for _ in range(6):
        step = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, logits(model, step, **tasks, **pooled)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_bfloat16_is_near(made: Any) -> None:
    model, more, folder = made
    want = logits(model, batch("llama"), **more)
    half = logits(coterie.load(str(folder), dtype=torch.bfloat16), batch("llama"), **more).float()
    counted = batch("llama")["attention_mask"].bool()
    error = (half - want)[counted].norm(dim=-1) / want[counted].norm(dim=-1)
    assert error.median() < 0.05  # a token near a boundary may go to another expert


def test_paths_agree_and_the_trace_tells_the_gates(made: Any) -> None:
    model, more, _ = made
    found = {}
    for path in ("stacked", "grouped"):
        with model.coterie.use_path(path), coterie.routing_trace(model) as trace:
            found[path] = logits(model, batch("llama"), **more)
        gates = next(iter(trace.values()))
        assert gates.shape[-1] == 3
    torch.testing.assert_close(found["stacked"], found["grouped"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_expert_is_that_expert(method: str, tmp_path: Path) -> None:
    recipe = drawer(tmp_path, "llama")
    recipe["experts"] = {"only": next(iter(recipe["experts"].values()))}
    coterie.build(method=method, out=tmp_path / "m", **recipe)
    model = coterie.load(str(tmp_path / "m"))
    more = {"task_ids": torch.zeros(3, dtype=torch.long)} if method == "oracle" else {}
    free = logits(model, batch("llama"), **more)
    with model.coterie.route("only"):
        torch.testing.assert_close(logits(model, batch("llama")), free, rtol=1e-4, atol=1e-5)
