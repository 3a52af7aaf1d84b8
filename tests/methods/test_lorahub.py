"""LoraHub against its formula, its search, and the one adapter that comes of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from naive_library import apart, averaged_factors, batch, drawer, mixture_of

import coterie
from zoo import load_dense


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return drawer(tmp_path_factory.mktemp("drawer"), "bert")


@pytest.fixture(scope="module")
def found(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, list[Any]]:
    """The mixture as it was built, as the search left it, and the examples: what the second expert says of them."""
    out = tmp_path_factory.mktemp("mixture") / "m"
    coterie.build(method="lorahub", out=out, **recipe)
    before = coterie.load(str(out))
    given = batch("bert")
    with torch.no_grad(), before.coterie.route(before.coterie.expert_names[1]):
        given["labels"] = before(**given).logits.argmax(-1)
    batches = [{name: value[rows] for name, value in given.items()} for rows in ([0, 1], [2])]
    return before, coterie.lorahub(before, batches, budget=60), batches


@pytest.mark.parametrize("weights", [[0.7, -0.4, 1.2], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
def test_equals_the_formula(weights: list[float], recipe: dict[str, Any], tmp_path: Path) -> None:
    """An expert that leaves a layer alone adds nothing there; smaller ranks are filled up with zeros."""
    coterie.build(method="lorahub", parameters={"weights": weights}, out=tmp_path / "m", **recipe)
    got = coterie.load(str(tmp_path / "m")).double()
    want = mixture_of("bert", recipe, None, averaged_factors, weights=torch.tensor([weights] * 3))
    assert apart("bert", got, want, batch("bert")) < 1e-5


def loss_of(model: Any, batches: list[Any]) -> float:
    """Over the three examples."""
    with torch.no_grad():
        return sum(len(each["labels"]) * float(model(**each).loss) for each in batches) / 3


def test_search_lowers_what_it_minimises(found: Any) -> None:
    before, after, batches = found
    weights = after.coterie.spec.parameters["weights"]
    assert before.coterie.spec.parameters["weights"] is None
    assert any(weights) and all(abs(w) <= 1.5 for w in weights)
    penalty = 0.05 * sum(map(abs, weights)) / 3
    assert loss_of(after, batches) + penalty < loss_of(before, batches)
    again = coterie.lorahub(before, batches, budget=60)
    assert again.coterie.spec.parameters["weights"] == weights
    zeros = coterie.lorahub(before, batches, budget=5, penalty=1e6)
    assert sum(map(abs, zeros.coterie.spec.parameters["weights"])) < sum(map(abs, weights))


def test_saves_and_loads(found: Any, tmp_path: Path) -> None:
    _, after, _ = found
    after.save_pretrained(tmp_path / "m")
    assert apart("bert", coterie.load(str(tmp_path / "m")), after, batch("bert")) == 0


def test_becomes_one_adapter(recipe: dict[str, Any], tmp_path: Path) -> None:
    coterie.build(method="lorahub", parameters={"weights": [0.7, -0.4, 1.2]}, out=tmp_path / "m", **recipe)
    mixture, given = coterie.load(str(tmp_path / "m")), batch("bert")
    coterie.extract_expert(tmp_path / "m", None, tmp_path / "a", adapter=True)
    adapted = peft.PeftModel.from_pretrained(load_dense(Path(recipe["base"]), "bert"), str(tmp_path / "a")).eval()
    assert apart("bert", adapted, mixture, given) < 1e-5
    coterie.build(method="uniform", base=recipe["base"], experts={"mix": str(tmp_path / "a")}, out=tmp_path / "one")
    assert apart("bert", coterie.load(str(tmp_path / "one")), mixture, given) < 1e-5


def test_refusals(found: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _, batches = found
    with pytest.raises(coterie.CoterieError, match="2 weights for 3 experts"):
        coterie.build(method="lorahub", parameters={"weights": [1.0, 2.0]}, out=tmp_path / "m", **recipe)
    with pytest.raises(coterie.CoterieError, match="without labels"):
        coterie.lorahub(before, [batch("bert")])
    with pytest.raises(coterie.CoterieError, match="budget is 0"):
        coterie.lorahub(before, batches, budget=0)
    coterie.build(method="uniform", out=tmp_path / "u", **recipe)
    with pytest.raises(coterie.CoterieError, match="mixture of uniform"):
        coterie.lorahub(coterie.load(str(tmp_path / "u")), batches)
    with pytest.raises(coterie.CoterieError, match="no expert None"):
        coterie.extract_expert(tmp_path / "u", None, tmp_path / "a", adapter=True)
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(coterie.CoterieError, match="not installed"):
        coterie.lorahub(before, batches)
