"""Properties that hold for every mixture: order of experts, untouched layers, weights, names, unequal ranks."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import coterie
from matching import assert_matches, build, relative_error, smile, traced
from reference import Reference, from_adapter, from_model
from zoo import base_model, body_linears, fine_tune, inputs, make_adapter, outputs, save

BERT = base_model("bert")
LAYERS = body_linears("bert", BERT)
PARTS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense"]


def refs(experts):
    return [from_model(BERT, e, ("classifier",)) for e in experts]


@given(
    order=st.permutations(range(4)),
    top_k=st.integers(1, 4),
    parts=st.lists(st.sets(st.sampled_from(PARTS), min_size=1), min_size=4, max_size=4),
)
def test_the_order_of_experts_does_not_matter(order, top_k, parts):
    experts = [fine_tune(BERT, s, modules=sorted(p), heads=False) for s, p in enumerate(parts)]
    batch = inputs("bert")
    options = dict(rank=5, gate_rank=4, top_k=top_k)
    straight, gates = traced(smile(BERT, {f"e{i}": e for i, e in enumerate(experts)}, **options), batch)
    permuted, theirs = traced(smile(BERT, {f"e{i}": experts[i] for i in order}, **options), batch)
    assert relative_error(permuted, straight) <= 1e-5
    assert set(gates) == set(theirs)
    for name, gate in gates.items():
        torch.testing.assert_close(theirs[name], gate[..., list(order)], atol=1e-5, rtol=0)


@given(
    parts=st.lists(st.sets(st.sampled_from(PARTS)), min_size=1, max_size=4),
    ranks=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    rank=st.sampled_from([1, 3, 8, "full", "dense"]),
    gate_rank=st.sampled_from([1, 4, 40]),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@example(parts=[set(), {"query"}], ranks=[1, 2, 3, 4], rank=3, gate_rank=4, top_k=2, seed=0)
@example(parts=[{"query"}, set(), set()], ranks=[1, 2, 3, 4], rank="full", gate_rank=4, top_k=3, seed=0)
def test_any_mixture_is_the_formula(parts, ranks, rank, gate_rank, top_k, seed):
    """Unequal ranks, untouched layers, experts that touched nothing: candidates are those that touched the layer."""
    assume(any(parts))  # where no expert touches anything, the build is refused
    top_k = min(top_k, len(parts))
    experts = [
        fine_tune(BERT, seed + i, modules=sorted(p), rank=r, biases=False)
        if p
        else fine_tune(BERT, seed + i, modules=["\0"], biases=False)
        for i, (p, r) in enumerate(zip(parts, ranks, strict=False))
    ]
    model = smile(BERT, {f"e{i}": e for i, e in enumerate(experts)}, rank=rank, gate_rank=gate_rank, top_k=top_k)
    batch = inputs("bert", seed=seed)
    assert_matches(model, BERT, refs(experts), LAYERS, batch, rank=rank, gate_rank=gate_rank, top_k=top_k)
    _, gates = traced(model, batch)
    for name, gate in gates.items():
        for i, part in enumerate(parts):
            if not any(name.endswith(p) for p in part):
                assert not gate[..., i].any(), (name, i)


def test_a_zero_delta_is_never_a_candidate():
    experts = {"nothing": copy.deepcopy(BERT), "something": fine_tune(BERT, 1), "empty": copy.deepcopy(BERT)}
    model = smile(BERT, experts, rank=4, gate_rank=4, top_k=3)
    _, gates = traced(model, inputs("bert"))
    assert gates
    for gate in gates.values():
        assert torch.equal(gate, torch.tensor([0.0, 1.0, 0.0]).expand_as(gate))


def test_experts_that_are_all_the_base_leave_the_base(tmp_path):
    """Nothing was touched: either the base's answers, or a refusal that says so."""
    from coterie.errors import CoterieError

    try:
        model = smile(BERT, {"a": copy.deepcopy(BERT), "b": copy.deepcopy(BERT)}, rank=4)
    except CoterieError as error:
        assert "base" in str(error)
        return
    assert relative_error(outputs(model, inputs("bert")), outputs(BERT, inputs("bert"))) <= 1e-6


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_weight_scales_the_delta_and_not_the_score(kind, weight, tmp_path):
    base_dir = save(BERT, tmp_path / "base")
    paths, experts = {}, []
    for seed in (1, 2):
        scale = weight if seed == 1 else 1.0
        if kind == "full":
            tuned = fine_tune(BERT, seed, heads=False)
            paths[f"e{seed}"] = save(tuned, tmp_path / f"e{seed}")
            experts.append(from_model(BERT, tuned, ("classifier",), scale=scale))
        else:
            paths[f"e{seed}"] = make_adapter(base_dir, tmp_path / f"e{seed}", seed, arch="bert")
            experts.append(from_adapter(BERT, paths[f"e{seed}"], ("classifier",), scale=scale))
    weighted = {"e1": {"source": str(paths["e1"]), "weight": weight}, "e2": paths["e2"]}
    parameters = {"rank": 8, "gate_rank": 4, "top_k": 2}
    plain = build(tmp_path / "plain", base_dir, paths, parameters=parameters)
    scaled = build(tmp_path / "scaled", base_dir, weighted, parameters=parameters)
    first = "bert.encoder.layer.0.attention.self.query"
    batch = inputs("bert")
    ours, theirs = traced(scaled, batch)[1][first], traced(plain, batch)[1][first]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert relative_error(outputs(scaled, batch), outputs(plain, batch)) > 1e-3
    for others in ("base", "average"):
        model = build(tmp_path / f"out-{others}", base_dir, weighted, parameters=parameters, others=others)
        assert_matches(model, BERT, experts, LAYERS, batch, rank=8, gate_rank=4, top_k=2, others=others)


