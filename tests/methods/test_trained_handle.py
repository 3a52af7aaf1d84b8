"""`model.coterie` of a trained mixture: naming the experts, recording gates, forcing paths."""

from __future__ import annotations

import copy

import naive
import pytest
import torch
from trained import CAUSAL, KINDS, batch_of, call_of, quick, randomise, tasks, wrapped

import coterie
from coterie.mixture.layer import _Mixture
from coterie.training.wrap import part_of
from matching import relative_error
from zoo import base_model, fine_tune, save

INCLUDE = {"modules": {"include": ["*self.query", "*.output.dense"]}}


def logits_of(model, given):
    with torch.no_grad():
        return model(**given).logits


def alone(base, model, given, kind, weights):
    """The naive model in which the experts are mixed with these weights, for each row and token."""
    parameters = {n: p.detach().double() for n, p in model.named_parameters() if ".bank." in n}
    facts = naive.Facts({})
    scale = next(iter(model.coterie.spec.layers.values())).scale

    def mixed(layer, x, facts):
        return sum(
            torch.tensor([row[i] for row in weights]).to(x)[:, None, None] * expert(x)
            for i, expert in enumerate(layer.experts)
        )

    naive.METHODS["mixed"] = mixed
    layers, count = model.coterie.layers, len(model.coterie.expert_names)
    plain = naive.install(
        base.double(), "mixed", parameters, layers, facts, count, after=kind == "bottleneck", scale=scale
    )
    return logits_of(plain, given)


@pytest.mark.parametrize(("method", "kind"), quick([k for k in KINDS if k[0] != "single"], 4))
def test_one_expert_by_name(method, kind):
    """Whatever the method: the named expert answers everywhere, and nothing that routers want need be known."""
    base = base_model("bert")
    model = wrapped(base, method, kind).eval()
    given = batch_of("bert")
    wanted = alone(copy.deepcopy(base), model, given, kind, [(0, 1, 0)] * 3)
    with model.coterie.route("expert 1"):
        got = logits_of(model, given)
        again = model(**given).logits  # where gradients flow, nothing is merged
    assert relative_error(got, wanted) <= 1e-5
    assert relative_error(again.detach(), wanted) <= 1e-5
    after = logits_of(model, call_of(method, given))
    assert relative_error(after, wanted) > 1e-4  # the routers are back


OUTPUTS = ("ensemble", "switch", "st_gumbel", "reinforce", "dselect_k", "tag", "hash")


@pytest.mark.parametrize(("method", "kind"), quick([k for k in KINDS if k[0] in OUTPUTS], 3))
def test_a_mix_and_names_per_row(method, kind):
    base = base_model("bert")
    model = wrapped(base, method, kind).eval()
    given = batch_of("bert")
    wanted = alone(copy.deepcopy(base), model, given, kind, [(0.3, 0, 0.5)] * 3)
    with model.coterie.route({"expert 0": 0.3, "expert 2": 0.5}):
        assert relative_error(logits_of(model, given), wanted) <= 1e-5
    wanted = alone(copy.deepcopy(base), model, given, kind, [(0, 0, 1), (1, 0, 0), (0, 1, 0)])
    with model.coterie.route(["expert 2", "expert 0", "expert 1"]):
        assert relative_error(logits_of(model, given), wanted) <= 1e-5


@pytest.mark.parametrize("method", ["smear", "poly", "mhr", "adamix"])
def test_a_mix_of_factors(method):
    """Where factors are merged, a mix merges factors: it is not the mix of the outputs."""
    base = base_model("bert")
    model = wrapped(base, method).eval()
    given = batch_of("bert")
    weights = {"expert 0": 0.3, "expert 2": 0.7}
    parameters = {n: p.detach().double() for n, p in model.named_parameters() if ".bank." in n}
    naive.METHODS["mixed"] = lambda layer, x, facts: torch.stack(
        [naive.average(layer.experts, torch.tensor([0.3, 0.0, 0.7]).to(x))(row) for row in x]
    )
    plain = naive.install(base.double(), "mixed", parameters, model.coterie.layers, naive.Facts({}), 3)
    with model.coterie.route(weights):
        assert relative_error(logits_of(model, given), logits_of(plain, given)) <= 1e-5
    gates = torch.tensor([[[0.3, 0.0, 0.7]]]).expand(3, 1, 3)
    with model.coterie.route(gates):
        assert relative_error(logits_of(model, given), logits_of(plain, given)) <= 1e-5


