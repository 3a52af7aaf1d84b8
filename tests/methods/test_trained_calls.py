"""Calls of trained mixtures: causality, generation, threads, gradient checkpointing, compilation."""

from __future__ import annotations

import threading

import pytest
import torch
from trained import BY_TASK, CAUSAL, KINDS, batch_of, call_of, quick, randomise, tasks, wrapped
from transformers import DynamicCache

import coterie
from coterie.routing.dselect import DSelect
from coterie.routing.linear import Linear, Soft
from coterie.routing.prepass import Classifier
from matching import relative_error
from zoo import base_model

PROMPTED = ("prompt", "segment")


def lengths_of(given):
    return given["attention_mask"].sum(1)


def logits_of(model, given):
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize(("method", "options", "arch"), quick([(*c, a) for c in CAUSAL for a in ("llama", "gpt2")], 3))
def test_no_token_sees_a_later_one(method, options, arch):
    """What follows the prompt reaches neither the prompt nor anything before it."""
    model = wrapped(arch, method, "lora", **options).eval()
    given = call_of(method, batch_of(arch, padding=""))
    if options.get("pool") in PROMPTED:
        given["prompt_lengths"] = torch.tensor([1, 2, 3])
    before = logits_of(model, given)
    for at in range(3, 7):
        later = {**given, "input_ids": given["input_ids"].clone()}
        later["input_ids"][:, at:] = (later["input_ids"][:, at:] + 11) % 90 + 5
        assert torch.allclose(logits_of(model, later)[:, :at], before[:, :at], rtol=1e-5, atol=1e-6), at


@pytest.mark.parametrize("method", ["smear", "ensemble"])
def test_segments_without_a_prompt_do_not_look_ahead(method):
    model = wrapped("llama", method, pool="segment", segment=2).eval()
    given = batch_of("llama", padding="")
    before = logits_of(model, given)
    for at in range(1, 7):
        later = {**given, "input_ids": given["input_ids"].clone()}
        later["input_ids"][:, at:] = (later["input_ids"][:, at:] + 11) % 90 + 5
        assert torch.allclose(logits_of(model, later)[:, :at], before[:, :at], rtol=1e-5, atol=1e-6), at
    assert relative_error(logits_of(model, later), before) > 1e-3


@pytest.mark.parametrize("method", ["smear", "ensemble", "st_gumbel", "reinforce", "dselect_k", "hash", "soft_moe"])
def test_what_would_look_ahead_is_refused(method):
    options = {"pool": "sequence"} if method != "soft_moe" else {}
    with pytest.raises(coterie.CoterieError, match=r"look ahead in a LlamaForCausalLM, .*; use "):
        wrapped("llama", method, **options)
    if method == "soft_moe":
        with pytest.raises(coterie.CoterieError, match="look ahead in a T5ForConditionalGeneration"):
            wrapped("t5", method)


