"""SpectR against its formula in float64, and SMILE where it decides for more than a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_library import Gate, apart, batch, drawer, mixture_of, smile, spectr

import coterie

ARCHS = ("bert", "llama", "gpt2")


@pytest.fixture(scope="module")
def drawers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {arch: drawer(tmp_path_factory.mktemp(arch), arch) for arch in ARCHS}


@pytest.mark.parametrize("arch", ARCHS)
def test_equals_the_formula(arch: str, drawers: Any, tmp_path: Path) -> None:
    recipe, given = drawers[arch], batch(arch)
    for k, temperature in ((1, 1.0), (2, 0.3), (3, 1.0)):
        out = tmp_path / f"{k}"
        coterie.build(method="spectr", parameters={"top_k": k, "temperature": temperature}, out=out, **recipe)
        got = coterie.load(str(out)).double()
        for path in ("stacked", "grouped"):
            with got.coterie.use_path(path):
                assert apart(arch, got, mixture_of(arch, recipe, spectr(k, temperature)), given) < 1e-5


@pytest.mark.parametrize(("arch", "pool"), [("bert", "sequence"), ("llama", "prompt")])
@pytest.mark.parametrize(
    ("method", "parameters", "gate"),
    [("spectr", {"top_k": 2}, spectr(2)), ("smile", {"rank": 6, "gate_rank": 2, "top_k": 2}, smile(2, 2))],
    ids=["spectr", "smile"],
)
def test_pools(
    method: str, parameters: dict[str, Any], gate: Gate, arch: str, pool: str, drawers: Any, tmp_path: Path
) -> None:
    recipe, given, more = drawers[arch], batch(arch), {}
    read = given["attention_mask"].bool()
    if pool == "prompt":
        more = {"prompt_lengths": torch.tensor([4, 2, 3])}
        read = read & (read.cumsum(1) <= more["prompt_lengths"][:, None])
    coterie.build(method=method, parameters={**parameters, "pool": pool}, out=tmp_path / "m", **recipe)
    got = coterie.load(str(tmp_path / "m")).double()
    assert apart(arch, got, mixture_of(arch, recipe, gate, read=read), given, **more) < 1e-5


def test_a_module_without_calls_of_examples_routes_by_token() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(coterie.CoterieError, match="no transformers model"):
        coterie.smile(plain, {"one": torch.nn.Sequential(torch.nn.Linear(4, 4))}, pool="sequence")


def test_weights_scale_deltas_and_not_scores(drawers: Any, tmp_path: Path) -> None:
    recipe = drawers["bert"]
    weighted = {name: {"source": source, "weight": 0.5} for name, source in recipe["experts"].items()}
    for name, experts in (("whole", recipe["experts"]), ("half", weighted)):
        coterie.build(method="spectr", base=recipe["base"], experts=experts, out=tmp_path / name)
    whole, half = (coterie.load(str(tmp_path / name)) for name in ("whole", "half"))
    for path in whole.coterie.layers:
        a, b = whole.get_submodule(path).bank, half.get_submodule(path).bank
        assert torch.equal(a.score_rows(), b.score_rows())
        assert torch.equal(a.up, 2 * b.up)
