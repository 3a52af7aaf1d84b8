"""A mixture is an ordinary model: the Trainer trains it, PEFT wraps it, it is copied, cast, compiled and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import Dataset

import coterie
from matching import build, relative_error, smile, traced
from zoo import base_model, fine_tune, inputs, make_adapter, outputs, save


def mixture_of(arch, **options):
    base = base_model(arch)
    return smile(base, {f"e{s}": fine_tune(base, s) for s in (1, 2)}, **{"rank": 6, "gate_rank": 4, **options})


@pytest.fixture
def loaded(tmp_path):
    """A mixture of a fine-tune and an adapter, loaded from its directory."""
    base = base_model("bert")
    base_dir, tuned = save(base, tmp_path / "base"), save(fine_tune(base, 1), tmp_path / "tuned")
    adapter = make_adapter(base_dir, tmp_path / "adapter", 2, arch="bert")
    return build(tmp_path / "out", base_dir, {"a": tuned, "b": adapter}, parameters={"rank": 6, "gate_rank": 4})


class Rows(Dataset):
    """Four labelled rows."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        batch = inputs("bert", batch=1, seed=i)
        return {**{k: v[0] for k, v in batch.items()}, "labels": i % 3}


def test_the_trainer_trains_a_loaded_mixture(loaded, tmp_path):
    from transformers import Trainer, TrainingArguments

    before = {n: p.detach().clone() for n, p in loaded.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )
    trainer = Trainer(model=loaded, args=arguments, train_dataset=Rows())
    result = trainer.train()
    assert torch.isfinite(torch.tensor(result.training_loss))
    after = dict(loaded.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before)
    loaded.eval()
    saved = coterie.load(tmp_path / "run" / "checkpoint-2").eval()
    assert torch.equal(outputs(saved, inputs("bert")), outputs(loaded, inputs("bert")))

    arguments.max_steps = 3
    resumed = Trainer(model=coterie.load(tmp_path / "out"), args=arguments, train_dataset=Rows())
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")).global_step == 3
    assert not torch.equal(outputs(resumed.model.eval(), inputs("bert")), outputs(saved, inputs("bert")))


def test_the_trainer_takes_a_live_mixture(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    Trainer(model=mixture_of("bert"), args=arguments, train_dataset=Rows()).train()


def test_lora_on_top(loaded, tmp_path):
    import peft

    batch = inputs("bert")
    wanted = outputs(loaded, batch)
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["query", "pooler.dense"])).eval()
    assert relative_error(outputs(adapted, batch), wanted) <= 1e-6
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert trainable
    adapted(**batch).logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    with torch.no_grad():
        for p in trainable:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    changed = outputs(adapted, batch)
    assert relative_error(changed, wanted) > 1e-3
    with adapted.disable_adapter():
        assert relative_error(outputs(adapted, batch), wanted) <= 1e-6
    copied = copy.deepcopy(adapted).merge_and_unload().eval()
    assert relative_error(outputs(copied, batch), changed) <= 1e-5
    assert copied.coterie.expert_names == ["a", "b"]
    adapted.save_pretrained(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(coterie.load(tmp_path / "out").eval(), str(tmp_path / "lora")).eval()
    assert relative_error(outputs(again, batch), changed) <= 1e-6


@pytest.mark.parametrize("arch", ["bert", "gpt2", "qwen2"])
def test_deepcopy_is_independent(arch):
    model = mixture_of(arch)
    batch = inputs(arch)
    wanted = outputs(model, batch)
    other = copy.deepcopy(model)
    assert torch.equal(outputs(other, batch), wanted)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert torch.equal(outputs(model, batch), wanted)
    assert not torch.equal(outputs(other, batch), wanted)
    with coterie.routing_trace(other) as theirs, coterie.routing_trace(model) as ours:
        outputs(model, batch)
    assert len(ours) > 0
    assert len(theirs) == 0
    if arch == "bert":
        before = outputs(model, batch)
        other.coterie.use_head("e2")
        assert torch.equal(outputs(model, batch), before)
        assert model.coterie.head == "e1"


def test_state_dicts_go_without_pickled_code(tmp_path):
    model, fresh = mixture_of("bert"), mixture_of("bert")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh, inputs("bert")), outputs(model, inputs("bert")))


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting(arch, dtype):
    model = mixture_of(arch)
    wanted = outputs(model, inputs(arch))
    cast = model.to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    got, trace = traced(cast, inputs(arch))
    assert relative_error(got, wanted) < (1e-5 if dtype == torch.float64 else 0.25)
    for gates in trace.values():
        assert torch.isfinite(gates).all()


def test_a_loaded_mixture_is_cast_and_moved_like_any_model(loaded):
    wanted = outputs(loaded, inputs("bert"))
    assert torch.equal(outputs(loaded.to("cpu"), inputs("bert")), wanted)
    assert relative_error(outputs(loaded.double(), inputs("bert")), wanted) <= 1e-5
    assert relative_error(outputs(loaded.half(), inputs("bert")).float(), wanted) < 0.25
    assert {p.dtype for p in loaded.bfloat16().parameters()} == {torch.bfloat16}
    assert not any(getattr(loaded, mark, None) for mark in ("is_quantized", "quantization_method", "hf_quantizer"))


