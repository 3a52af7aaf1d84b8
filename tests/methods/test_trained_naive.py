"""Whole models against the naive forms: outputs, losses, and the gradients of experts and routers, in float64."""

from __future__ import annotations

import naive
import pytest
import torch
from trained import CAUSAL, EXPERTS, KINDS, batch_of, call_of, quick, wrapped

import coterie
from zoo import base_model

LOSSES = {
    "switch": {"balance": "balance", "z": "z_loss"},
    "dselect_k": {"entropy": "entropy"},
    "reinforce": {"policy": "policy", "policy_entropy": "policy_entropy", "value": "value"},
    "adamix": {"consistency": "consistency"},
}
# LoRA experts in some layers: the naive forms are slow.
LAYERS = {
    "bert": ["*self.query", "*.output.dense", "*pooler.dense"],
    "t5": ["*SelfAttention.q", "*EncDecAttention.v", "*wo"],
    "llama": ["*q_proj", "*down_proj"],
}
# Weights at which a wrong term would show.
LOUD = {
    "switch": {"balance": 0.7, "z_loss": 0.3},
    "dselect_k": {"entropy": 0.7},
    "reinforce": {"policy": 0.7, "policy_entropy": 0.3, "value": 0.5},
    "adamix": {"consistency": 0.7},
}


def compared(arch, method, kind, training, padding="right", experts=EXPERTS, dtype=torch.float64, **options):
    """(the mixture's output, loss and gradients, the naive ones)."""
    base = base_model(arch).double()
    modules = {"modules": {"include": LAYERS[arch]}} if kind == "lora" and arch in LAYERS else {}
    mixture = wrapped(base, method, kind, experts=experts, **modules, **{**LOUD.get(method, {}), **options}).to(dtype)
    mixture.train(training)
    parameters = dict(mixture.coterie.spec.parameters)
    labelled = call_of(method, batch_of(arch, padding=padding, labels=True))
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in labelled.items()}
    if method == "st_gumbel":
        parameters["step"] = 15_000
        for name, buffer in mixture.named_buffers():
            if name.endswith("select.step"):
                buffer.fill_(15_000)
    facts = facts_of(given, parameters, training)
    with naive.Draws() as draws, coterie.routing_trace(mixture) as trace:
        out = mixture(**given)
    facts.draws = list(draws.log)
    facts.choices = {name: gates.argmax(-1)[:, 0] for name, gates in trace.items()}
    theirs = {
        name: p.detach().double().clone().requires_grad_()
        for name, p in mixture.named_parameters()
        if ".bank." in name or ".router." in name
    }
    shape = next(iter(mixture.coterie.spec.layers.values()))
    plain = naive.install(
        base,
        method,
        theirs,
        mixture.coterie.layers,
        facts,
        len(mixture.coterie.expert_names),
        after=kind == "bottleneck",
        scale=shape.scale,
    )
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items() if k != "task_ids"}
    wanted = plain(**given)
    total = wanted.loss
    if training:
        total = total + auxiliary(method, facts, wanted, given, plain, arch, parameters)
        assert not facts.draws
    return mixture, out, theirs, wanted, total


def facts_of(given, parameters, training):
    facts = naive.Facts(parameters, training)
    mask, labels = given.get("attention_mask"), given["labels"]
    facts.valid = None if mask is None else mask.bool()
    facts.tasks = given.get("task_ids")
    if mask is not None and labels.ndim == 2 and labels.shape == mask.shape:
        facts.prompt = facts.valid & ((labels != -100).cumsum(1) == 0)
    elif labels.ndim == 2:
        facts.decoder_valid = labels != -100
    return facts


def auxiliary(method, facts, output, given, plain, arch, parameters):
    """The auxiliary losses' weighted sum, each averaged over the layers."""
    if method == "reinforce":
        losses = naive.example_losses(output.logits, given["labels"], shifts=arch in ("llama", "gpt2"))
        terms = naive.rewarded(facts.losses["noted"], losses)
    elif method == "adamix":
        again = plain(**given)
        labels, logits = given["labels"], (output.logits, again.logits)
        if arch in ("llama", "gpt2"):
            labels, logits = labels[:, 1:], [each[:, :-1] for each in logits]
        rows = labels != -100 if labels.ndim == 2 else slice(None)
        terms = {"consistency": naive.disagreement(*(each[rows] for each in logits))}
    else:
        terms = {name: sum(each) / len(each) for name, each in facts.losses.items()}
    return sum(parameters[key] * terms[name] for name, key in LOSSES.get(method, {}).items())


def check(mixture, out, theirs, wanted, total, tolerance=1e-6):
    torch.testing.assert_close(out.logits.double(), wanted.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.loss.double(), total.double(), rtol=tolerance, atol=tolerance)
    out.loss.backward()
    total.backward()
    own = dict(mixture.named_parameters())
    for name, p in theirs.items():
        if p.grad is None or not p.grad.any():
            assert own[name].grad is None or own[name].grad.abs().max() <= tolerance, name
        else:
            assert own[name].grad is not None, name
            torch.testing.assert_close(
                own[name].grad.double(), p.grad, rtol=100 * tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("method", "kind"), KINDS)
