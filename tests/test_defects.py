"""The reference implementation of SMILE has fifteen known defects; coterie has none of them.

Each test is named after one of them. Where a defect was of a driver that has no counterpart here, the test asks
for the property that the defect broke.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import coterie
from coterie.errors import CoterieError
from matching import assert_matches, build, relative_error, smile, traced
from reference import Reference, from_model
from zoo import (
    ARCHS,
    VOCAB,
    base_model,
    body_linears,
    fine_tune,
    inputs,
    linear_names,
    make_adapter,
    outputs,
    save,
)


def two(base, **options):
    return {f"e{s}": fine_tune(base, s, **options) for s in (1, 2)}


def references(base, experts, arch):
    return [from_model(base, e, ARCHS[arch].heads) for e in experts.values()]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma2"])
def test_defect_01_a_mixture_in_memory_is_right_at_once(arch):
    """No buffer is left uninitialised: not even one that is not saved, such as rotary frequencies."""
    base = base_model(arch)
    experts = two(base)
    model = smile(base, experts, rank=6, gate_rank=4)
    theirs = dict(model.named_buffers())
    for name, buffer in base.named_buffers():
        assert torch.equal(theirs[name], buffer), name
    assert any("inv_freq" in n for n in theirs)
    layers = body_linears(arch, base)
    assert_matches(model, base, references(base, experts, arch), layers, inputs(arch), rank=6, gate_rank=4)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_defect_02_untouched_projections_reload(arch, tmp_path):
    """Experts that changed q and v only, as LoRA experts do: every other projection stays a plain layer."""
    base = base_model(arch)
    experts = two(base, modules=("q_proj", "v_proj"))
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in experts.items()}
    model = build(tmp_path / "out", base_dir, sources, parameters={"rank": 6, "gate_rank": 4})
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, trace = traced(again.eval(), inputs(arch))
    assert {n.rsplit(".", 1)[-1] for n in trace} == {"q_proj", "v_proj"}
    layers = body_linears(arch, base)
    assert_matches(again, base, references(base, experts, arch), layers, inputs(arch), rank=6, gate_rank=4)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma2", "clip"])
def test_defect_03_the_installed_transformers_builds_saves_and_loads(arch, tmp_path):
    base = base_model(arch)
    model = smile(base, two(base), rank=6, gate_rank=4)
    model.save_pretrained(tmp_path)
    again = coterie.load(tmp_path).eval()
    assert torch.equal(outputs(again, inputs(arch)), outputs(model, inputs(arch)))
    assert bool(getattr(again.config, "tie_word_embeddings", False)) == bool(
        getattr(base.config, "tie_word_embeddings", False)
    )


def test_defect_04_the_bias_of_the_base_is_added_once():
    base = base_model("qwen2")
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name.endswith("_proj.bias"):
                p.add_(3.0)
    expert = fine_tune(base, 1)
    model = smile(base, {"only": expert}, rank="full")
    assert relative_error(outputs(model, inputs("qwen2")), outputs(expert, inputs("qwen2"))) <= 1e-5
    experts = two(base)
    model = smile(base, experts, rank=6, gate_rank=4)
    layers = body_linears("qwen2", base)
    assert_matches(model, base, references(base, experts, "qwen2"), layers, inputs("qwen2"), rank=6, gate_rank=4)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "t5"])
def test_defect_05_storage_is_contiguous_and_as_large_as_the_parameters(arch, tmp_path):
    base = base_model(arch)
    model = smile(base, two(base, heads=False), rank=4, gate_rank=4)
    storages = {}
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        assert p.is_contiguous(), name
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
        storages[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    held = sum(storages.values())
    model.save_pretrained(tmp_path)
    written = sum(t.numel() * t.element_size() for f in tmp_path.glob("*.safetensors") for t in load_file(f).values())
    assert written <= held
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < held + 1024 * len(model.state_dict()) + 65536
    # E * (rank (m + n) + m), and gate rows only where the rank does not hold them
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    expected = 0
    for name in body_linears(arch, base):
        layer = base.get_submodule(name)
        m, n = layer.weight.shape
        expected += 2 * (4 * (m + n) + (0 if layer.bias is None else len(layer.bias)))
    assert added == expected


def test_defect_06_its_own_checkpoint_loads_without_pickle(tmp_path):
    base = base_model("bert")
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in two(base).items()}
    build(tmp_path / "out", base_dir, sources, parameters={"rank": 6}, load=False)
    assert {f.suffix for f in (tmp_path / "out").rglob("*") if f.is_file()} <= {".json", ".safetensors", ".md", ".txt"}
    loaded, unpickle = coterie.load, torch.load
    torch.load = lambda *_, **__: pytest.fail("a pickle was read")
    try:
        loaded(tmp_path / "out")
    finally:
        torch.load = unpickle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_defect_07_half_precision_models_build(arch, dtype, tmp_path):
    base = base_model(arch)
    experts = two(base)
    wanted = outputs(smile(base, experts, rank="full", gate_rank=4), inputs(arch))
    base, experts = base.to(dtype), {n: e.to(dtype) for n, e in experts.items()}
    live = smile(base, experts, rank="full", gate_rank=4)
    assert {p.dtype for p in live.parameters()} == {dtype}
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in experts.items()}
    built = build(tmp_path / "out", base_dir, sources, parameters={"rank": "full", "gate_rank": 4})
    assert {p.dtype for p in built.parameters()} == {dtype}
    for model in (live, built):
        assert relative_error(outputs(model, inputs(arch)).float(), wanted) < 0.3


@pytest.mark.parametrize("settings", [(1000, 4), (4, 1000), (1000, 1000)], ids=str)
def test_defect_08_ranks_beyond_the_matrix_are_clamped_and_reported(settings, tmp_path):
    rank, gate_rank = settings
    base = base_model("bert")
    experts = two(base)
    live = smile(base, experts, rank=rank, gate_rank=gate_rank)
    layers = body_linears("bert", base)
    options = dict(rank=rank, gate_rank=gate_rank)
    assert_matches(live, base, references(base, experts, "bert"), layers, inputs("bert"), **options)
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in experts.items()}
    build(tmp_path / "out", base_dir, sources, parameters=options, load=False)
    told = (tmp_path / "out" / "mixture.json").read_text()
    assert "1000" in told  # what was asked for
    assert "clamp" in told.lower()  # and that it was more than the layers allow
    mixture = coterie.load(tmp_path / "out").eval()
    assert_matches(mixture, base, references(base, experts, "bert"), layers, inputs("bert"), **options)


class Pooled(nn.Module):
    """A plain module with torch's own attention between two linears."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.after = nn.Linear(16, 4)

    def forward(self, x):
        h = self.before(x)
        return self.after(h + self.attention(h, h, h, need_weights=False)[0])


