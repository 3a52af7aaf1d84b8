"""What every mixture of a drawer must do: save and load, ignore padding and batch mates, write causally, generate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_library import batch, drawer, library
from routed import encoder

import coterie

METHODS: dict[str, dict[str, Any]] = {
    "arrow": {"top_k": 2},
    "arrow_factors": {"top_k": 2},
    "spectr": {"top_k": 2},
    "smile": {"rank": 6, "gate_rank": 2, "top_k": 2},
    "uniform": {},
    "oracle": {},
    "phatgoose": {"top_k": 2},
    "average_activation": {"top_k": 2},
    "retriever": {"top_k": 2},
    "nearest_example": {},
    "task_embedding": {"top_k": 2},
    "logo": {"top_k": 2, "layer": "*q_proj"},
    "lorahub": {"weights": [0.7, -0.4, 1.2]},
    "cat": {},
    "xlora": {"depth": 2, "inner": 12, "keep": 2},
    "xlora_frozen": {"depth": 2, "inner": 12, "keep": 2},
}
STATISTICS = ("phatgoose", "average_activation", "retriever", "nearest_example", "task_embedding")
LEARNED = ("cat", "xlora", "xlora_frozen")
POOLED = [
    (method, {**METHODS[method], "pool": pool})
    for method in ("arrow", "arrow_factors", "spectr", "smile", "phatgoose", "average_activation")
    for pool in ("prompt", "model")
]
COMBINED = [("retriever", {**METHODS["retriever"], "combine": combine}) for combine in ("selection", "fusion")]
CASES = [*METHODS.items(), *POOLED, *COMBINED]
TASKS = torch.tensor([1, 0, 2])
QUERIES = ["whatever", "some words", "third thing"]  # nearest to the second, the first, the third expert


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *map(str, case[1].values())])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """Whether the experts have statistics of their data -> a recipe without its method."""
    root = tmp_path_factory.mktemp("drawer")
    recipe = drawer(root, "llama")
    return {False: recipe, True: library(root, recipe, "llama")}


def make(method: str, parameters: dict[str, Any], recipe: dict[str, Any], out: Path) -> Any:
    """The mixture, from its directory; routers that learn are put over the experts, and stay as they start."""
    if method not in LEARNED:
        coterie.build(method=method, parameters=parameters, out=out, **recipe)
        return coterie.load(str(out))
    before = out.with_name("before")
    coterie.build(method="uniform", out=before, **recipe)
    config = coterie.MixtureConfig(method=method, parameters=parameters)
    coterie.wrap(coterie.load(str(before)), config, train="routers").save_pretrained(out)
    return coterie.load(str(out))


def beside(model: Any) -> dict[str, Any]:
    """What calls need beside a batch, row by row."""
    spec, more = model.coterie.spec, dict[str, Any]()
    if spec.method == "oracle":
        more["task_ids"] = TASKS % len(spec.experts)
    if spec.routing.pool in ("prompt", "model"):
        more["prompt_lengths"] = torch.tensor([3, 3, 2])
    if spec.routing.score == "retrieval":
        more["texts"] = QUERIES
    return more


@pytest.fixture(scope="module", params=CASES, ids=named)
def made(
    request: pytest.FixtureRequest, drawn: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any], Path]:
    """A causal mixture, the arguments that its calls need beside a batch, and its directory."""
    method, parameters = request.param
    out = tmp_path_factory.mktemp("mixture") / "m"
    model = make(method, parameters, drawn[method in STATISTICS], out)
    return model, beside(model), out


def telling(model: Any, texts: list[str] | None) -> AbstractContextManager[Any]:
    """Within the block, the texts by which experts are retrieved are told."""
    return nullcontext() if texts is None else model.coterie.retrieve(texts, encoder)


def logits(model: Any, given: dict[str, torch.Tensor], texts: list[str] | None = None, **more: Any) -> torch.Tensor:
    with torch.no_grad(), telling(model, texts):
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
    texts = more.get("texts")
    with telling(model, texts):
        cached = model.generate(**given, **tasks, **settings)
    ids = given["input_ids"]
    pooled = {"prompt_lengths": torch.full((3,), 5)} if "prompt_lengths" in more else {}
    for _ in range(6):
        step = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, logits(model, step, texts, **tasks, **pooled)[:, -1:].argmax(-1)], dim=1)
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
def test_one_expert_is_that_expert(method: str, drawn: Any, tmp_path: Path) -> None:
    recipe = drawn[method in STATISTICS]
    name, source = next(iter(recipe["experts"].items()))
    parameters = {"weights": [1.0]} if method == "lorahub" else {}
    model = make(method, parameters, {**recipe, "experts": {name: source}}, tmp_path / "m")
    free = logits(model, batch("llama"), **beside(model))
    with model.coterie.route(name):
        torch.testing.assert_close(logits(model, batch("llama")), free, rtol=1e-4, atol=1e-5)
    with model.coterie.route({name: 0.0}):
        assert (logits(model, batch("llama")) - free).abs().max() > 0.1


# By default one that knows its weights, one that is told the task, one with a pass before, and one that decides by the
# prompt.
EXPORTED = [
    pytest.param(case, marks=[] if case[0] in ("oracle", "lorahub", "xlora", "logo") else pytest.mark.slow)
    for case in CASES
]


@pytest.mark.parametrize("made", EXPORTED, indirect=True, ids=named)
def test_exports(made: Any) -> None:
    """What is retrieved is decided before the call, and is a constant of the graph."""
    model, more, _ = made
    given, want = batch("llama"), logits(model, batch("llama"), **more)
    told: dict[str, Any] = {name: value for name, value in more.items() if name != "texts"} | {"use_cache": False}
    with torch.no_grad(), telling(model, more.get("texts")):
        exported = torch.export.export(model, (), {**given, **told}, strict=False)
    got = exported.module()(**given, **told).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if "task_ids" in told:
        told["task_ids"] = told["task_ids"].flip(0)
        torch.testing.assert_close(exported.module()(**given, **told).logits, logits(model, given, **told))