def test_untrained_layers_of_an_adapter_are_not_candidates(tmp_path):
    """Where B is still zero the adapter touched nothing, whatever A is."""
    base_dir = save(BERT, tmp_path / "base")
    paths = {f"e{s}": make_adapter(base_dir, tmp_path / f"e{s}", s, arch="bert") for s in (1, 2)}
    file = paths["e1"] / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "layer.0" in name and "lora_B" in name:
            tensor.zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    model = build(tmp_path / "out", base_dir, paths, parameters={"rank": 4, "gate_rank": 4, "top_k": 2})
    experts = [from_adapter(BERT, p, ("classifier",)) for p in paths.values()]
    assert_matches(model, BERT, experts, LAYERS, inputs("bert"), rank=4, gate_rank=4, top_k=2)
    _, gates = traced(model, inputs("bert"))
    for name, gate in gates.items():
        assert bool(gate[..., 0].any()) == ("layer.0" not in name)


NAMES = [
    "🙂",
    "a/b",
    "../../escape",
    "a.b.c",
    "weight",
    "0",
    " spaced out ",
    "C:\\x",
    "x" * 300,
    "experts",
    "日本語",
    "%s{}",
]


def _files_and_keys(root):
    files = [str(f.relative_to(root)) for f in root.rglob("*")]
    keys = []
    for shard in root.glob("*.safetensors"):
        with safe_open(shard, "pt") as f:
            keys += list(f.keys())
    return files, keys


def test_any_text_is_a_name_and_none_reaches_a_key_or_a_path(tmp_path):
    base_dir = save(BERT, tmp_path / "base")
    sources = {}
    for i, name in enumerate(NAMES):
        sources[name] = save(fine_tune(BERT, i, modules=("query",)), tmp_path / f"e{i}")
    plain = {f"e{i}": p for i, p in enumerate(sources.values())}
    model = build(tmp_path / "odd", base_dir, sources, parameters={"rank": 2, "gate_rank": 2})
    build(tmp_path / "plain", base_dir, plain, parameters={"rank": 2, "gate_rank": 2}, load=False)
    assert list(model.coterie.expert_names) == NAMES
    assert _files_and_keys(tmp_path / "odd") == _files_and_keys(tmp_path / "plain")
    for name in NAMES:
        with model.coterie.use_head(name):
            assert outputs(model, inputs("bert")).shape == (2, 3)
    model.save_pretrained(tmp_path / "again")
    assert list(coterie.load(tmp_path / "again").coterie.expert_names) == NAMES


@settings(suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(str.strip),
        min_size=1,
        max_size=3,
        unique=True,
    )
)
def test_names_come_back_as_they_were(names):
    experts = {n: fine_tune(BERT, i, modules=("pooler.dense",), heads=False) for i, n in enumerate(names)}
    model = smile(BERT, experts, rank=2, gate_rank=2)
    assert list(model.coterie.expert_names) == names
    keys = {k for k in model.state_dict() if k not in BERT.state_dict()}
    other = smile(BERT, {f"e{i}": e for i, e in enumerate(experts.values())}, rank=2, gate_rank=2)
    assert keys == {k for k in other.state_dict() if k not in BERT.state_dict()}


def test_one_expert():
    tuned = fine_tune(BERT, 1)
    model = smile(BERT, {"only": tuned}, rank=4, gate_rank=4)
    assert_matches(model, BERT, refs([tuned]), LAYERS, inputs("bert"), rank=4, gate_rank=4)
    _, gates = traced(model, inputs("bert"))
    assert all(torch.equal(g, torch.ones_like(g)) for g in gates.values())
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in BERT.parameters())
    factors = sum(4 * sum(BERT.get_submodule(n).weight.shape) + len(BERT.get_submodule(n).bias) for n in LAYERS)
    assert added == factors  # no gate is stored where there is nothing to decide


