"""Mixtures of every architecture compute exactly what the formula says, from full fine-tunes, adapters and both."""

from __future__ import annotations

import pytest
import torch
import transformers

from matching import assert_matches, assert_not_dense, build, relative_error, smile
from reference import from_adapter, from_model
from zoo import ALL, ARCHS, WITH_ADAPTERS, base_model, body_linears, fine_tune, inputs, make_adapter, outputs, save


def _full(arch, count, **options):
    base = base_model(arch)
    tuned = [fine_tune(base, s, **options) for s in range(1, count + 1)]
    return base, tuned, [from_model(base, t, ARCHS[arch].heads) for t in tuned]


def _named(values):
    return {f"e{i}": v for i, v in enumerate(values)}


@pytest.mark.parametrize("arch", ALL)
def test_live_modules(arch):
    base, tuned, experts = _full(arch, 3)
    batch = inputs(arch, batch=3)
    mixture = smile(base, _named(tuned), rank=6, gate_rank=4, top_k=1)
    assert_not_dense(mixture, base, batch)
    match = assert_matches(mixture, base, experts, body_linears(arch, base), batch, rank=6, gate_rank=4, top_k=1)
    assert match.flips <= match.decisions / 100


@pytest.mark.parametrize("arch", ALL)
def test_full_checkpoints(arch, tmp_path):
    base, tuned, experts = _full(arch, 2, norms=True, everything=True)
    save(base, tmp_path / "base")
    for i, model in enumerate(tuned):
        save(model, tmp_path / f"e{i}")
    mixture = build(
        tmp_path / "out",
        tmp_path / "base",
        {f"e{i}": tmp_path / f"e{i}" for i in range(2)},
        parameters={"rank": 8, "gate_rank": 4, "top_k": 1},
    )
    assert isinstance(mixture, getattr(transformers, ARCHS[arch].model))
    assert_matches(mixture, base, experts, body_linears(arch, base), inputs(arch), rank=8, gate_rank=4)


@pytest.mark.parametrize("arch", WITH_ADAPTERS)
def test_adapters(arch, tmp_path):
    base = base_model(arch)
    save(base, tmp_path / "base")
    paths = [make_adapter(tmp_path / "base", tmp_path / f"a{s}", s, rank=3 + s, arch=arch) for s in (1, 2)]
    experts = [from_adapter(base, p, ARCHS[arch].heads) for p in paths]
    mixture = build(
        tmp_path / "out",
        tmp_path / "base",
        {p.name: p for p in paths},
        parameters={"rank": 8, "gate_rank": 16, "top_k": 1},
    )
    batch = inputs(arch, batch=3)
    assert_not_dense(mixture, base, batch)
    assert_matches(mixture, base, experts, body_linears(arch, base), batch, rank=8, gate_rank=16)


MIXED_FAST = ["bert", "vit", "gpt2", "t5", "qwen2"]


@pytest.mark.parametrize(
    "arch", [a if a in MIXED_FAST else pytest.param(a, marks=pytest.mark.slow) for a in WITH_ADAPTERS]
)
def test_a_full_fine_tune_beside_an_adapter(arch, tmp_path):
    base = base_model(arch)
    save(base, tmp_path / "base")
    tuned = fine_tune(base, 1)
    save(tuned, tmp_path / "tuned")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", 2, rank=4, arch=arch)
    heads = ARCHS[arch].heads
    experts = [from_model(base, tuned, heads), from_adapter(base, adapter, heads)]
    mixture = build(
        tmp_path / "out",
        tmp_path / "base",
        {"tuned": tmp_path / "tuned", "adapter": adapter},
        parameters={"rank": 8, "gate_rank": 16, "top_k": 2},
    )
    batch = inputs(arch, batch=3)
    assert_matches(mixture, base, experts, body_linears(arch, base), batch, rank=8, gate_rank=16, top_k=2)


