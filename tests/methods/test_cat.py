"""CAT against its formula, and what of it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_library import apart, batch, drawer, mixture_of

import coterie


@pytest.fixture(scope="module", params=["bert", "llama"])
def wrapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """The architecture, the recipe, and a mixture of given experts under CAT's scalars, to be trained."""
    root = tmp_path_factory.mktemp("drawer")
    recipe = drawer(root, request.param)
    coterie.build(method="uniform", out=root / "m", **recipe)
    config = coterie.MixtureConfig(method="cat")
    return request.param, recipe, coterie.wrap(coterie.load(str(root / "m")), config, train="routers")


def test_only_scalars_learn_and_they_start_at_random(wrapped: Any) -> None:
    _, _, model = wrapped
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name}
    assert set(trained) == {f"{path}.router.score.weight" for path in model.coterie.layers}
    assert all(p.shape == (3,) for p in trained.values())
    assert torch.stack(list(trained.values())).std() > 0.3


def test_equals_the_formula_and_saves(wrapped: Any, tmp_path: Path) -> None:
    """`sum_i softmax(a)_i B_i A_i` over the experts that a layer has."""
    arch, recipe, model = wrapped
    scalars = {path: model.get_submodule(path).router.score.weight.detach().double() for path in model.coterie.layers}

    def shares(path: str, who: list[int]) -> torch.Tensor:
        e = scalars[path][who].exp()
        return e / e.sum()

    want = mixture_of(arch, recipe, None, weights=shares)
    model.save_pretrained(tmp_path / "m")
    again = coterie.load(str(tmp_path / "m"))
    assert apart(arch, again.double(), want, batch(arch)) < 1e-5


def test_learns(wrapped: Any) -> None:
    """Steps along the gradient lower the loss, and make the gates of layers differ."""
    arch, _, model = wrapped
    given = batch(arch, padded=False)
    labels = given["input_ids"] if arch == "llama" else torch.tensor([0, 1, 2])
    optimiser = torch.optim.Adam([p for n, p in model.named_parameters() if ".router." in n], lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(**given, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