@pytest.mark.parametrize(("method", "options"), quick(CAUSAL, 3))
def test_cached_generation_is_the_full_forward(method, options):
    """Greedy, on the left-padded batch that `generate` wants; and each row as if it were alone."""
    model = wrapped("llama", method, "bottleneck" if method not in ("mhr",) else "lora", **options).eval()
    given = call_of(method, batch_of("llama", padding="left"))
    new = 4
    out = model.generate(
        **given,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    mask = torch.cat([given["attention_mask"], torch.ones(3, new, dtype=torch.long)], 1)
    full = {**given, "input_ids": out.sequences, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)}
    if options.get("pool") in PROMPTED:
        full["prompt_lengths"] = lengths_of(given)
    wanted = logits_of(model, full)[:, -new - 1 : -1]
    assert relative_error(torch.stack(out.logits, 1), wanted) <= 1e-5
    alone = {k: v[1:2, 1:] if v.ndim > 1 else v[1:2] for k, v in given.items()}
    one = model.generate(**alone, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    assert torch.equal(one[0], out.sequences[1, 1:])


@pytest.mark.parametrize(("method", "options"), quick(CAUSAL, 4, 1))
def test_beams(method, options):
    """The score of each beam that is returned is its tokens' mean log probability in a full forward."""
    model = wrapped("llama", method, **options).eval()
    given = call_of(method, batch_of("llama", padding="left"))
    new, beams = 4, 3
    out = model.generate(
        **given,
        max_new_tokens=new,
        min_new_tokens=new,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=-1,
    )
    repeat = {k: v.repeat_interleave(beams, 0) for k, v in given.items()}
    mask = torch.cat([repeat["attention_mask"], torch.ones(3 * beams, new, dtype=torch.long)], 1)
    full = {**repeat, "input_ids": out.sequences, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(0)}
    if options.get("pool") in PROMPTED:
        full["prompt_lengths"] = lengths_of(repeat)
    wanted = logits_of(model, full)[:, -new - 1 : -1].log_softmax(-1)
    wanted = wanted.gather(-1, out.sequences[:, -new:, None])[..., 0].sum(1) / new
    assert torch.allclose(out.sequences_scores, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "beams"), quick([(m, b) for m, kind in KINDS if kind == "lora" and m != "soft_moe" for b in (1, 2)], 5)
)
def test_encoder_decoder_generation(method, beams):
    model = wrapped("t5", method).eval()
    given = call_of(method, batch_of("t5"))
    given.pop("decoder_input_ids")
    new = 3
    out = model.generate(
        **given,
        max_new_tokens=new,
        min_new_tokens=new,
        num_beams=beams,
        do_sample=False,
        output_scores=beams > 1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full = {**given, "decoder_input_ids": out.sequences}
    wanted = logits_of(model, full)[:, :-1]
    if beams == 1:
        assert relative_error(torch.stack(out.logits, 1), wanted) <= 1e-5
    else:
        scores = wanted.log_softmax(-1).gather(-1, out.sequences[:, 1:, None])[..., 0].sum(1) / new
        assert torch.allclose(out.sequences_scores, scores, atol=1e-4)
    assert model.coterie._context.call is None


def test_generation_while_the_mode_is_training():
    """Reinforcement learning does that; decisions live beside the cache all the same."""
    model = wrapped("llama", "smear", pool="prompt", expert_dropout=0.0)
    given = batch_of("llama", padding="left")
    wanted = model.eval().generate(**given, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.train().generate(**given, max_new_tokens=3, do_sample=False), wanted)


def test_a_conversation_goes_on_from_its_cache():
    model = wrapped("llama", "smear", pool="prompt").eval()
    given = batch_of("llama", padding="")
    with torch.no_grad():
        first = model(**{k: v[:, :4] for k, v in given.items()}, use_cache=True, prompt_lengths=torch.full((3,), 4))
        second = model(given["input_ids"][:, 4:], past_key_values=first.past_key_values)
    wanted = logits_of(model, {**given, "prompt_lengths": torch.full((3,), 4)})
    assert relative_error(torch.cat([first.logits, second.logits], 1), wanted) <= 1e-5
    dense = base_model("llama")
    foreign = dense(given["input_ids"], use_cache=True).past_key_values
    with pytest.raises(coterie.CoterieError, match="not filled by this mixture"):
        model(given["input_ids"][:, :1], past_key_values=foreign)


def meeting(barrier):
    def meet(*_):
        barrier.wait(10)

    return meet


@pytest.mark.parametrize(("arch", "method"), [("bert", "smear"), ("t5", "poly"), ("t5", "smear"), ("bert", "soft_moe")])
def test_threads_do_not_see_each_other(arch, method):
    """Both are in the middle of a call at the same time, with masks and tasks of their own."""
    model = wrapped(arch, method).eval()
    batches = [call_of(method, batch_of(arch, padding=p)) for p in ("right", "")]
    if method in BY_TASK:
        batches[1]["task_ids"] = tasks().flip(0)
    wanted = [logits_of(model, b) for b in batches]
    assert relative_error(wanted[0], wanted[1]) > 1e-3
    barrier, got = threading.Barrier(2), [None, None]
    path = model.coterie.layers[2]

    def run(i):
        got[i] = logits_of(model, batches[i])

    hook = model.get_submodule(path).register_forward_pre_hook(meeting(barrier))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_threads_generate_at_the_same_time():
    """`generate` calls the encoder by itself."""
    model = wrapped("t5", "poly").eval()
    given = {k: v for k, v in batch_of("t5").items() if k != "decoder_input_ids"}
    batches = [{**given, "task_ids": tasks()}, {**given, "task_ids": tasks().flip(0)}]
    options = dict(
        max_new_tokens=3, min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    wanted = [torch.stack(model.generate(**b, **options).logits) for b in batches]
    assert relative_error(wanted[0], wanted[1]) > 1e-3
    barrier, got = threading.Barrier(2), [None, None]
    hook = model.get_submodule(model.coterie.layers[1]).register_forward_pre_hook(meeting(barrier))

    def run(i):
        got[i] = torch.stack(model.generate(**batches[i], **options).logits)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("method", ["smear", "poly"])
def test_a_call_that_breaks_off_leaves_nothing_behind(method):
    model = wrapped("t5", method).eval()
    given = call_of(method, {k: v for k, v in batch_of("t5").items() if k != "decoder_input_ids"})
    wanted = model.generate(**given, max_new_tokens=3, do_sample=False)

    def broken(*_):
        raise RuntimeError("broken")

    for path in (model.coterie.layers[1], model.coterie.layers[-1]):
        hook = model.get_submodule(path).register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            model.generate(**given, max_new_tokens=3)
        hook.remove()
        assert model.coterie._context.call is None
    assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False), wanted)


