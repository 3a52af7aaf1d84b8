"""Generation, padding, batch mates and causality: routing is per token, so none of them may change an answer."""

from __future__ import annotations

import pytest
import torch

from matching import relative_error, smile, traced
from zoo import ALL, ARCHS, CAUSAL, PAD, VOCAB, base_model, fine_tune, inputs, outputs

FAST = ["gpt2", "llama", "gemma2", "mamba", "qwen3_moe"]
CAUSAL_PARAMS = [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in CAUSAL]


def mixture_of(arch, top_k=1):
    base = base_model(arch)
    tuned = {f"e{s}": fine_tune(base, s) for s in (1, 2, 3)}
    return smile(base, tuned, rank=6, gate_rank=4, top_k=top_k)


def prompt(batch=2, length=6, seed=0):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=gen)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model, batch, **options):
    with torch.no_grad():
        return model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=8,
            min_new_tokens=8,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


@pytest.mark.parametrize("arch", [*CAUSAL_PARAMS, "t5"])
def test_a_cache_changes_nothing(arch):
    model = mixture_of(arch)
    cached = generate(model, prompt(), use_cache=True)
    plain = generate(model, prompt(), use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_static_cache_changes_nothing(arch):
    model = mixture_of(arch)
    static = generate(model, prompt(), cache_implementation="static")
    plain = generate(model, prompt(), use_cache=False)
    assert torch.equal(static.sequences, plain.sequences)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_beams_reorder_nothing_else(arch):
    model = mixture_of(arch, top_k=2)
    cached = generate(model, prompt(), use_cache=True, num_beams=3)
    plain = generate(model, prompt(), use_cache=False, num_beams=3)
    assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_generated_logits_are_the_forward_passes(arch):
    model = mixture_of(arch)
    out = generate(model, prompt())
    with torch.no_grad():
        logits = model(input_ids=out.sequences).logits
    for step, got in enumerate(out.logits):
        assert relative_error(got, logits[:, 5 + step]) <= 1e-5


def padded(batch, extra, side):
    """The batch with ``extra`` columns of padding on one side, and explicit positions."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    pad = torch.full((len(ids), extra), PAD)
    order = [pad, ids] if side == "left" else [ids, pad]
    masks = [torch.zeros_like(pad), mask] if side == "left" else [mask, torch.zeros_like(pad)]
    mask = torch.cat(masks, 1)
    return {"input_ids": torch.cat(order, 1), "attention_mask": mask}


@pytest.mark.parametrize("arch", [p for p in CAUSAL_PARAMS if p != "mamba"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_causal_models(arch, side):
    model = mixture_of(arch, top_k=2)
    batch = prompt()
    more = padded(batch, 3, side)
    length = batch["input_ids"].shape[1]
    keep = slice(3, 3 + length) if side == "left" else slice(0, length)
    positions = (more["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = model(**batch).logits
        got = model(**more, position_ids=positions).logits
    assert relative_error(got[:, keep], wanted) <= 1e-5


@pytest.mark.parametrize("arch", ["bert", "roberta", "distilbert"])
def test_padding_in_encoders(arch):
    model = mixture_of(arch, top_k=2)
    batch = prompt()
    for extra in (1, 4):
        more = padded(batch, extra, "right")
        assert relative_error(outputs(model, more), outputs(model, batch)) <= 1e-5


def test_padding_in_an_encoder_decoder():
    model = mixture_of("t5")
    batch = inputs("t5")
    decoder = batch.pop("decoder_input_ids")
    got = outputs(model, {**padded(batch, 3, "right"), "decoder_input_ids": decoder})
    assert relative_error(got, outputs(model, {**batch, "decoder_input_ids": decoder})) <= 1e-5


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_padded_generation(arch):
    """A prompt continues as it does alone, whatever stands beside it in the batch."""
    model = mixture_of(arch)
    short, long = prompt(1, 4, seed=1), prompt(1, 7, seed=2)
    filled = padded(short, 3, "left")
    both = {k: torch.cat([filled[k], long[k]]) for k in filled}
    together = generate(model, both)
    for row, alone in enumerate((short, long)):
        single = generate(model, alone)
        assert torch.equal(together.sequences[row, 7:], single.sequences[0, alone["input_ids"].shape[1] :])
        for a, b in zip(together.logits, single.logits, strict=True):
            assert relative_error(a[row : row + 1], b) <= 1e-5


@pytest.mark.parametrize("arch", ALL)
def test_batch_mates_change_nothing(arch):
    model = mixture_of(arch, top_k=2 if arch == "bert" else 1)
    batch = inputs(arch, batch=3)
    got, trace = traced(model, batch)
    for row in range(3):
        alone, gates = traced(model, {k: v[row : row + 1] for k, v in batch.items()})
        if ARCHS[arch].kind == "clip":  # logits_per_* compare rows; the embeddings do not
            assert alone.shape[1] == got.shape[1]
        assert relative_error(got[row : row + 1], alone) <= 1e-5
        for name, g in gates.items():
            assert (trace[name][row : row + 1] - g).abs().max() < 1e-4


@pytest.mark.parametrize("arch", CAUSAL)
def test_earlier_logits_do_not_depend_on_later_tokens(arch):
    model = mixture_of(arch)
    batch = prompt(length=8)
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][:, 5:] = (changed["input_ids"][:, 5:] + 17) % (VOCAB - 3) + 3
    with torch.no_grad():
        ours, theirs = model(**batch).logits, model(**changed).logits
    assert relative_error(ours[:, :5], theirs[:, :5]) <= 1e-5
    assert relative_error(ours[:, 5:], theirs[:, 5:]) > 1e-2


def test_decoder_logits_of_an_encoder_decoder_are_causal():
    model = mixture_of("t5")
    batch = inputs("t5")
    changed = dict(batch, decoder_input_ids=batch["decoder_input_ids"].clone())
    changed["decoder_input_ids"][:, 3:] = 5
    with torch.no_grad():
        ours, theirs = model(**batch).logits, model(**changed).logits
    assert relative_error(ours[:, :3], theirs[:, :3]) <= 1e-5


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_the_traces_shape_is_batch_tokens_experts(arch):
    model = mixture_of(arch, top_k=2)
    batch = inputs(arch, batch=3)
    _, trace = traced(model, batch)
    tokens = batch["input_ids"].shape[1]
    for name, gates in trace.items():
        assert gates.shape == (3, 1 if "pooler" in name else tokens, 3)
        torch.testing.assert_close(gates.sum(-1).float(), torch.ones(gates.shape[:2]))
        assert ((gates > 0).sum(-1) == 2).all()
    assert list(model.coterie.expert_names) == ["e1", "e2", "e3"]