def test_one_gate_rank_for_all_experts_of_a_layer(tmp_path):
    """Beside an adapter of rank 2, a full fine-tune is scored by two directions, not by sixteen."""
    base_dir = save(BERT, tmp_path / "base")
    full = fine_tune(BERT, 1, heads=False, scale=0.1)
    adapter = make_adapter(base_dir, tmp_path / "adapter", 2, rank=2, targets=["query"], arch="bert")
    full_dir = save(full, tmp_path / "full")
    model = build(
        tmp_path / "out", base_dir, {"full": full_dir, "small": adapter}, parameters={"rank": 8, "gate_rank": 16}
    )
    experts = [from_model(BERT, full, ("classifier",)), from_adapter(BERT, adapter, ("classifier",))]
    batch = inputs("bert", batch=8)
    assert_matches(model, BERT, experts, LAYERS, batch, rank=8, gate_rank=16)
    _, gates = traced(model, batch)
    share = gates["bert.encoder.layer.0.attention.self.query"][..., 1].mean()
    assert 0.2 < share < 0.8
    told = json.loads((tmp_path / "out" / "mixture.json").read_text())
    assert "gate_rank" in json.dumps(told)


def test_integer_buffers_that_differ_are_an_error():
    from coterie.errors import CoterieError

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("index", torch.arange(4))

        def forward(self, x):
            return self.linear(x[..., self.index.repeat(2)])

    torch.manual_seed(0)
    base = Indexed()
    expert = copy.deepcopy(base)
    with torch.no_grad():
        expert.linear.weight.add_(torch.randn(8, 8))
    coterie.smile(base, {"a": expert}, rank=2, gate_rank=2)
    expert.index = expert.index.flip(0)
    with pytest.raises(CoterieError, match="index"):
        coterie.smile(base, {"a": expert}, rank=2, gate_rank=2)


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": -3},
        {"rank": "most"},
        {"gate_rank": 0},
        {"top_k": 0},
        {"top_k": 3},
        {"others": "nothing"},
    ],
    ids=str,
)
def test_bad_parameters_are_refused(bad):
    from coterie.errors import CoterieError

    experts = {f"e{s}": fine_tune(BERT, s) for s in (1, 2)}
    with pytest.raises(CoterieError) as caught:
        coterie.smile(BERT, experts, **{"rank": 4, "gate_rank": 4, **bad})
    assert next(iter(bad)) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    from coterie.errors import CoterieError

    expert = fine_tune(BERT, 1)
    with torch.no_grad():
        expert.bert.encoder.layer[1].output.dense.weight[0, 0] = value
    with pytest.raises(CoterieError, match=r"layer\.1\.output\.dense"):
        coterie.smile(BERT, {"a": expert}, rank=4)


def test_shapes_that_differ_are_refused():
    from coterie.errors import CoterieError

    other = base_model("bert", intermediate_size=48)
    with pytest.raises(CoterieError) as caught:
        coterie.smile(BERT, {"a": other}, rank=4)
    assert "48" in str(caught.value)
    assert "64" in str(caught.value)