def test_gates_per_token():
    gates = torch.rand(3, 7, 3)
    given = batch_of("bert")
    by_token = wrapped("bert", "switch", **INCLUDE).eval()
    with by_token.coterie.route(gates), coterie.routing_trace(by_token) as trace:
        logits_of(by_token, given)
    assert all(torch.allclose(found, gates) for found in trace.values())
    by_example = wrapped("bert", "smear", **INCLUDE).eval()
    with by_example.coterie.route(gates), pytest.raises(coterie.CoterieError, match="7 for each of 3"):
        logits_of(by_example, given)
    with (
        by_example.coterie.route(["expert 0"] * 2),
        pytest.raises(coterie.CoterieError, match="1 for each of 2"),
    ):
        logits_of(by_example, given)


@pytest.mark.parametrize("method", ["smear", "switch", "tag"])
def test_unknown_experts(method):
    model = wrapped("bert", method)
    for to in ("expert 9", {"expert 9": 1.0}, ["expert 0", "expert 9", "expert 0"]):
        with pytest.raises(coterie.CoterieError, match="no expert 'expert 9'"):
            model.coterie.route(to)


@pytest.mark.parametrize(("method", "options"), quick(CAUSAL, 4, 3))
def test_naming_an_expert_in_a_causal_model(method, options):
    """No prompt need be told, no task: `generate` and plain calls work, and agree."""
    model = wrapped("llama", method, **options).eval()
    given = batch_of("llama", padding="")
    names = model.coterie.expert_names
    with model.coterie.route(names[-1]):
        full = logits_of(model, given)
        out = model.generate(
            **given, max_new_tokens=3, min_new_tokens=3, output_logits=True, return_dict_in_generate=True
        )
        assert relative_error(out.logits[0], full[:, -1]) <= 1e-5
        again = logits_of(model, {"input_ids": out.sequences})
        assert relative_error(torch.stack(out.logits, 1), again[:, 6:-1]) <= 1e-5


@pytest.mark.parametrize(("method", "kind"), quick(KINDS, 3, 1))
def test_traces(method, kind):
    """Gates are (batch, tokens or 1, experts), and where they are shares they sum to 1."""
    model = wrapped("bert", method, kind).eval()
    given = call_of(method, batch_of("bert"))
    with coterie.routing_trace(model) as trace:
        logits_of(model, given)
    assert list(trace) == model.coterie.layers
    experts = len(model.coterie.expert_names)
    for name, gates in trace.items():
        tokens = 1 if "pooler" in name or method not in ("switch", "soft_moe") else 7
        tokens = gates.shape[1] if method == "single" else tokens  # nothing is decided
        assert gates.shape == (3, tokens, experts), name
        if method not in ("switch", "dselect_k"):
            torch.testing.assert_close(gates.sum(-1), torch.ones(3, tokens))
    if method == "tag":
        assert all((gates[:, 0].argmax(-1) == tasks()).all() for gates in trace.values())


@pytest.mark.parametrize(
    ("arch", "method", "options"),
    [
        ("bert", "smear", {}),
        ("bert", "switch", {}),
        ("bert", "soft_moe", {}),
        ("bert", "dselect_k", {}),
        ("t5", "smear", {}),
        ("llama", "smear", {"pool": "prompt"}),
    ],
)
def test_traces_of_scores(arch, method, options):
    model = wrapped(arch, method, "bottleneck", **options).eval()
    given = batch_of(arch)
    if arch == "llama":
        given["prompt_lengths"] = given["attention_mask"].sum(1)
    wanted = logits_of(model, given)
    with coterie.routing_trace(model, scores=True) as trace:
        got = logits_of(model, given)
    assert relative_error(got, wanted) <= 1e-5
    assert trace.scores.keys() == trace.keys()
    for name, scores in trace.scores.items():
        assert scores.shape == trace[name].shape
        if method == "smear":
            torch.testing.assert_close(scores.softmax(-1), trace[name])