SETTINGS = [
    (1, 1, 1),
    (4, 8, 1),  # gate rows beyond the expert's own rank
    (8, 4, 2),
    (100, 100, 3),  # beyond min(m, n): clamped
    ("full", 4, 1),
    ("full", 16, 2),
    ("dense", 4, 1),
    ("dense", 8, 2),
]


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
@pytest.mark.parametrize(("rank", "gate_rank", "top_k"), SETTINGS, ids=str)
def test_settings(arch, rank, gate_rank, top_k):
    base, tuned, experts = _full(arch, 3)
    mixture = smile(base, _named(tuned), rank=rank, gate_rank=gate_rank, top_k=top_k)
    options = dict(rank=rank, gate_rank=gate_rank, top_k=top_k)
    assert_matches(mixture, base, experts, body_linears(arch, base), inputs(arch, batch=3), **options)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [a for a in ALL if a not in ("bert", "gpt2")])
@pytest.mark.parametrize(("rank", "gate_rank", "top_k"), SETTINGS, ids=str)
def test_settings_everywhere(arch, rank, gate_rank, top_k):
    test_settings(arch, rank, gate_rank, top_k)


@pytest.mark.parametrize("arch", ["bert", "llama", "clip", "gpt2"])
@pytest.mark.parametrize("others", ["base", "average"])
def test_others(arch, others, tmp_path):
    base, tuned, experts = _full(arch, 2, norms=True, everything=True)
    save(base, tmp_path / "base")
    for i, model in enumerate(tuned):
        save(model, tmp_path / f"e{i}")
    mixture = build(
        tmp_path / "out",
        tmp_path / "base",
        {f"e{i}": tmp_path / f"e{i}" for i in range(2)},
        parameters={"rank": 8, "gate_rank": 4},
        others=others,
    )
    options = dict(rank=8, gate_rank=4, others=others)
    assert_matches(mixture, base, experts, body_linears(arch, base), inputs(arch), **options)
    live = smile(base, _named(tuned), rank=8, gate_rank=4, others=others)
    assert_matches(live, base, experts, body_linears(arch, base), inputs(arch), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"query": 2, "layer.1.attention.self.value": 7}, "alpha_pattern": {"value": 3}},
        {"use_rslora": True},
        {"modules_to_save": ["classifier"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_dora": True},
        {"targets": ["query", "classifier"]},
        {"targets": ["query", "word_embeddings"]},
    ],
    ids=lambda o: next(iter(o)) + str(len(o.get("targets", "")[1:])),
)
@pytest.mark.parametrize("others", ["base", "average"])
def test_adapter_options(options, others, tmp_path):
    """PEFT's options are exact, or refused in a clear sentence (DoRA only)."""
    from coterie.errors import CoterieError

    base = base_model("bert")
    save(base, tmp_path / "base")
    paths = [
        make_adapter(tmp_path / "base", tmp_path / "a1", 1, arch="bert", **options),
        make_adapter(tmp_path / "base", tmp_path / "a2", 2, arch="bert"),
    ]
    try:
        mixture = build(
            tmp_path / "out",
            tmp_path / "base",
            {p.name: p for p in paths},
            parameters={"rank": 8, "gate_rank": 4},
            others=others,
        )
    except CoterieError as error:
        assert "use_dora" in options, error
        assert "dora" in str(error).lower()
        return
    experts = [from_adapter(base, p, ("classifier",)) for p in paths]
    layers = body_linears("bert", base)
    assert_matches(mixture, base, experts, layers, inputs("bert"), rank=8, gate_rank=4, others=others)


def test_experts_that_touch_different_layers():
    """A layer has the experts that touched it as candidates, and none but those."""
    base = base_model("bert")
    touched = [("query",), ("query", "value"), ("pooler.dense",)]
    tuned = [fine_tune(base, s, modules=m, biases=False) for s, m in enumerate(touched)]
    experts = [from_model(base, t, ("classifier",)) for t in tuned]
    layers = body_linears("bert", base)
    for top_k in (1, 2, 3):
        mixture = smile(base, _named(tuned), rank=8, gate_rank=4, top_k=top_k)
        assert_matches(mixture, base, experts, layers, inputs("bert"), rank=8, gate_rank=4, top_k=top_k)


@pytest.mark.parametrize("others", ["base", "average"])
def test_bias_only_experts(others):
    """A bias without a weight delta: no candidate beside weight deltas; alone, it follows ``others``."""
    base = base_model("bert")
    tuned = [fine_tune(base, 1, modules=("query",)), fine_tune(base, 2, modules=("value",))]
    with torch.no_grad():
        tuned[0].bert.encoder.layer[0].attention.self.value.bias.add_(0.5)
        tuned[1].bert.encoder.layer[0].intermediate.dense.bias.add_(0.5)
    experts = [from_model(base, t, ("classifier",)) for t in tuned]
    layers = body_linears("bert", base)
    mixture = smile(base, _named(tuned), rank=8, gate_rank=4, others=others)
    assert_matches(mixture, base, experts, layers, inputs("bert"), rank=8, gate_rank=4, others=others)