def gradients(model, given):
    torch.manual_seed(3)
    loss = model(**given).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


CHECKPOINTED = [
    *(("bert", m, "lora", {}) for m, kind in KINDS if kind == "lora"),
    ("llama", "smear", "lora", {"pool": "prompt"}),
    ("llama", "smear", "bottleneck", {"pool": "segment", "segment": 2}),
    ("llama", "st_gumbel", "lora", {"pool": "token", "anneal": 1.0}),
    ("llama", "switch", "bottleneck", {"top_k": 2}),
    ("t5", "smear", "bottleneck", {}),
    ("t5", "switch", "lora", {}),
    ("t5", "reinforce", "lora", {}),
]


def reset_steps(model):
    for name, buffer in model.named_buffers():
        if name.endswith("select.step"):
            buffer.fill_(1)


@pytest.mark.parametrize(("arch", "method", "kind", "options"), quick(CHECKPOINTED, 2))
def test_gradient_checkpointing_changes_no_gradient(arch, method, kind, options):
    model = wrapped(arch, method, kind, **options)
    given = call_of(method, batch_of(arch, labels=True))
    reset_steps(model)
    loss, wanted = gradients(model, given)
    steps = {n: int(b) for n, b in model.named_buffers() if n.endswith("select.step")}
    terms = {name: float(term) for name, term in model.coterie._context.last_losses.items()}
    reset_steps(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, got = gradients(model, given)
    assert torch.allclose(again, loss, rtol=1e-6)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert {n: int(b) for n, b in model.named_buffers() if n.endswith("select.step")} == steps
    assert {name: float(t) for name, t in model.coterie._context.last_losses.items()} == pytest.approx(terms)


@pytest.mark.parametrize("method", ["switch", "reinforce", "dselect_k"])
def test_reentrant_checkpointing_is_refused_where_losses_are_wanted(method):
    model = wrapped("bert", method)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(coterie.CoterieError, match=r"reentrant gradient checkpointing; use \{"):
        model(**batch_of("bert", labels=True))


@pytest.mark.parametrize("method", ["smear", "poly", "adamix", "st_gumbel", "soft_moe"])
def test_reentrant_checkpointing_serves_the_others(method):
    model = wrapped("bert", method)
    given = call_of(method, batch_of("bert", labels=True))
    model.enable_input_require_grads()
    _, wanted = gradients(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    reset_steps(model)
    _, got = gradients(model, given)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "method"),
    [*(("bert", m) for m, kind in KINDS if kind == "lora"), ("t5", "smear"), ("vit", "soft_moe"), ("llama", "switch")],
)
def test_compiles_to_one_graph(arch, method):
    model = wrapped(arch, method).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (3, 2):
        given = batch_of(arch, batch=batch)
        given = {**given, "task_ids": tasks(batch)} if method in BY_TASK else given
        assert relative_error(logits_of(compiled, given), logits_of(model, given)) <= 1e-5