@pytest.mark.parametrize("rank", [3, "full", "dense"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_few_and_many_tokens_compute_the_same(rank, tokens):
    """Whatever way of computing a layer is chosen for a shape, the numbers are the formula's."""
    experts = {f"e{s}": fine_tune(BERT, s) for s in (1, 2, 3)}
    model = smile(BERT, experts, rank=rank, gate_rank=4)
    batch = inputs("bert", batch=max(1, tokens // 50), length=min(tokens, 50))
    assert_matches(model, BERT, refs(experts.values()), LAYERS, batch, rank=rank, gate_rank=4)


def test_others_by_glob(tmp_path):
    """A policy for each group of tensors; what no glob names follows the base."""
    experts = {f"e{s}": fine_tune(BERT, s, heads=False, norms=True, everything=True) for s in (1, 2)}
    base_dir = save(BERT, tmp_path / "base")
    paths = {n: save(e, tmp_path / n) for n, e in experts.items()}
    model = build(
        tmp_path / "out", base_dir, paths, parameters={"rank": 4, "gate_rank": 4}, others={"*LayerNorm*": "average"}
    )
    state, base = model.state_dict(), BERT.state_dict()
    theirs = [e.state_dict() for e in experts.values()]
    norm, words = "bert.encoder.layer.0.output.LayerNorm.weight", "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(state[norm], (theirs[0][norm] + theirs[1][norm]) / 2)
    assert torch.equal(state[words], base[words])


def test_the_trace_is_of_the_last_call():
    experts = {f"e{s}": fine_tune(BERT, s) for s in (1, 2)}
    model = smile(BERT, experts, rank=4, gate_rank=4)
    first, second = inputs("bert", batch=3), inputs("bert", batch=2, seed=1, length=5)
    with torch.no_grad(), coterie.routing_trace(model) as trace:
        model(**first)
        assert trace[LAYERS[0]].shape == (3, 7, 2)
        model(second["input_ids"], attention_mask=second["attention_mask"])
    kept = {n: g.clone() for n, g in trace.items()}
    assert kept[LAYERS[0]].shape == (2, 5, 2)
    outputs(model, first)  # outside the block nothing is recorded
    assert all(torch.equal(trace[n], g) for n, g in kept.items())
    _, again = traced(model, second)
    assert all(torch.equal(again[n], g) for n, g in kept.items())


def test_the_trace_of_generation_is_of_the_last_token():
    base = base_model("llama")
    model = smile(base, {f"e{s}": fine_tune(base, s) for s in (1, 2)}, rank=4, gate_rank=4)
    batch = inputs("llama")
    with coterie.routing_trace(model) as trace:
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert {g.shape for g in trace.values()} == {(2, 1, 2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Mixed precision, as the Trainer's ``bf16=True`` uses it: decisions stay, numbers are near."""
    experts = {f"e{s}": fine_tune(BERT, s, heads=False) for s in (1, 2)}
    model = smile(BERT, experts, rank=6, gate_rank=4)
    batch = inputs("bert")
    wanted, exact = traced(model, batch)
    with torch.autocast("cpu", dtype=dtype):
        got, gates = traced(model, batch)
    assert relative_error(got.float(), wanted) < 0.05
    agree = torch.cat([(gates[n] > 0).eq(exact[n] > 0).all(-1).flatten() for n in exact])
    assert agree.float().mean() > 0.95


class Mixed(nn.Module):
    """Linears around torch's own encoder layer, whose fast path reads its linears' weights directly."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.after = nn.Linear(16, 4)

    def forward(self, x):
        return self.after(self.encoder(self.before(x)))


@pytest.mark.parametrize("others", ["base", "average"])
def test_torchs_own_encoder_layers_are_never_half_a_mixture(others):
    torch.manual_seed(0)
    base = Mixed().eval()
    experts = {}
    for name in ("a", "b"):
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for p in experts[name].parameters():
                p.add_(0.2 * torch.randn(p.shape))
    model = smile(base, experts, rank=4, gate_rank=4, others=others)
    x = torch.randn(2, 5, 16)
    told = []
    for train in (False, True):
        with torch.no_grad(), coterie.routing_trace(model.train(train)) as trace:
            told.append(model(x))
    assert relative_error(told[0], told[1]) <= 1e-5
    reference = Reference(
        base, [from_model(base, e) for e in experts.values()], list(trace), rank=4, gate_rank=4, others=others
    )
    assert {"before", "after"} <= set(trace)
    wanted = reference.run(lambda m: m(x.double()), dict(trace.items()))
    assert relative_error(told[0], wanted.detach()) <= 1e-5


def test_layers_that_are_called_more_than_once():
    """ALBERT runs one layer several times; each call decides for itself."""
    import transformers as tf

    config = tf.AlbertConfig(
        vocab_size=100,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    base = tf.AlbertModel(config).eval()
    experts = {}
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim == 2 else 0.1))
        for name in ("a", "b"):
            experts[name] = copy.deepcopy(base)
            for p in experts[name].parameters():
                if p.ndim == 2:
                    p.add_(0.5 * torch.randn(p.shape) * p.shape[-1] ** -0.5)
    model = smile(base, experts, rank=6, gate_rank=4)
    layers = [n for n, m in base.named_modules() if isinstance(m, nn.Linear)]
    reference = Reference(base, [from_model(base, e) for e in experts.values()], layers, rank=6, gate_rank=4)
    batch = inputs("bert")
    with torch.no_grad():
        got = model(**batch).last_hidden_state
        wanted = reference.run(lambda m: m(**batch).last_hidden_state)
        assert relative_error(got, wanted) <= 1e-5
        assert relative_error(got, base(**batch).last_hidden_state) > 1e-2


def test_options_of_the_in_memory_build():
    """Weights by name, include and exclude globs: the same as in a recipe."""
    tuned = {f"e{s}": fine_tune(BERT, s, heads=False) for s in (1, 2)}
    experts = [from_model(BERT, e, ("classifier",), scale=w) for e, w in zip(tuned.values(), (0.5, 1.0), strict=True)]
    model = smile(BERT, tuned, rank=6, gate_rank=4, weights={"e1": 0.5}, include=["*attention*"], exclude=["*key*"])
    layers = [n for n in LAYERS if "attention" in n and "key" not in n]
    assert_matches(model, BERT, experts, layers, inputs("bert"), rank=6, gate_rank=4)