def test_t5_keeps_its_float32_part_in_float16(tmp_path):
    """T5's `wo` stays in float32 when the rest is float16, and so do its experts; the model reads `wo.weight.dtype`."""
    base = base_model("t5")
    sources = {f"e{s}": save(fine_tune(base, s), tmp_path / f"e{s}") for s in (1, 2)}
    built = build(tmp_path / "out", save(base, tmp_path / "base"), sources, parameters={"rank": 6, "gate_rank": 4})
    wanted = outputs(built, inputs("t5"))
    half = coterie.load(tmp_path / "out", dtype=torch.float16).eval()
    dense = type(built).from_pretrained(tmp_path / "base", dtype=torch.float16)
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    assert half.get_submodule(name).weight.dtype == dense.get_submodule(name).weight.dtype
    assert relative_error(outputs(half, inputs("t5")).float(), wanted) < 0.1


def test_embeddings_can_be_resized(tmp_path):
    model = mixture_of("llama")
    wanted = outputs(model, inputs("llama")).reshape(2, 7, -1)
    model.resize_token_embeddings(110)
    model.save_pretrained(tmp_path)
    again = coterie.load(tmp_path).eval()
    got = outputs(again, inputs("llama")).reshape(2, 7, -1)
    assert got.shape[-1] == 110
    assert relative_error(got[..., : wanted.shape[-1]], wanted) <= 1e-6


COMPILED = {("bert", 1), ("gpt2", 2)}


@pytest.mark.parametrize(
    ("arch", "top_k"),
    [
        (a, k) if (a, k) in COMPILED else pytest.param(a, k, marks=pytest.mark.slow)
        for a in ("bert", "gpt2", "llama", "vit", "t5")
        for k in (1, 2)
    ],
)
def test_compiles_to_one_graph(arch, top_k):
    model = mixture_of(arch, top_k=top_k)
    batch = inputs(arch)
    wanted = outputs(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(outputs(compiled, batch), wanted) <= 1e-5
    other = inputs(arch, batch=3, seed=5)
    assert relative_error(outputs(compiled, other), outputs(model, other)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama", "t5"])
def test_compiles_ahead_of_time(arch):
    model = mixture_of(arch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(outputs(compiled, inputs(arch)), outputs(model, inputs(arch))) <= 1e-5


@pytest.mark.slow
def test_a_compiled_mixture_follows_its_head():
    model = mixture_of("bert")
    batch = inputs("bert")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name in ("e1", "e2", "e1"):
        model.coterie.use_head(name)
        assert relative_error(outputs(compiled, batch), outputs(model, batch)) <= 1e-6


@pytest.mark.parametrize("arch", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("strict", [True, False])
def test_exports(arch, strict):
    model = mixture_of(arch)
    batch = inputs(arch)
    options = {"use_cache": False} if arch == "gpt2" else {}
    wanted = outputs(model, batch)
    torch._dynamo.reset()
    exported = torch.export.export(model, (), {**batch, **options}, strict=strict)
    with torch.no_grad():
        got = exported.module()(**batch, **options).logits
    assert relative_error(got.reshape(len(got), -1), wanted) <= 1e-5


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_attention_can_be_switched_on_a_live_mixture(arch, tmp_path):
    model = mixture_of(arch)
    wanted = outputs(model, inputs(arch))
    model.set_attn_implementation("eager")
    assert relative_error(outputs(model, inputs(arch)), wanted) <= 1e-5
    with torch.no_grad():
        assert model(**inputs(arch), output_attentions=True).attentions[0].shape[:2] == (2, 4)
    model.save_pretrained(tmp_path)
    assert relative_error(outputs(coterie.load(tmp_path).eval(), inputs(arch)), wanted) <= 1e-5


def test_gradients_reach_experts_and_inputs():
    model = mixture_of("bert", top_k=2).train()
    for p in model.parameters():
        p.requires_grad_(True)
    embeddings = torch.randn(2, 5, 32, requires_grad=True)
    model(inputs_embeds=embeddings).logits.square().sum().backward()
    assert torch.isfinite(embeddings.grad).all()
    assert embeddings.grad.abs().sum() > 0
    shapes = {p.shape for p in base_model("bert").parameters()}
    factors = [p for p in model.parameters() if p.shape not in shapes]
    assert len(factors) >= 26
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)


def test_gradient_checkpointing_changes_nothing():
    model = mixture_of("bert").train()
    batch = {**inputs("bert"), "labels": torch.tensor([0, 2])}

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients()
        model.gradient_checkpointing_disable()
        assert set(again) == set(plain)
        for name, grad in plain.items():
            torch.testing.assert_close(again[name], grad)
