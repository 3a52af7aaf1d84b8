"""The native path gives what the formula gives, and stands back where it cannot."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import coterie
from coterie import CoterieError
from coterie.experts.bank import BankShape
from coterie.mixture import native
from coterie.mixture.layer import add_experts
from coterie.routing.router import Routing
from matching import relative_error, smile
from zoo import base_model, fine_tune, inputs, outputs


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        native.kernel()
    except CoterieError as error:
        pytest.skip(str(error))


def layer_of(d_in, d_out, experts, rank, gate_rank, k, bias, dtype=torch.float32):
    torch.manual_seed(0)
    alone = rank < gate_rank  # the score's rows are the gate's own
    shape = BankShape(tuple(range(experts)), (rank,) * experts, gate_rank, alone, bias)
    tensors = {name: torch.randn(size) / size[-1] ** 0.5 for name, size in shape.tensors(d_in, d_out).items()}
    layer = add_experts(nn.Linear(d_in, d_out), shape, Routing("subspace_energy", "top_k", k), tensors)
    return layer.to(dtype).eval()


def formula(layer, x, k):
    """`W x + b + sum_i g_i (B_i A_i x + b_i)` in float64, and by how much the k-th score leads the next one."""
    bank, (d_out, d_in), x = layer.bank, layer.weight.shape, x.double()
    experts = bank.experts
    down, up = bank.down.double().view(experts, -1, d_in), bank.up.double().view(experts, -1, d_out)
    gate_rank = bank.shape.gate_rank
    rows = bank.gate.double().view(experts, -1, d_in) if bank.shape.gate else down[:, :gate_rank]
    scores = torch.einsum("td,egd->teg", x, rows).norm(dim=-1)
    top, index = scores.topk(min(k, experts))
    gates = torch.zeros_like(scores).scatter(-1, index, top.softmax(-1))
    every = torch.einsum("td,erd,ero->teo", x, down, up)
    if bank.shape.bias:
        every = every + bank.bias.double()
    ordered = scores.sort(descending=True).values
    lead = ordered[:, k - 1] - ordered[:, k] if k < experts else torch.ones(len(x))
    return x @ layer.weight.double().T + layer.bias.double() + torch.einsum("te,teo->to", gates, every), lead


@pytest.mark.parametrize("tokens", [0, 1, 5, 30, 400])
@pytest.mark.parametrize(
    ("d_in", "d_out", "experts", "rank", "gate_rank", "k", "bias"),
    [
        (64, 128, 4, 32, 16, 1, True),
        (48, 64, 4, 32, 32, 1, False),
        (33, 70, 3, 5, 2, 2, True),  # nothing divides a vector
        (20, 10, 5, 40, 3, 5, False),  # all experts answer, more than one panel of ranks
        (40, 130, 7, 4, 12, 2, True),  # the gate has rows of its own, more than one panel of scores
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_is_the_formula(tokens, d_in, d_out, experts, rank, gate_rank, k, bias, dtype, tolerance):
    layer = layer_of(d_in, d_out, experts, rank, gate_rank, k, bias, dtype)
    x = torch.randn(tokens, d_in).to(dtype)
    layer.context.path = "native"
    with torch.no_grad():
        assert layer._path(x, None) == "native"
        got = layer(x)
        wanted, lead = formula(layer, x, k)
    clear = lead > (1e-4 if dtype == torch.float32 else 0.1)
    assert got.shape == (tokens, d_out) and got.dtype == dtype
    if tokens:
        assert clear.float().mean() > (0.9 if dtype == torch.float32 else 0.2) or tokens < 10
        if clear.any():
            assert relative_error(got[clear], wanted[clear]) <= tolerance


@pytest.mark.parametrize("tokens", [5, 29, 400])  # weights where they lie, some in panels, all in panels
def test_bfloat16_is_rounded_once(tokens):
    torch.manual_seed(0)
    (d_in, d_out, experts, rank), dtype = (40, 150, 4, 8), torch.bfloat16
    y, x = torch.randn(tokens, d_out).to(dtype), torch.randn(tokens, d_in).to(dtype)
    down = torch.randn(experts * rank, d_in).to(dtype)
    up = torch.randn(experts * rank, d_out).to(dtype)
    index = torch.randint(experts, (tokens, 1))
    own = index.new_tensor(range(rank)) + index * rank
    added = torch.einsum("td,trd,tro->to", x.double(), down.double()[own], up.double()[own])
    wanted = (y.double() + added).to(dtype)
    native.kernel().add_experts(y, x, index, None, down, up, None, experts, None)
    assert (y != wanted).float().mean() < 0.02  # halves, of sums in another order


def test_threads_change_nothing():
    layer, x, threads = layer_of(64, 128, 4, 8, 4, 2, True), torch.randn(3, 300, 64), torch.get_num_threads()
    layer.context.path = "native"
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            one = layer(x)
            torch.set_num_threads(2)
            assert torch.allclose(layer(x), one, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_whole_models_agree(arch, top_k):
    base = base_model(arch)
    model = smile(base, {f"e{s}": fine_tune(base, s) for s in (1, 2, 3)}, rank=8, gate_rank=4, top_k=top_k)
    batch = inputs(arch, batch=3)
    with torch.no_grad():
        with model.coterie.use_path("native"), coterie.routing_trace(model) as trace:
            got, gates = outputs(model, batch), {name: trace[name] for name in trace}
        with model.coterie.use_path("grouped"), coterie.routing_trace(model) as trace:
            wanted = outputs(model, batch)
            assert all(torch.allclose(gates[name], trace[name], atol=1e-5) for name in trace)
    assert relative_error(got, wanted) <= 1e-5


def test_it_stands_back_where_it_cannot():
    layer, x = layer_of(32, 32, 4, 8, 4, 1, True), torch.randn(100, 32)
    layer.context.path = "native"
    assert layer._path(x, None) != "native"  # gradients
    layer(x).sum().backward()
    assert layer.bank.up.grad is not None
    with torch.no_grad():
        assert layer._path(x.double(), None) != "native"
        assert layer._path(x, (1.0, 0.0, 0.0, 0.0)) != "native"
        assert layer._path(x, None) == "native"


def test_auto_takes_it_only_where_it_is_switched_on(monkeypatch):
    layer, x = layer_of(32, 32, 4, 8, 4, 1, True), torch.randn(100, 32)
    with torch.no_grad():
        for switch, taken in (("1", True), ("0", False)):
            monkeypatch.setenv("COTERIE_NATIVE", switch)
            native.enabled.cache_clear()
            assert all((layer._path(rows, None) == "native") == taken for rows in (x, x[:3]))
    native.enabled.cache_clear()


def test_without_a_compiler(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    monkeypatch.setenv("COTERIE_NATIVE", "1")
    native.kernel.cache_clear()
    native.enabled.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no compiler"):
            assert not native.enabled()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not native.enabled()  # said once
        base = base_model("bert")
        model = smile(base, {f"e{s}": fine_tune(base, s) for s in (1, 2)}, rank=4, gate_rank=2)
        with pytest.raises(CoterieError, match="compiler"):
            model.coterie.use_path("native")
    finally:
        native.kernel.cache_clear()
        native.enabled.cache_clear()