def test_segments_are_traced_token_by_token():
    model = wrapped("llama", "smear", pool="segment", segment=3).eval()
    given = batch_of("llama", padding="")
    with coterie.routing_trace(model, scores=True) as trace:
        logits_of(model, given)
    assert not trace.scores  # they decide for segments
    for gates in trace.values():
        assert gates.shape == (3, 7, 3)
        torch.testing.assert_close(gates[:, :3], torch.full((3, 3, 3), 1 / 3))
        assert (gates[:, 3] == gates[:, 5]).all() and not torch.allclose(gates[:, 3], gates[:, 6])


@pytest.mark.parametrize(("method", "kind"), [("switch", "lora"), ("switch", "bottleneck"), ("single", "bottleneck")])
def test_paths_give_the_same_numbers(method, kind):
    model = wrapped("bert", method, kind).eval()
    given = batch_of("bert")
    wanted = logits_of(model, given)
    for path in ("stacked", "grouped"):
        with model.coterie.use_path(path):
            assert relative_error(logits_of(model, given), wanted) <= 1e-5


@pytest.mark.parametrize(("method", "kind"), quick(KINDS, 5))
def test_the_merged_path_needs_one_decision(method, kind):
    model = wrapped("bert", method, kind).eval()
    given = call_of(method, batch_of("bert"))
    if (method, kind) == ("single", "lora"):
        with model.coterie.use_path("merged"):
            logits_of(model, given)
        return
    with model.coterie.use_path("merged"), pytest.raises(coterie.CoterieError, match="one decision for the whole call"):
        logits_of(model, given)


@pytest.mark.parametrize(
    ("arch", "method", "options"),
    [
        ("bert", "smear", {}),
        ("bert", "ensemble", {}),
        ("bert", "switch", {"pool": "sequence"}),
        ("bert", "poly", {}),
        ("bert", "mhr", {}),
        ("bert", "smear", {"alpha": 9.0}),
        ("gpt2", "smear", {"pool": "prompt"}),  # whose layers are Conv1D
        ("t5", "smear", {}),
    ],
)
def test_one_example_is_merged_where_it_has_one_decision(arch, method, options):
    model = wrapped(arch, method, **options).eval()
    given = call_of(method, batch_of(arch, batch=1))
    if options.get("pool") == "prompt":
        given["prompt_lengths"] = torch.tensor([3])
    wanted = logits_of(model, given)
    with model.coterie.use_path("merged"):
        assert relative_error(logits_of(model, given), wanted) <= 1e-5
    with model.coterie.use_path("merged"), pytest.raises(coterie.CoterieError, match="one decision for the whole call"):
        model(**given)  # gradients would have to flow through the merge


def test_a_merge_cuts_no_gradient_of_the_input():
    model = wrapped("bert", "ensemble").eval().requires_grad_(False)
    given = batch_of("bert", batch=1)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).requires_grad_()
    with model.coterie.use_path("merged"), pytest.raises(coterie.CoterieError, match="one decision for the whole call"):
        model(**given)


def test_a_merged_layer_records_what_the_others_do():
    model = wrapped("bert", "smear").eval()
    given = batch_of("bert", batch=1)
    found = {}
    for path in ("auto", "merged"):
        with model.coterie.use_path(path), coterie.routing_trace(model) as trace:
            logits_of(model, given)
        found[path] = dict(trace)
    assert found["merged"].keys() == found["auto"].keys()
    for layer, gates in found["auto"].items():
        torch.testing.assert_close(found["merged"][layer], gates)


def test_a_merge_in_half_precision_is_near_the_pair():
    model = wrapped("bert", "smear").eval().bfloat16()
    exact = copy.deepcopy(model).float()
    given = batch_of("bert", batch=1)
    wanted = logits_of(exact, given)
    with model.coterie.use_path("merged"):
        merged = relative_error(logits_of(model, given).float(), wanted)
    assert merged <= 2 * relative_error(logits_of(model, given).float(), wanted) + 2e-3