def test_autocast():
    """Mixed precision, as the Trainer has it: parameters in float32."""
    for method, kind in (("smear", "bottleneck"), ("switch", "lora"), ("soft_moe", "lora"), ("reinforce", "lora")):
        model = wrapped("bert", method, kind)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch_of("bert", labels=True)).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["smear", "switch", "dselect_k", "soft_moe", "reinforce", "xlora"])
def test_autocast_does_not_round_what_routers_compute(method):
    """Scores are float32's, whatever the model computes in; so is the mean that they are made of."""
    arch = "llama" if method == "xlora" else "bert"
    model = coterie.wrap(base_model(arch), coterie.MixtureConfig(method=method, experts=3, parameters={"rank": 4}))
    found = []
    for module in model.eval().modules():
        if isinstance(module, (Linear, Soft, DSelect, Classifier)):
            module.register_forward_hook(lambda *call: found.append(call))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch_of(arch))
    assert found
    for score, (read,), scores in found:
        assert scores.dtype == torch.float32
        assert torch.equal(score.forward(read), scores)


@pytest.mark.parametrize(("method", "options"), [("smear", {"pool": "prompt"}), ("xlora", {}), ("xlora_frozen", {})])
def test_generation_with_a_cache_of_fixed_size(method, options):
    """`generate` makes a mask of four dimensions for it, of which padding must be read all the same."""
    model = pair_of("llama", method, options).eval()
    given = batch_of("llama", padding="left")
    keys = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    grown = model.generate(**given, **keys, do_sample=False)
    fixed = model.generate(**given, **keys, do_sample=False, cache_implementation="static", disable_compile=True)
    assert relative_error(torch.stack(fixed.logits), torch.stack(grown.logits)) <= 1e-5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smear", {"pool": "prompt"}),
        ("ensemble", {"pool": "segment", "segment": 3}),
        ("xlora", {}),
        ("xlora_frozen", {}),
    ],
)
def test_decisions_follow_their_cache(method, options):
    """Reordered, repeated and selected, its rows go on with the experts of their own prompts."""
    model = pair_of("llama", method, options).eval()
    ids = batch_of("llama", padding="")["input_ids"]

    def after(change, rows):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            change(cache)
            following = torch.full((3, 1), 4)[torch.arange(rows) % 3]
            return model(input_ids=following, past_key_values=cache).logits

    plain, order = after(lambda cache: None, 3), torch.tensor([2, 0, 1])
    assert relative_error(after(lambda cache: cache.reorder_cache(order), 3), plain[order]) <= 1e-5
    assert relative_error(after(lambda cache: cache.batch_select_indices(torch.tensor([1])), 1), plain[[1]]) <= 1e-5
    repeated = after(lambda cache: cache.batch_repeat_interleave(2), 6)
    assert relative_error(repeated, plain.repeat_interleave(2, 0)) <= 1e-5


def pair_of(arch, method, options):
    """A mixture whose routers, also that of a pass before, are random."""
    config = coterie.MixtureConfig(method=method, experts=3, parameters={"rank": 4, **options})
    model = coterie.wrap(base_model(arch), config)
    randomise(model)
    if hasattr(model, "coterie_router"):
        with torch.no_grad():
            for parameter in model.coterie_router.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(("method", "options"), [("smear", {"pool": "prompt"}), ("xlora", {}), ("xlora_frozen", {})])
def test_drafts_are_no_prompt(method, options):
    """Assisted generation checks drafts together with the prompt, and gives what greedy search gives."""
    model = pair_of("llama", method, options).eval()
    given = batch_of("llama", padding="", batch=1)
    wanted = model.generate(**given, max_new_tokens=6, do_sample=False)
    drafted = model.generate(**given, max_new_tokens=6, do_sample=False, assistant_model=base_model("llama").eval())
    assert torch.equal(drafted, wanted)


def test_a_pass_before_serves_generation_while_the_mode_is_training():
    model, given = pair_of("llama", "xlora", {}), batch_of("llama", padding="left")
    drawn = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(drawn, model.eval().generate(**given, max_new_tokens=4, do_sample=False))
