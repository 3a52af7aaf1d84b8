"""Arrow against its formula in float64, against PEFT's where PEFT's is exact, and where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from naive_library import apart, arrow, averaged_factors, batch, drawer, factors, mixture_of, outputs, with_spectrum
from torch.utils._python_dispatch import TorchDispatchMode

import coterie
from zoo import base_model, load_dense, save

MIX = {"arrow": outputs, "arrow_factors": averaged_factors}
ARCHS = ("bert", "llama", "gpt2", "t5")


@pytest.fixture(scope="module")
def drawers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {arch: drawer(tmp_path_factory.mktemp(arch), arch) for arch in ARCHS}


def built(recipe: dict[str, Any], method: str, out: Path, **parameters: Any) -> Any:
    coterie.build(method=method, parameters=parameters, out=out, **recipe)
    return coterie.load(str(out))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("method", MIX)
def test_equals_the_formula(method: str, arch: str, drawers: Any, tmp_path: Path) -> None:
    """Unequal ranks, layers that not all experts touch, every number of experts; both compute paths."""
    recipe, given = drawers[arch], batch(arch)
    for k, temperature in ((1, 1.0), (2, 0.3), (3, 1.0)):
        got = built(recipe, method, tmp_path / f"{k}", top_k=k, temperature=temperature).double()
        want = mixture_of(arch, recipe, arrow(k, temperature), MIX[method])
        for path in ("stacked", "grouped"):
            with got.coterie.use_path(path):
                assert apart(arch, got, want, given) < 1e-5


@pytest.mark.parametrize("method", MIX)
@pytest.mark.parametrize(("arch", "pool"), [("bert", "sequence"), ("bert", "prompt"), ("llama", "prompt")])
def test_pools(method: str, arch: str, pool: str, drawers: Any, tmp_path: Path) -> None:
    """The router reads the mean of the tokens that count, or of the prompt, and its decision holds for all."""
    recipe, given, more = drawers[arch], batch(arch), {}
    read = given["attention_mask"].bool()
    if arch == "llama":
        more = {"prompt_lengths": torch.tensor([4, 2, 3])}
        read = read & (read.cumsum(1) <= more["prompt_lengths"][:, None])
    got = built(recipe, method, tmp_path / "m", top_k=2, pool=pool).double()
    want = mixture_of(arch, recipe, arrow(2), MIX[method], read=read)
    assert apart(arch, got, want, given, **more) < 1e-5


def test_refuses_to_look_ahead(drawers: Any, tmp_path: Path) -> None:
    with pytest.raises(coterie.CoterieError, match="look ahead"):
        built(drawers["llama"], "arrow", tmp_path / "m", pool="sequence")


def test_a_fine_tune_has_no_factors(drawers: Any, tmp_path: Path) -> None:
    save(base_model("bert", seed=3), tmp_path / "tuned")
    recipe = {**drawers["bert"], "experts": {**drawers["bert"]["experts"], "tuned": str(tmp_path / "tuned")}}
    assert coterie.build(method="arrow", out=tmp_path / "m", **recipe).ratio > 1
    with pytest.raises(coterie.CoterieError, match="no factors"):
        coterie.build(method="arrow_factors", out=tmp_path / "n", **recipe)


def pefts(base: Path, adapters: list[Path], k: int) -> Any:
    return peft.create_arrow_model(
        base_model=load_dense(base, "llama"),
        task_specific_adapter_paths=[str(each) for each in adapters],
        arrow_config=peft.ArrowConfig(top_k=k, router_temperature=1.0, rng_seed=0),
    ).eval()


def spectra(tmp_path: Path, values: torch.Tensor) -> tuple[dict[str, Any], list[Path]]:
    base = save(base_model("llama"), tmp_path / "base")
    adapters = [with_spectrum(base, tmp_path / f"{i}", i, values, "llama") for i in range(3)]
    return {"base": str(base), "experts": {f"{i}": str(each) for i, each in enumerate(adapters)}}, adapters


@pytest.mark.parametrize("k", [1, 2, 3])
def test_equals_pefts_where_fifteen_iterations_suffice(k: int, tmp_path: Path) -> None:
    recipe, adapters = spectra(tmp_path, 2 * 0.4 ** torch.arange(4))
    got, want = built(recipe, "arrow", tmp_path / "m", top_k=k), pefts(tmp_path / "base", adapters, k)
    assert apart("llama", got, want, batch("llama")) < 2e-5


def test_what_peft_saves_of_its_arrow_are_experts(tmp_path: Path) -> None:
    recipe, adapters = spectra(tmp_path, 2 * 0.4 ** torch.arange(4))
    theirs = pefts(tmp_path / "base", adapters, 2)
    theirs.save_pretrained(tmp_path / "saved")
    folders = {f"{i}": str(tmp_path / "saved" / f"task_{i}") for i in range(3)}
    got = built({**recipe, "experts": folders}, "arrow", tmp_path / "m", top_k=2)
    assert apart("llama", got, theirs, batch("llama")) < 2e-5


def test_is_exact_where_pefts_is_not(tmp_path: Path) -> None:
    """Singular values that lie near each other: fifteen power iterations end up somewhere between their directions."""
    recipe, adapters = spectra(tmp_path, torch.tensor([2.0, 1.96, 1.9, 1.0]))
    got, theirs = built(recipe, "arrow", tmp_path / "m", top_k=1), pefts(tmp_path / "base", adapters, 1)
    want = mixture_of("llama", recipe, arrow(1))
    given = batch("llama")
    with torch.no_grad():
        theirs(**given)
    worst = 1.0
    for path in got.coterie.layers:
        exact = torch.stack([torch.linalg.svd(b @ a)[2][0] for a, b in (factors(each)[path] for each in adapters)])
        ours = got.get_submodule(path).bank.score_rows().double()
        assert (ours * exact).sum(-1).abs().min() > 1 - 1e-6
        router = theirs.get_submodule(f"base_model.model.{path}").lora_arrow["arrow_router"]
        worst = min(worst, float((router.prototypes.double() * exact).sum(-1).abs().min()))
    assert worst < 0.9
    assert apart("llama", got.double(), want, given) < 1e-5
    assert apart("llama", theirs.double(), want, given) > 1e-2


class Largest(TorchDispatchMode):
    """Within the block, the most elements that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.parametrize("path", ["auto", "stacked", "grouped"])
def test_no_tensor_of_all_experts_outputs(path: str, tmp_path: Path) -> None:
    """No operation gives as much as (tokens, experts, d_out) elements; PEFT's Arrow does."""
    recipe, adapters = spectra(tmp_path, 0.5 ** torch.arange(2.0))
    got, theirs = built(recipe, "arrow", tmp_path / "m", top_k=2), pefts(tmp_path / "base", adapters, 2)
    name = got.coterie.layers[-1]
    x = torch.randn(400, got.get_submodule(name).in_features)
    limit = len(x) * len(adapters) * got.get_submodule(name).out_features
    with torch.no_grad(), got.coterie.use_path(path), Largest() as ours:
        got.get_submodule(name)(x)
    layer = theirs.get_submodule(f"base_model.model.{name}")
    with torch.no_grad(), Largest() as other:
        layer(x[None])
    assert ours.elements < limit <= other.elements