def _siglip(tmp_path):
    """A SigLIP vision tower, whose pooling head holds an nn.MultiheadAttention, and two fine-tunes."""
    import copy

    import transformers as tf

    config = tf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    base = tf.SiglipVisionModel(config).eval()
    with torch.no_grad():
        for p in base.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    experts = {}
    for seed in (1, 2):
        gen = torch.Generator().manual_seed(seed)
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=gen))
        experts[f"e{seed}"] = expert
    base.save_pretrained(tmp_path / "base")
    for name, expert in experts.items():
        expert.save_pretrained(tmp_path / name)
    return base, experts


@pytest.mark.parametrize("others", ["base", "average"])
def test_defect_09_attention_of_torch_follows_others_and_is_reported(others, tmp_path):
    base, experts = _siglip(tmp_path)
    sources = {n: tmp_path / n for n in experts}
    model = build(tmp_path / "out", tmp_path / "base", sources, parameters={"rank": 6, "gate_rank": 4}, others=others)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), coterie.routing_trace(model) as trace:
        got = model(pixels).pooler_output
    attention = next(n for n, m in base.named_modules() if isinstance(m, nn.MultiheadAttention))
    assert trace
    assert not [n for n in trace if n.startswith(attention)]
    ours, start = model.get_submodule(attention), base.get_submodule(attention)
    deltas = [e.get_submodule(attention).in_proj_weight - start.in_proj_weight for e in experts.values()]
    wanted = start.in_proj_weight + (sum(deltas) / 2 if others == "average" else 0)
    torch.testing.assert_close(ours.in_proj_weight, wanted)
    layers = [n for n in linear_names(base) if not n.startswith(attention)]
    reference = Reference(base, references_plain(base, experts), layers, rank=6, gate_rank=4, others=others)
    assert set(trace) == set(reference.layers)
    expected = reference.run(lambda m: m(pixels.double()).pooler_output, dict(trace.items()))
    assert relative_error(got, expected.detach()) <= 1e-5
    assert attention in (tmp_path / "out" / "mixture.json").read_text()


def references_plain(base, experts):
    return [from_model(base, e) for e in experts.values()]


def test_defect_09_in_a_plain_module():
    """What coterie.smile makes of any module: linears become mixture layers, torch's attention stays the base's."""
    import copy

    torch.manual_seed(0)
    base = Pooled().eval()
    experts = {}
    for name in ("a", "b"):
        experts[name] = copy.deepcopy(base)
        with torch.no_grad():
            for p in experts[name].parameters():
                p.add_(0.2 * torch.randn(p.shape))
    model = smile(base, experts, rank=4, gate_rank=4)
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), coterie.routing_trace(model) as trace:
        got = model(x)
    layers = ["before", "after"]
    reference = Reference(base, references_plain(base, experts), layers, rank=4, gate_rank=4)
    assert set(trace) == set(layers)
    wanted = reference.run(lambda m: m(x.double()), dict(trace.items()))
    assert relative_error(got, wanted.detach()) <= 1e-5


