"""Every compute path gives the same numbers, forward and backward; what is cached is dropped."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import coterie
from coterie import CoterieError
from coterie.experts.bank import BankShape
from coterie.mixture import cost
from matching import assert_matches, relative_error, smile, traced
from reference import from_model
from zoo import ALL, ARCHS, base_model, body_linears, fine_tune, inputs, outputs

PATHS = ("stacked", "grouped")
# Half precision: the paths round at different places, each once per product.
BFLOAT16 = 2e-2


def mixture_of(arch, count=3, **options):
    base = base_model(arch)
    tuned = {f"e{s}": fine_tune(base, s) for s in range(1, count + 1)}
    return smile(base, tuned, **{"rank": 8, "gate_rank": 4, **options})


def net(**options):
    """Two linear layers with biases and four experts, of which the last does not touch the second layer."""
    base = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 16))
    tuned = {}
    for i, name in enumerate("abcd"):
        tuned[name] = copy.deepcopy(base)
        with torch.no_grad():
            for layer in (0,) if name == "d" else (0, 2):
                weight = tuned[name][layer].weight
                weight += 0.1 * torch.randn(weight.shape[0], 4 + i) @ torch.randn(4 + i, weight.shape[1])
                tuned[name][layer].bias += 0.1 * torch.randn_like(tuned[name][layer].bias)
    return smile(base, tuned, **options), tuned


def by_path(model, run, paths=PATHS):
    found = {}
    for path in paths:
        with model.coterie.use_path(path):
            found[path] = run()
    return found


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("top_k", [1, 2])
def test_paths_agree_on_every_architecture(arch, top_k):
    model, batch = mixture_of(arch, top_k=top_k), inputs(arch, batch=3)
    with torch.no_grad():
        found = by_path(model, lambda: traced(model, batch))
    assert relative_error(found["grouped"][0], found["stacked"][0]) <= 1e-5
    for name, gates in found["stacked"][1].items():
        assert torch.allclose(gates, found["grouped"][1][name], atol=1e-5)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("path", PATHS)
def test_each_path_is_the_formula(arch, path):
    base = base_model(arch)
    tuned = [fine_tune(base, s) for s in (1, 2, 3)]
    experts = [from_model(base, t, ARCHS[arch].heads) for t in tuned]
    for rank, top_k in ((8, 1), (6, 2), (3, 1)):
        model = smile(base, {f"e{i}": t for i, t in enumerate(tuned)}, rank=rank, gate_rank=4, top_k=top_k)
        with model.coterie.use_path(path), torch.no_grad():
            batch = inputs(arch, batch=3)
            assert_matches(model, base, experts, body_linears(arch, base), batch, rank=rank, gate_rank=4, top_k=top_k)


@pytest.mark.parametrize("rank", [1, 4, 6, "full", "dense"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, BFLOAT16)])
def test_paths_agree_for_every_bank(rank, top_k, dtype, tolerance):
    model, _ = net(rank=rank, gate_rank=2, top_k=top_k)
    model = model.to(dtype)
    for shape in ((5, 7, 20), (1, 1, 20), (9, 20), (20,), (0, 4, 20)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            # one layer: after two, half precision may decide differently
            found = by_path(model, lambda x=x: model[0](x))
        assert found["grouped"].shape == (*shape[:-1], 24)
        if x.numel():
            assert relative_error(found["grouped"], found["stacked"]) <= tolerance


@pytest.mark.parametrize("rank", [1, 4, 6, "dense"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_agree(rank, top_k):
    model, _ = net(rank=rank, gate_rank=2, top_k=top_k)
    x = torch.randn(6, 5, 20)

    def gradients():
        model.zero_grad()
        mine = x.clone().requires_grad_()
        model(mine).square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {**grads, "x": mine.grad}

    found = by_path(model, gradients)
    assert set(found["stacked"]) == set(found["grouped"])
    assert any(float(g.abs().max()) > 0 for n, g in found["stacked"].items() if "bank" in n)
    for name, wanted in found["stacked"].items():
        assert relative_error(found["grouped"][name], wanted) <= 1e-5, name


def test_grouped_products_serve_the_ranks_that_they_can():
    for rank, dtype, groupable in ((8, torch.float32, True), (8, torch.bfloat16, True), (6, torch.float32, False)):
        model = mixture_of("bert", rank=rank).to(dtype)
        layer = model.bert.encoder.layer[0].intermediate.dense
        assert layer.bank.groupable(torch.zeros(2, 32, dtype=dtype)) == groupable
    assert not layer.bank.groupable(torch.zeros(2, 32, dtype=torch.float64))


def test_many_tokens_are_not_made_at_once(monkeypatch):
    from coterie.experts.bank import Bank

    model, _ = net(rank=4, gate_rank=2, top_k=2)
    product, calls = Bank.by_counts, []
    monkeypatch.setattr(Bank, "by_counts", lambda *a: calls.append(a) or product(*a))
    x = torch.randn(300, 20)
    with torch.no_grad():
        for tokens, at_once in ((300, 0), (40, 2)):
            found = by_path(model, lambda n=tokens: model(x[:n]))
            assert relative_error(found["grouped"], found["stacked"]) <= 1e-5
            assert len(calls) == at_once


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_gradients_agree_in_a_model(arch):
    model, batch = mixture_of(arch), inputs(arch)

    found = by_path(model, lambda: _backward(model, batch))
    assert found["stacked"]
    for name, wanted in found["stacked"].items():
        assert relative_error(found["grouped"][name], wanted) <= 1e-4, name


def _backward(model, batch):
    model.zero_grad()
    model(**batch).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_stacked_path_reads_nothing_on_the_host():
    model = mixture_of("bert").to("meta")
    batch = {"input_ids": inputs("bert")["input_ids"].to("meta")}
    assert model(**batch).logits.is_meta  # "auto" is stacked wherever it is no CPU
    with model.coterie.use_path("grouped"), pytest.raises((RuntimeError, NotImplementedError)):
        model(**batch)


# --- one decision for the call --------------------------------------------------------------------------------------


def test_a_known_expert_is_that_expert():
    model, tuned = net(rank="full", gate_rank=2)
    x = torch.randn(3, 5, 20)
    for name, expert in tuned.items():
        with model.coterie.route(name), torch.no_grad():
            for path in ("auto", "merged", "stacked", "grouped"):
                with model.coterie.use_path(path):
                    assert relative_error(model(x), expert(x)) <= 1e-5, (name, path)


@pytest.mark.parametrize("rank", [2, "dense"])
def test_weights_mix_deltas(rank):
    model, _ = net(rank=rank, gate_rank=2)
    x = torch.randn(4, 20)
    with torch.no_grad(), model.coterie.route({"a": 0.25, "d": -1.5}):
        bank, layer = model[0].bank, model[0]
        found = by_path(model, lambda: layer(x), ("merged", "stacked", "grouped"))
        base = nn.functional.linear(x, layer.weight, layer.bias)
        delta = sum(w * _delta(bank, i) for i, w in ((0, 0.25), (3, -1.5)))
        wanted = base + x @ delta.T + 0.25 * bank.bias[0] - 1.5 * bank.bias[3]
    for path, got in found.items():
        assert relative_error(got, wanted) <= 1e-5, path


def _delta(bank, i):
    if bank.shape.ranks is None:
        return bank.dense[i]
    start = sum(bank.shape.ranks[:i])
    rows = slice(start, start + bank.shape.ranks[i])
    return bank.up[rows].T @ bank.down[rows]


def test_gradients_flow_through_one_decision():
    model, _ = net(rank=3, gate_rank=2)
    x = torch.randn(6, 20)
    model.coterie.route("b")

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    found = by_path(model, gradients, ("merged", "stacked", "grouped", "auto"))
    assert any("bank.up" in n for n in found["merged"])
    for path in ("stacked", "grouped", "auto"):
        assert set(found[path]) == set(found["merged"])
        for name, wanted in found["merged"].items():
            assert relative_error(found[path][name], wanted) <= 1e-5, (path, name)


def test_an_expert_for_each_example():
    model, _ = net(rank=3, gate_rank=2)
    x = torch.randn(4, 5, 20)
    names = ["c", "a", "d", "a"]
    with torch.no_grad():
        alone = []
        for row, name in zip(x, names, strict=True):
            with model.coterie.route(name):
                alone.append(model(row[None]))
        wanted = torch.cat(alone)
        gates = torch.nn.functional.one_hot(torch.tensor([2, 0, 3, 0]), 4)
        for given in (names, gates[:, None].float(), gates[:, None].expand(4, 5, 4)):
            with model.coterie.route(given):
                for path, got in by_path(model, lambda: model(x), (*PATHS, "auto")).items():
                    assert relative_error(got, wanted) <= 1e-5, path
        for other in (x.flatten(0, 1), x.transpose(0, 1)):
            with model.coterie.route(names), pytest.raises(CoterieError, match="4 rows"):
                model(other)  # whose rows are these?


def test_what_route_refuses():
    model, _ = net(rank=3, gate_rank=2)
    for to in ("nobody", {"nobody": 1.0}, ["a", "nobody"]):
        with pytest.raises(CoterieError, match="nobody"):
            model.coterie.route(to)
    with pytest.raises(CoterieError, match="shape"):
        model.coterie.route(torch.ones(2, 4))
    for nothing in ([], {}):
        with pytest.raises(CoterieError, match="no names"):
            model.coterie.route(nothing)
    for weight in (float("nan"), float("inf"), "1"):
        with pytest.raises(CoterieError, match="finite"):
            model.coterie.route({"a": weight})
    with pytest.raises(CoterieError, match="finite"):
        model.coterie.route(torch.full((2, 1, 4), float("nan")))
    with model.coterie.route(["a", "b", "c"]), pytest.raises(CoterieError, match="3 rows"):
        model(torch.randn(4, 20))
    with pytest.raises(CoterieError, match="no compute path"):
        model.coterie.use_path("fast")
    with model.coterie.use_path("merged"), pytest.raises(CoterieError, match="one decision"):
        model(torch.randn(4, 20))
    assert model(torch.randn(4, 20)).shape == (4, 16)  # nothing of it stands


def test_choices_stand_or_are_restored():
    model, tuned = net(rank="full", gate_rank=2)
    x = torch.randn(7, 20)
    own = model(x)
    model.coterie.route("b")
    with model.coterie.route("a"):
        assert relative_error(model(x), tuned["a"](x)) <= 1e-5
    assert relative_error(model(x), tuned["b"](x)) <= 1e-5
    model.coterie.route(None)
    assert torch.equal(model(x), own)


def test_a_lone_expert_needs_no_router():
    base = nn.Sequential(nn.Linear(20, 24))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += 0.1 * torch.randn(24, 20)
    model = smile(base, {"only": tuned}, rank="full")
    x = torch.randn(5, 20)
    model[0].router.forward = None  # is not called
    with torch.no_grad():
        model(x)
        assert merged_weight(model) is None  # a second copy of the weights only for who asks for it
        for path, got in by_path(model, lambda: model(x), ("auto", "merged", "stacked", "grouped")).items():
            assert relative_error(got, tuned(x)) <= 1e-5, path


# --- what is derived from parameters is dropped ---------------------------------------------------------------------


def merged_weight(model):
    return model[0]._merged._value


def test_merged_weights_are_kept_and_dropped():
    model, _ = net(rank=3, gate_rank=2)
    x = torch.randn(2, 20)
    state = set(model.state_dict())
    with torch.no_grad(), model.coterie.route("a"):
        first = model(x)
        kept = merged_weight(model)
        assert torch.equal(model(x), first)
        assert merged_weight(model) is kept  # across calls
        assert set(model.state_dict()) == state
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        # a pickle of our own making: users do save whole modules, and what is kept must not travel along
        for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert merged_weight(copied) is None
            assert torch.equal(copied(x), first)
        model[0].bank.up.mul_(2)  # an optimiser's step
        assert not torch.equal(model(x), first)
        model[0].bank.up.mul_(0.5)
        assert torch.equal(model(x), first)
        for drop in (model.train, model.eval, model.coterie.drop, lambda: model.load_state_dict(model.state_dict())):
            model(x)
            drop()
            assert merged_weight(model) is None
        model[0].bank.up.data = model[0].bank.up.data * 2  # another tensor under the same parameter
        assert not torch.equal(model(x), first)
    assert merged_weight(model) is None  # the decision is lifted


def test_what_inference_mode_keeps_serves_training():
    model, _ = net(rank=3, gate_rank=2)
    x = torch.randn(2, 20)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        with model.coterie.use_path("grouped"):
            model(x)
        model.coterie.route("a")
        model(x)
        assert merged_weight(model) is not None
    mine = x.clone().requires_grad_()
    model(mine).sum().backward()
    assert mine.grad is not None


@pytest.mark.parametrize("path", ["merged", "grouped"])
def test_fused_optimisers_and_autocast_leave_nothing_stale(path):
    """A fused optimiser's steps are not counted by torch, and autocast rounds what is made under it."""
    model, _ = net(rank=6, gate_rank=2)
    x = torch.randn(30, 20)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if path == "merged":
        model.coterie.route("a")
    with model.coterie.use_path("auto" if path == "merged" else path):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        for _ in range(2):
            with torch.no_grad():
                kept = model(x)
                model.coterie.drop()
                assert torch.equal(model(x), kept)
            model(x).square().sum().backward()
            optimiser.step()