def test_a_merge_follows_who_is_named_on_one_cache():
    config = coterie.MixtureConfig(method="xlora_frozen", experts=3, parameters={"rank": 4})
    model = coterie.wrap(base_model("llama"), config).eval()
    randomise(model)
    ids = torch.tensor([[3, 4, 5]])
    found = {}
    for path in ("auto", "merged"):
        with torch.no_grad(), model.coterie.use_path(path):
            with model.coterie.route(["expert 0"]):
                cache = model(input_ids=ids, use_cache=True).past_key_values
            with model.coterie.route(["expert 1"]):
                found[path] = model(input_ids=ids[:, :1], past_key_values=cache).logits
    assert relative_error(found["merged"], found["auto"]) <= 1e-5


@pytest.mark.parametrize("method", ["smear", "ensemble"])
def test_a_merged_prompt_is_kept_while_decoding(method, monkeypatch):
    """Merged once a layer, and as the low-rank pair gives it; another prompt is merged anew."""
    model = wrapped("llama", method, pool="prompt").eval()
    merges = []
    merge = _Mixture.onto_base
    monkeypatch.setattr(_Mixture, "onto_base", lambda layer, *rest: merges.append(layer) or merge(layer, *rest))
    for seed in (0, 1):
        ids = torch.randint(2, 50, (1, 5), generator=torch.Generator().manual_seed(seed))
        settings = dict(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True)
        wanted = torch.stack(model.generate(**settings, return_dict_in_generate=True).logits)
        with model.coterie.use_path("merged"):
            got = torch.stack(model.generate(**settings, return_dict_in_generate=True).logits)
        assert relative_error(got, wanted) <= 1e-5
    count = sum(isinstance(module, _Mixture) for module in model.modules())
    assert count and len(merges) == 2 * count


def test_the_merged_path_after_route():
    model = wrapped("bert", "smear").eval()
    given = batch_of("bert")
    with model.coterie.route("expert 2"):
        wanted = logits_of(model, given)
        for path in ("merged", "stacked", "grouped"):
            with model.coterie.use_path(path):
                assert relative_error(logits_of(model, given), wanted) <= 1e-5


def test_routing_by_name_in_training():
    """The named expert learns, and no other."""
    model = wrapped("bert", "smear", dropout=0.1)
    with model.coterie.route("expert 1"):
        model(**batch_of("bert", labels=True)).loss.backward()
    bank = model.bert.pooler.dense.bank
    rows = bank.up.grad.view(3, 4, -1)
    assert rows[1].abs().sum() > 0 and rows[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize(("method", "options"), [("smear", {"expert_dropout": 0.0}), ("switch", {}), ("soft_moe", {})])
def test_routers_read_what_dropout_does_not_touch(method, options):
    """Dropout is on what the experts read."""
    include = {"modules": {"include": ["*layer.0.attention.self.query"]}}
    model = wrapped("bert", method, dropout=0.5, **options, **include)
    given = batch_of("bert")
    with coterie.routing_trace(model) as trace:
        first = logits_of(model.train(), given)
        training = dict(trace)
        assert not torch.equal(logits_of(model, given), first)
        logits_of(model.eval(), given)
        assert all(torch.equal(training[name], gates) for name, gates in trace.items())


@pytest.mark.parametrize("train", ["all", "experts", "routers"])
def test_what_a_mixture_keeps_per_expert_is_trained_along(train, tmp_path):
    """Also what is no head: a pooler, inside the base model."""
    base = base_model("bert")
    save(base, tmp_path / "base")
    experts = {}
    for seed, name in enumerate(("a", "b"), start=1):
        experts[name] = str(save(fine_tune(base, seed, everything=True), tmp_path / name))
    recipe = {"method": "smile", "base": str(tmp_path / "base"), "experts": experts}
    recipe |= {"parameters": {"rank": 2, "gate_rank": 2}, "modules": {"exclude": ["*pooler*"]}}
    recipe |= {"others": {"bert.pooler*": "per_expert", "*": "base"}}
    coterie.build(recipe, out=tmp_path / "out")
    mixture = coterie.wrap(coterie.load(tmp_path / "out"), train=train)
    assert "bert.pooler.dense" in mixture.coterie.spec.heads
    learns = {name for name, p in mixture.named_parameters() if p.requires_grad and part_of(name) is None}
    kept = {n for n, _ in mixture.named_parameters() if n.startswith(("bert.pooler.", "classifier."))}
    assert len(kept) == 2 * 2 * 2 and learns == kept