def test_defect_10_conv1d_is_upscaled():
    from transformers.pytorch_utils import Conv1D

    base = base_model("gpt2")
    experts = two(base)
    model = smile(base, experts, rank=6, gate_rank=4)
    _, trace = traced(model, inputs("gpt2"))
    assert set(trace) == set(body_linears("gpt2", base))
    assert all(isinstance(model.get_submodule(n), Conv1D) for n in trace)


def test_defect_10_heads_of_different_size_are_kept_per_expert():
    base = base_model("bert", num_labels=2)
    wide = base_model("bert", num_labels=7)
    wide.bert.load_state_dict(base.bert.state_dict())
    experts = {"narrow": fine_tune(base, 1), "wide": fine_tune(wide, 2)}
    model = smile(base, experts, rank=6, gate_rank=4)
    for name, expert in experts.items():
        with model.coterie.use_head(name):
            assert outputs(model, inputs("bert")).shape[1] == expert.classifier.out_features


@pytest.mark.parametrize("arch", ["bert", "gpt2", "qwen2"])
def test_defect_11_base_and_experts_are_not_touched(arch):
    base = base_model(arch)
    experts = two(base, norms=True)
    models = {"base": base, **experts}
    before = {n: ({k: v.clone() for k, v in m.state_dict().items()}, m.state_dict()) for n, m in models.items()}
    types = {n: [type(x) for x in m.modules()] for n, m in models.items()}
    configs = {n: m.config.to_dict() for n, m in models.items()}
    answers = {n: outputs(m, inputs(arch)) for n, m in models.items()}
    model = smile(base, experts, rank=6, gate_rank=4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # nothing is shared with what it was built from
    for name, m in models.items():
        copied, held = before[name]
        assert [type(x) for x in m.modules()] == types[name]
        assert m.config.to_dict() == configs[name]
        for key, value in m.state_dict().items():
            assert torch.equal(value, copied[key]), (name, key)
            assert value.data_ptr() == held[key].data_ptr()
        assert torch.equal(outputs(m, inputs(arch)), answers[name])
        assert not hasattr(m, "coterie")


def test_defect_11_inputs_need_not_be_contiguous():
    base = base_model("bert")
    model = smile(base, two(base), rank=6, gate_rank=4, top_k=2)
    x = torch.randn(32, 5, 2, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    assert not x.is_contiguous()
    with torch.no_grad():
        got, wanted = model(inputs_embeds=x).logits, model(inputs_embeds=x.contiguous()).logits
        assert relative_error(got, wanted) <= 1e-6
        name = "bert.encoder.layer.0.attention.self.query"
        got, wanted = model.get_submodule(name)(x), model.get_submodule(name)(x.contiguous())
    assert relative_error(got, wanted) <= 1e-6


def test_defect_12_gradients_compile_and_export():
    """With one expert per token the experts are trained, and the model compiles to one graph and exports."""
    base = base_model("bert")
    model = smile(base, two(base), rank=6, gate_rank=4, top_k=1)
    batch = inputs("bert")
    for p in model.parameters():
        p.requires_grad_(True)
    model(**batch).logits.square().sum().backward()
    shapes = {p.shape for p in base.parameters()}
    factors = [p for p in model.parameters() if p.shape not in shapes]
    assert len(factors) >= 26
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)
    wanted = outputs(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(outputs(compiled, batch), wanted) <= 1e-5
    torch._dynamo.reset()
    exported = torch.export.export(model, (), dict(batch))
    with torch.no_grad():
        assert relative_error(exported.module()(**batch).logits, wanted) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_defect_13_scores_do_not_overflow(dtype):
    """Hidden states whose projection is longer than float16 can say still route by energy, whatever the dtype."""
    base = base_model("bert")
    with torch.no_grad():
        base.bert.embeddings.LayerNorm.weight.fill_(15000)
        base.bert.embeddings.LayerNorm.bias.zero_()
    experts = two(base)
    base, experts = base.to(dtype), {n: e.to(dtype) for n, e in experts.items()}
    model = smile(base, experts, rank="full", gate_rank=24, top_k=1)
    kept = {}
    name = "bert.encoder.layer.0.attention.self.query"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.update(x=args[0]))
    with torch.no_grad(), coterie.routing_trace(model) as trace:
        model(**inputs("bert", batch=8))
    hook.remove()
    assert torch.isfinite(kept["x"]).all()
    reference = Reference(base, references(base, experts, "bert"), [name], rank="full", gate_rank=24)
    _, decision = reference.layers[name](kept["x"], None)
    beyond = decision.scores.min(-1).values > torch.finfo(torch.float16).max
    assert beyond.float().mean() > 0.3
    gates = trace[name].reshape(-1, 2)
    assert torch.isfinite(gates).all()
    clear = beyond & (decision.margin > 0.01 * decision.scores.max(-1).values)
    assert len(set(decision.free[clear][:, 0].tolist())) == 2
    assert ((gates > 0) == decision.free)[clear].all()


def test_defect_14_what_is_on_disk_is_what_is_used(tmp_path):
    """Missing parent directories are made; an existing output is refused, not overwritten; a load reads the files."""
    base = base_model("bert")
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in two(base).items()}
    out = tmp_path / "not" / "yet" / "there"
    model = build(out, base_dir, sources, parameters={"rank": 6})
    with pytest.raises(CoterieError, match="there"):
        build(out, base_dir, sources, parameters={"rank": 6})
    shard = next(out.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("classifier.bias") or "pooler.dense.bias" in n)
    tensors[name] = tensors[name] + 1.0
    save_file(tensors, shard, metadata={"format": "pt"})
    assert relative_error(outputs(coterie.load(out).eval(), inputs("bert")), outputs(model, inputs("bert"))) > 1e-3


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "gpt2", "t5"])
def test_defect_15_a_tied_output_embedding_stays_tied_and_dense(arch, tmp_path):
    base = base_model(arch)
    experts = two(base, everything=True)
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in experts.items()}
    built = build(tmp_path / "out", base_dir, sources, parameters={"rank": 6, "gate_rank": 4})
    live = smile(base, experts, rank=6, gate_rank=4)
    for model in (built, live):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert type(head) is nn.Linear
        assert head.weight is embedding.weight
        assert torch.equal(head.weight, base.get_output_embeddings().weight)
        _, trace = traced(model, inputs(arch))
        assert not [n for n in trace if "lm_head" in n]
    stored = [n for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items() if VOCAB in t.shape]
    assert len(stored) == 1