def test_adapters_that_peft_merges_are_seen():
    from peft import LoraConfig, get_peft_model

    model = mixture_of("llama")
    batch = inputs("llama")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    with torch.no_grad(), model.coterie.route("e1"):
        wanted = wrapped(**batch).logits
        wrapped.merge_adapter()
        assert relative_error(wrapped(**batch).logits, wanted) <= 1e-4
        wrapped.unmerge_adapter()
        assert relative_error(wrapped(**batch).logits, wanted) <= 1e-4


@pytest.mark.parametrize("path", ["auto", "stacked", "grouped"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_offloaded_parameters_are_brought_in(arch, path):
    from accelerate import cpu_offload

    model, batch = mixture_of(arch), inputs(arch)
    with torch.no_grad(), model.coterie.use_path(path):
        wanted = outputs(model, batch)
        with model.coterie.route("e2"):
            routed = outputs(model, batch)
        cpu_offload(model, "cpu")
        assert relative_error(outputs(model, batch), wanted) <= 1e-5
        with model.coterie.route("e2"):
            assert relative_error(outputs(model, batch), routed) <= 1e-5


# --- siblings -------------------------------------------------------------------------------------------------------


def groups(model):
    return [[path.rsplit(".", 1)[-1] for path in group] for group in model.coterie.spec.siblings]


def test_layers_that_read_the_same_input_are_found():
    assert groups(mixture_of("bert"))[:2] == [["query", "key", "value"]] * 2
    assert groups(mixture_of("llama"))[:2] == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    assert groups(mixture_of("gpt2")) == []
    for group in groups(mixture_of("t5")):
        assert "o" not in group


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_siblings_share_one_product(arch, monkeypatch):
    from coterie.mixture.siblings import Siblings

    model, batch = mixture_of(arch, rank=3, gate_rank=4), inputs(arch)
    alone = copy.deepcopy(model)
    for layer in alone.modules():
        if hasattr(layer, "siblings"):
            layer.siblings = None
    calls = []
    score = Siblings._decisions
    monkeypatch.setattr(Siblings, "_decisions", lambda self, flat: calls.append(self) or score(self, flat))
    with torch.no_grad(), model.coterie.use_path("grouped"), alone.coterie.use_path("grouped"):
        got, wanted = traced(model, batch), traced(alone, batch)
    assert relative_error(got[0], wanted[0]) <= 1e-5
    for name, gates in wanted[1].items():
        assert torch.equal(got[1][name], gates)
    assert len(calls) == len(set(calls)) == len(model.coterie.spec.siblings)


def test_siblings_notice_that_their_input_changed():
    from coterie.mixture.siblings import Siblings

    model, _ = net(rank=3, gate_rank=2)
    first = model[0]
    second = copy.deepcopy(first)
    first.siblings = second.siblings = Siblings([first, second])
    first.context = second.context = model.coterie._context
    x = torch.randn(6, 20)
    with torch.no_grad(), model.coterie.use_path("grouped"):
        first(x)
        x.neg_().add_(1)
        pair, got = second.siblings, second(x)
        second.siblings = None
        assert torch.equal(got, second(x))
        second.siblings = pair
        second.bank.down.data[:] = torch.randn_like(second.bank.down)  # torch does not count this
        second.drop()
        first(x)
        got, second.siblings = second(x), None
        assert torch.equal(got, second(x))


# --- the cost rule --------------------------------------------------------------------------------------------------


def bank_shape(experts, rank, gate_rank):
    return BankShape(tuple(range(experts)), (rank,) * experts, gate_rank, rank < gate_rank, False)


@pytest.mark.parametrize(
    ("tokens", "experts", "rank", "d_in", "d_out", "path"),
    [
        (1576, 8, 32, 768, 3072, "grouped"),
        (4096, 128, 32, 768, 768, "grouped"),
        (4096, 2, 8, 768, 768, "stacked"),
        (1, 8, 32, 768, 768, "grouped"),
        (32, 128, 128, 4096, 4096, "grouped"),
    ],
)
def test_the_cost_rule(tokens, experts, rank, d_in, d_out, path):
    assert cost.cheapest(tokens, bank_shape(experts, rank, min(16, rank)), 1, d_in, d_out) == path


def test_the_cost_rule_knows_half_precision_and_threads():
    """Where multiply-adds are cheap, the calls that an expert takes weigh more."""
    few = (32, bank_shape(8, 32, 16), 1, 768, 768)
    assert cost.cheapest(*few, torch.float32) == "grouped"
    assert cost.cheapest(*few, torch.bfloat16) == "stacked"
    assert cost.cheapest(*few, torch.float32, 64) == "stacked"


def test_the_rule_is_followed_and_can_be_overridden(monkeypatch):
    from coterie.mixture import layer

    model, _ = net(rank=3, gate_rank=2)
    x, taken = torch.randn(3, 20), []
    for path in PATHS:
        run = getattr(layer, path)
        monkeypatch.setattr(layer, path, lambda *a, path=path, run=run: taken.append(path) or run(*a))
    for chosen in PATHS:
        monkeypatch.setattr(layer, "cheapest", lambda *a, chosen=chosen: chosen)
        model[0](x)
        with model.coterie.use_path(PATHS[1 - PATHS.index(chosen)]):
            model[0](x)
    assert taken == ["stacked", "grouped", "grouped", "stacked"]


def test_generation_is_the_same_on_every_path():
    model = mixture_of("llama")
    batch = inputs("llama")
    found = by_path(
        model, lambda: model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0), (*PATHS, "auto")
    )
    assert torch.equal(found["stacked"], found["grouped"])
    assert torch.equal(found["stacked"], found["auto"])
    with model.coterie.route("e2"):
        routed = by_path(
            model,
            lambda: model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0),
            (*PATHS, "merged"),
        )
    assert torch.equal(routed["stacked"], routed["merged"])
    assert torch.equal(routed["grouped"], routed["merged"])


def test_the_trace_shows_a_given_decision():
    model, batch = mixture_of("bert"), inputs("bert")
    with coterie.routing_trace(model) as trace, model.coterie.route({"e1": 0.5, "e3": 0.5}), torch.no_grad():
        model(**batch)
    for gates in trace.values():
        assert torch.equal(gates[0, 0], torch.tensor([0.5, 0.0, 0.5]))