def test_a_single_experts_bias_only_layers_apply():
    base = base_model("bert")
    tuned = fine_tune(base, 1, modules=("query",))
    with torch.no_grad():
        tuned.bert.encoder.layer[0].intermediate.dense.bias.add_(0.5)
    mixture = smile(base, {"only": tuned}, rank="full", gate_rank=4)
    assert relative_error(outputs(mixture, inputs("bert")), outputs(tuned, inputs("bert"))) <= 1e-5


def test_modules_include_and_exclude(tmp_path):
    base, tuned, experts = _full("bert", 2)
    save(base, tmp_path / "base")
    for i, model in enumerate(tuned):
        save(model, tmp_path / f"e{i}")
    sources = {f"e{i}": tmp_path / f"e{i}" for i in range(2)}
    patterns = {"include": ["*attention*"], "exclude": ["*key*"]}
    layers = [n for n in body_linears("bert", base) if "attention" in n and "key" not in n]
    for others in ("base", "average"):
        mixture = build(
            tmp_path / f"out-{others}",
            tmp_path / "base",
            sources,
            parameters={"rank": 8, "gate_rank": 4},
            modules=patterns,
            others=others,
        )
        assert_matches(mixture, base, experts, layers, inputs("bert"), rank=8, gate_rank=4, others=others)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_low_rank_deltas_of_full_fine_tunes_have_their_own_rank(arch):
    """W + BA rounded to float32 has rank-many directions, not noise: the gate never reads rounding errors."""
    base = base_model(arch)
    tuned = [fine_tune(base, 1, rank=3), fine_tune(base, 2, rank=12)]
    experts = [from_model(base, t, ARCHS[arch].heads) for t in tuned]
    mixture = smile(base, _named(tuned), rank=8, gate_rank=16)
    assert_matches(mixture, base, experts, body_linears(arch, base), inputs(arch), rank=8, gate_rank=16)


def test_sources_in_half_precision_compute_in_the_dtype_asked_for(tmp_path):
    base, tuned, _ = _full("bert", 2)
    base = base.bfloat16()
    tuned = [t.bfloat16() for t in tuned]
    save(base, tmp_path / "base")
    for i, model in enumerate(tuned):
        save(model, tmp_path / f"e{i}")
    experts = [from_model(base, t, ("classifier",)) for t in tuned]
    mixture = build(
        tmp_path / "out",
        tmp_path / "base",
        {f"e{i}": tmp_path / f"e{i}" for i in range(2)},
        parameters={"rank": 8, "gate_rank": 4},
        dtype="float32",
    )
    assert next(mixture.parameters()).dtype == torch.float32
    assert_matches(mixture, base.float(), experts, body_linears("bert", base), inputs("bert"), rank=8, gate_rank=4)


@pytest.mark.parametrize("others", ["base", "average"])
@pytest.mark.parametrize("kind", ["everything in half", "only the base in half"])
def test_nothing_is_rounded_on_the_way_to_the_dtype_asked_for(kind, others, tmp_path):
    """Sources in bfloat16, mixture in float32: also what follows ``others`` is computed in float32."""
    base, tuned, _ = _full("bert", 2, norms=True, everything=True)
    base = base.bfloat16()
    if kind == "everything in half":
        tuned = [t.bfloat16() for t in tuned]
    save(base, tmp_path / "base")
    for i, model in enumerate(tuned):
        save(model, tmp_path / f"e{i}")
    base = base.float()
    experts = [from_model(base, t.float(), ("classifier",)) for t in tuned]
    sources = {f"e{i}": tmp_path / f"e{i}" for i in range(2)}
    recipe = dict(parameters={"rank": 8, "gate_rank": 4}, others=others, dtype="float32")
    mixture = build(tmp_path / "out", tmp_path / "base", sources, **recipe)
    options = dict(rank=8, gate_rank=4, others=others)
    assert_matches(mixture, base, experts, body_linears("bert", base), inputs("bert"), **options)
