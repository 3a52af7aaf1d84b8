"""X-LoRA against its formula in float64 (Buehler & Buehler 2024, arXiv:2402.07148), and where its gates are frozen.

A pass of the base alone gives the last hidden states h. `softmax(MLP(h) / T)` are each token's gates, of every layer
or one set for all, of which the largest may be kept as they are. A layer then gives `W x + sum_i g_i B_i A_i x`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from naive_library import batch, drawer, mixture_of
from routed import close_where_it_counts
from torch import Tensor, nn
from torch.nn import functional as F
from trained import randomise
from transformers import DynamicCache

import coterie
from zoo import base_model

OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one set of gates": {"layerwise": False},
    "two linears": {"depth": 2, "inner": 12},
    "three linears": {"depth": 3, "inner": 12},
    "cold": {"temperature": 0.3},
    "two kept": {"keep": 2},
    "three of three kept": {"keep": 3},
    "all of it": {"layerwise": False, "depth": 3, "inner": 12, "temperature": 2.5, "keep": 1},
}


@pytest.fixture(scope="module", params=["bert", "llama"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Any]:
    """The architecture, experts of unequal ranks that adapt different layers, and a mixture of them."""
    return drawn_of(request.param, tmp_path_factory.mktemp("drawer"))


@pytest.fixture(scope="module")
def writes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Any]:
    """The same of a causal model alone."""
    return drawn_of("llama", tmp_path_factory.mktemp("drawer"))


def drawn_of(arch: str, root: Path, **more: Any) -> tuple[str, dict[str, Any], Any]:
    recipe = drawer(root, arch, **more)
    coterie.build(method="uniform", out=root / "m", **recipe)
    return arch, recipe, coterie.load(str(root / "m"))


def wrapped(mixture: Any, method: str = "xlora", **parameters: Any) -> Any:
    """The mixture's experts under a classifier with weights that tell, float64, in eval mode."""
    config = coterie.MixtureConfig(method=method, parameters=parameters)
    return with_random_classifier(coterie.wrap(mixture, config, train="routers"))