def test_everything_that_follows_a_policy_is_reported(tmp_path):
    """Nothing is dropped silently: fused experts, unused linears, norms and embeddings are all named."""
    cases = {"mixtral": ["experts", "embed_tokens", "norm", "lm_head"], "mamba": ["dt_proj", "conv1d", "A_log"]}
    for arch, names in cases.items():
        base = base_model(arch)
        experts = two(base, everything=True, norms=True)
        if arch == "mamba":
            with torch.no_grad():
                for e in experts.values():
                    e.backbone.layers[0].mixer.dt_proj.weight.add_(0.1)
        base_dir = save(base, tmp_path / f"{arch}-base")
        sources = {n: save(e, tmp_path / f"{arch}-{n}") for n, e in experts.items()}
        build(tmp_path / arch, base_dir, sources, parameters={"rank": 6}, load=False)
        told = json.dumps(json.loads((tmp_path / arch / "mixture.json").read_text()))
        for name in names:
            assert name in told, (arch, name)


def test_experts_that_touch_different_layers_are_warned_of(tmp_path):
    base = base_model("bert")
    experts = {"a": fine_tune(base, 1, modules=("query",)), "b": fine_tune(base, 2, modules=("value",))}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        coterie.smile(base, experts, rank=6, gate_rank=4)
    base_dir = save(base, tmp_path / "base")
    sources = {n: save(e, tmp_path / n) for n, e in experts.items()}
    report = build(tmp_path / "out", base_dir, sources, parameters={"rank": 6}, load=False)
    text = " ".join([*(str(w.message) for w in told), str(report), (tmp_path / "out" / "mixture.json").read_text()])
    assert "different layers" in text


def test_adapters_that_share_their_row_space_are_warned_of(tmp_path):
    """LoRA adapters trained from one seed share A's row space, where the gate cannot tell them apart."""
    base = base_model("bert")
    base_dir = save(base, tmp_path / "base")
    one = make_adapter(base_dir, tmp_path / "a", 1, arch="bert")
    make_adapter(base_dir, tmp_path / "b", 2, arch="bert")
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("a", "b"))
    shared = {n: (ours if "lora_A" in n else theirs)[n].clone() for n in theirs}
    save_file(shared, tmp_path / "b" / "adapter_model.safetensors", metadata={"format": "pt"})

    def warned(out, sources):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            recipe = {"method": "smile", "base": str(base_dir), "experts": sources, "parameters": {"rank": 4}}
            report = coterie.build(recipe, out=out)
        return " ".join([*(str(w.message) for w in told), str(report), (out / "mixture.json").read_text()]).lower()

    told = warned(tmp_path / "same", {"a": str(one), "b": str(tmp_path / "b")})
    assert "told apart" in told or "overlap" in told