def test_an_encoder(method, kind):
    check(*compared("bert", method, kind, True))


@pytest.mark.parametrize(("method", "kind"), quick(KINDS, 3))
def test_an_encoder_in_use(method, kind):
    check(*compared("bert", method, kind, False))


@pytest.mark.parametrize(
    ("method", "kind", "training"), quick([(*k, t) for t in (True, False) for k in KINDS if k[0] != "soft_moe"], 4)
)
def test_an_encoder_decoder(method, kind, training):
    """The decoder's routers read the encoder's mean where they decide by example."""
    check(*compared("t5", method, kind, training))


@pytest.mark.parametrize(
    ("method", "options", "training", "padding"),
    quick([(*c, *t) for t in ((True, "right"), (False, "left")) for c in CAUSAL], 2),
)
def test_a_causal_model(method, options, padding, training):
    """By the prompt, by segments, by token, by task."""
    more = {"expert_dropout": 0.0} if options.get("pool") == "segment" else {}
    check(*compared("llama", method, "lora", training, padding, **options, **more))


@pytest.mark.parametrize("method", ["smear", "switch", "reinforce"])
def test_conv1d_layers(method):
    options = {} if method == "switch" else {"pool": "prompt"}
    check(*compared("gpt2", method, "bottleneck", True, **options))


@pytest.mark.parametrize("method", ["smear", "soft_moe", "hash", "poly"])
def test_images(method):
    check(*compared("vit", method, "bottleneck", True))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("soft_moe", {"slots": 2}),
        ("dselect_k", {"top_k": 2, "gamma": 3.0}),
        ("switch", {"top_k": 3}),
        ("tag", {"share": [2, 0, 0]}),
        ("poly", {"relaxed": False, "tasks": 5}),
        ("mhr", {"splits": 2}),
        ("smear", {"alpha": 12.0}),
        ("smear", {"expert_dropout": 0.6}),
        ("ensemble", {"expert_dropout": 0.6}),
        ("ensemble", {"pool": "segment", "segment": 2}),
        ("smear", {"pool": "segment", "segment": 2, "expert_dropout": 0.0}),
        ("single", {"stabilised": True, "alpha": 6.0}),
    ],
)
def test_parameters(method, options):
    check(*compared("bert", method, "lora", True, **options))


@pytest.mark.parametrize("method", quick([m for m, kind in KINDS if kind == "lora" and m != "single"], 5))
def test_four_experts(method):
    """A power of two, where every code of DSelect-k has an expert."""
    check(*compared("bert", method, "lora", True, experts=4))


@pytest.mark.parametrize(("method", "kind"), quick(KINDS, 4, 2))
def test_one_expert(method, kind):
    _, out, _, wanted, _ = compared(
        "bert", method, kind, False, experts=1, **({"share": [0, 0, 0]} if method == "tag" else {})
    )
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "kind"), quick(KINDS, 4, 1))
def test_single_precision(method, kind):
    """The paths that only float32 takes, and that nothing is lost in them."""
    check(*compared("bert", method, kind, True, dtype=torch.float32), tolerance=2e-4)


@pytest.mark.parametrize("arch", ["bert", "t5"])
def test_smear_as_its_authors_write_it(arch):
    """In their layout and with their unmasked mean, on inputs without padding (adapter_controller_fast)."""
    base = base_model(arch).double()
    mixture = wrapped(base, "smear", "bottleneck").double().eval()
    given, seen = batch_of(arch, padding=""), {}
    for name in mixture.coterie.layers:
        layer = mixture.get_submodule(name)
        layer.register_forward_hook(lambda m, a, out, name=name: seen.update({name: (a[0], out)}))
    states = []
    if arch == "t5":
        mixture.get_encoder().register_forward_hook(lambda m, a, out: states.append(out[0]))
    with torch.no_grad():
        mixture(**given)
    for name, (x, out) in seen.items():
        layer = mixture.get_submodule(name)
        inputs = torch.nn.functional.linear(x, layer.weight, layer.bias)
        down = layer.bank.down.view(EXPERTS, 4, -1).transpose(1, 2)  # theirs: (N, C, down_size)
        bias, up = layer.bank.down_bias.view(EXPERTS, 4), layer.bank.up.view(EXPERTS, 4, -1)
        router = layer.router.score
        read = torch.mean(states[0] if name.startswith("decoder.") else inputs, dim=1)
        normal = torch.nn.LayerNorm(read.shape[-1]).double()
        normal.weight, normal.bias = router.input_gain, router.input_bias
        weights = torch.nn.LayerNorm(read.shape[-1]).double()
        weights.weight, weights.bias = router.weight_gain, router.weight_bias
        probabilities = torch.softmax(normal(read) @ weights(router.weight).T, dim=-1)
        merged_down = (probabilities @ down.reshape(EXPERTS, -1)).view(len(x), *down.shape[1:])
        merged_up = (probabilities @ up.reshape(EXPERTS, -1)).view(len(x), *up.shape[1:])
        z = torch.nn.functional.silu(inputs @ merged_down + (probabilities @ bias)[:, None])
        torch.testing.assert_close(out, z @ merged_up + inputs, rtol=1e-9, atol=1e-9)