def with_random_classifier(model: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.coterie_router.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def hidden_states(arch: str, given: dict[str, Tensor]) -> Tensor:
    """The last of the base, alone, (batch, tokens, width) float64."""
    model = base_model(arch).double()
    with torch.no_grad():
        return getattr(model, model.base_model_prefix)(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).last_hidden_state


def gates_of(hidden: Tensor, router: dict[str, Tensor], experts: int, dropout: float = 0.0, **options: Any) -> Tensor:
    """(batch, tokens, layers or 1, experts): token by token, layer by layer."""
    depth = options.get("depth", 1)
    kept = [F.dropout(hidden.new_ones(*hidden.shape[:2], options["inner"]), dropout) for _ in range(depth - 1)]
    rows = []
    for b, row in enumerate(hidden):
        for t, h in enumerate(row):
            for i in range(depth):
                if i:
                    h = h.clamp(min=0) * kept[i - 1][b, t]
                h = router[f"linears.{i}.weight"] @ h + router[f"linears.{i}.bias"]
            for scores in h.split(experts):
                e = (scores / options.get("temperature", 1.0)).exp()
                gates = e / e.sum()
                least = gates.sort(descending=True).values[options.get("keep", experts) - 1]
                rows.append(torch.where(gates >= least, gates, 0.0))
    return torch.stack(rows).view(*hidden.shape[:2], -1, experts)


def naive(
    arch: str, recipe: dict[str, Any], model: Any, given: dict[str, Tensor], prompt: Tensor | None = None, **more: Any
) -> tuple[dict[str, Tensor], nn.Module]:
    """Each layer's gates (batch, tokens, experts), and the model that has them; `model` lends its classifier's weights.

    Args:
        prompt: (batch, tokens) bool, where gates are frozen after it.
        more: `router` in place of those weights, and `dropout`.
    """
    router = more.pop("router", None) or {name: p.detach() for name, p in model.coterie_router.named_parameters()}
    own = model.coterie.spec.parameters
    options = {name: own[name] for name in ("depth", "inner", "temperature", "keep") if own[name] is not None}
    gates = gates_of(hidden_states(arch, given), router, 3, **options, **more)
    if prompt is not None:
        last = [int(row.nonzero()[-1]) for row in prompt]
        rows = [[row[min(t, end)] for t in range(len(row))] for row, end in zip(gates, last, strict=True)]
        gates = torch.stack([torch.stack(row) for row in rows])
    order = [path for path, _ in base_model(arch).named_modules() if path in model.coterie.layers]
    layers = {path: gates[:, :, i if gates.shape[2] > 1 else 0] for i, path in enumerate(order)}
    return layers, mixture_of(arch, recipe, None, weights=lambda path, who: layers[path][..., who])


def check(arch: str, recipe: dict[str, Any], model: Any, given: dict[str, Tensor], **more: Any) -> Tensor:
    """The mixture's gates and answer are the naive ones; the answer."""
    layers, want = naive(arch, recipe, model, given, more.pop("prompt", None))
    with torch.no_grad(), coterie.routing_trace(model) as trace:
        ours, theirs = model(**given, **more).logits, want(**given).logits
    close_where_it_counts(ours, theirs, given["attention_mask"])
    counted = given["attention_mask"].bool()
    assert trace.keys() == layers.keys()
    for path, gates in layers.items():
        here = torch.tensor([i in model.coterie.spec.layers[path].experts for i in range(3)])
        torch.testing.assert_close(trace[path][counted], (gates * here)[counted], rtol=1e-5, atol=1e-6)
    return ours


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_formula(drawn: Any, options: dict[str, Any]) -> None:
    arch, recipe, mixture = drawn
    model, given = wrapped(mixture, **options), batch(arch)
    ours = check(arch, recipe, model, given)
    plain = check(arch, recipe, wrapped(mixture), given)
    assert not options or options == {"keep": 3} or (ours - plain).abs().max() > 1e-2
    with torch.no_grad():
        assert (ours - base_model(arch).double()(**given).logits).abs().max() > 1e-2


def test_gradients_of_the_classifier(drawn: Any) -> None:
    """In training: the loss under its dropout, and the slopes, as autograd has them through the formula."""
    arch, recipe, mixture = drawn
    model = wrapped(mixture, depth=2, inner=12, classifier_dropout=0.4, temperature=0.7, keep=2).train()
    given = batch(arch)
    ids = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels = ids if arch == "llama" else torch.tensor([0, 2, 1])
    own = dict(model.coterie_router.named_parameters())
    router = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    torch.manual_seed(3)
    loss = model(**given, labels=labels).loss
    loss.backward()
    torch.manual_seed(3)
    _, want = naive(arch, recipe, model, given, router=router, dropout=0.4)
    wanted = want(**given, labels=labels).loss
    slopes = torch.autograd.grad(wanted, list(router.values()))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    for p, slope in zip(own.values(), slopes, strict=True):
        assert slope.abs().max() > 1e-4
        torch.testing.assert_close(p.grad, slope, rtol=1e-4, atol=1e-7)


def test_a_pooler_takes_the_mean_gates_of_the_tokens_that_count(tmp_path: Path) -> None:
    """Which the paper has no layer for: one vector an example."""
    targets = [("query", "pooler.dense"), ("value", "pooler.dense"), ("pooler.dense",)]
    arch, recipe, mixture = drawn_of("bert", tmp_path, targets=targets)
    model, given = wrapped(mixture), batch(arch)
    layers, _ = naive(arch, recipe, model, given)
    path = "bert.pooler.dense"
    means = [row[counted].mean(0) for row, counted in zip(layers[path], given["attention_mask"].bool(), strict=True)]
    layers[path] = torch.stack(means)  # the pooler reads (batch, width)
    want = mixture_of(arch, recipe, None, weights=lambda path, who: layers[path][..., who])
    with torch.no_grad():
        close_where_it_counts(model(**given).logits, want(**given).logits, given["attention_mask"])


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_fresh_experts(arch: str) -> None:
    """`alpha / rank` times the products, and dropout on what the experts read, in training."""
    parameters = {"rank": 3, "alpha": 12, "dropout": 0.25, "classifier_dropout": 0.0}
    include = {"bert": ["*query", "*.output.dense"], "llama": ["*q_proj", "*down_proj"]}[arch]
    config = coterie.MixtureConfig(
        method="xlora", experts=3, parameters=parameters, modules={"include": include}, also_train=[]
    )
    model = coterie.wrap(base_model(arch), config)
    randomise(model)
    with_random_classifier(model).train()
    given = batch(arch)
    layers, _ = naive(arch, {"experts": {}}, model, given)
    own, want = model.state_dict(), base_model(arch).double()
    for path, gates in layers.items():

        def add(_: nn.Module, args: Any, y: Tensor, *, path: str = path, gates: Tensor = gates) -> Tensor:
            x = F.dropout(args[0], 0.25, model.training)
            for i in range(3):
                a, b = (own[f"{path}.bank.{name}"].view(3, 3, -1)[i] for name in ("down", "up"))
                y = y + 12 / 3 * gates[..., i, None] * (x @ a.T @ b)
            return y

        want.get_submodule(path).register_forward_hook(add)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(3)
        ours = model(**given).logits
        torch.manual_seed(3)
        close_where_it_counts(ours, want(**given).logits, given["attention_mask"])


def prompts(given: dict[str, Tensor], lengths: Tensor) -> Tensor:
    """(batch, tokens) bool, the first tokens that count."""
    mask = given["attention_mask"]
    return (mask.cumsum(1) <= lengths[:, None]) & mask.bool()


@pytest.mark.parametrize("options", [OPTIONS["as it comes"], OPTIONS["all of it"]], ids=["as it comes", "all of it"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_frozen_after_the_prompt(writes: Any, options: dict[str, Any], side: str) -> None:
    arch, recipe, mixture = writes
    model, given, lengths = wrapped(mixture, "xlora_frozen", **options), padded(side), torch.tensor([4, 3, 4])
    prompt = prompts(given, lengths)
    ours = check(arch, recipe, model, given, prompt=prompt, prompt_lengths=lengths)
    exact = check(arch, recipe, wrapped(mixture, **options), given)
    torch.testing.assert_close(ours[prompt], exact[prompt], rtol=1e-9, atol=1e-9)
    assert (ours - exact)[given["attention_mask"].bool() & ~prompt].abs().max() > 1e-2


def padded(side: str) -> dict[str, Tensor]:
    """Three examples of 8, 7 and 6 tokens."""
    given = batch("llama", padded=False)
    for row in (1, 2):
        where = slice(8 - row, None) if side == "right" else slice(None, row)
        given["input_ids"][row, where] = given["attention_mask"][row, where] = 0
    return given


def test_frozen_after_the_prompt_in_training(writes: Any) -> None:
    """Labels say where the prompt ends; its last token's gates learn of what follows."""
    arch, recipe, mixture = writes
    model, given = wrapped(mixture, "xlora_frozen", classifier_dropout=0.0).train(), padded("right")
    prompt = prompts(given, torch.tensor([3, 2, 4]))
    labels = given["input_ids"].masked_fill((given["attention_mask"] == 0) | prompt, -100)
    own = dict(model.coterie_router.named_parameters())
    router = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    loss = model(**given, labels=labels).loss
    loss.backward()
    _, want = naive(arch, recipe, model, given, prompt, router=router)
    wanted = want(**given, labels=labels).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-7)
    for p, slope in zip(own.values(), torch.autograd.grad(wanted, list(router.values())), strict=True):
        torch.testing.assert_close(p.grad, slope, rtol=1e-4, atol=1e-7)


def test_nothing_freezes_in_an_encoder(tmp_path: Path) -> None:
    """It has no prompt: as xlora."""
    arch, recipe, mixture = drawn_of("bert", tmp_path)
    check(arch, recipe, wrapped(mixture, "xlora_frozen"), batch(arch))


@pytest.mark.parametrize(("method", "passes"), [("xlora", 2), ("xlora_frozen", 1)])
@pytest.mark.parametrize("options", [OPTIONS["as it comes"], OPTIONS["all of it"]], ids=["as it comes", "all of it"])
def test_decodes_with_a_cache_as_the_formula_without(
    writes: Any, method: str, passes: int, options: dict[str, Any]
) -> None:
    """A step of xlora is two passes of one token, one of xlora_frozen: the prompt's last gates answer."""
    arch, recipe, mixture = writes
    model, given, start = wrapped(mixture, method, **options), padded("left"), 5
    prompt = prompts(given, given["attention_mask"][:, :start].sum(1))
    _, want = naive(arch, recipe, model, given, prompt if method == "xlora_frozen" else None)
    cache, parts, seen = DynamicCache(config=model.config), [], []
    model.get_submodule(model.coterie.layers[0]).register_forward_hook(lambda _, args, y: seen.append(args[0].shape))
    with torch.no_grad():
        for begin, end in ((0, start), (5, 6), (6, 7), (7, 8)):
            step = {"input_ids": given["input_ids"][:, begin:end], "attention_mask": given["attention_mask"][:, :end]}
            parts.append(model(**step, past_key_values=cache).logits)
        theirs = want(**given).logits
    close_where_it_counts(torch.cat(parts, 1), theirs, given["attention_mask"])
    assert [shape[1] for shape in seen] == [5, 5] + [1] * 3 * passes
