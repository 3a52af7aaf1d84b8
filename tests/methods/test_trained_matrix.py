"""Every trained method on many architectures: saved and loaded, padded, in company, in other precisions, copied."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trained import BY_TASK, KINDS, batch_of, call_of, quick, wrapped
from transformers.pytorch_utils import Conv1D

import coterie
from matching import relative_error
from zoo import base_model, save

ENCODERS = [("bert", *each) for each in KINDS]
OTHERS = [
    ("vit", "smear", "bottleneck"),
    ("vit", "soft_moe", "lora"),
    ("vit", "hash", "lora"),
    ("roberta", "ensemble", "bottleneck"),
    ("distilbert", "reinforce", "bottleneck"),
    ("clip", "switch", "lora"),
    ("t5", "smear", "bottleneck"),
    ("t5", "switch", "lora"),
    ("t5", "st_gumbel", "lora"),
    ("t5", "hash", "lora"),
    ("t5", "poly", "bottleneck"),
    ("gpt2", "tag", "bottleneck"),
    ("gpt2", "adamix", "lora"),
    ("gpt2", "mhr", "lora"),
    ("llama", "switch", "bottleneck"),
    ("llama", "poly", "lora"),
    ("qwen2", "adamix", "bottleneck"),
    ("mamba", "switch", "lora"),
]
MATRIX = [*ENCODERS, *OTHERS]
CAN_LEFT = ("t5", "gpt2", "llama", "qwen2")  # the others' bases take no padding there


def answer(model, given):
    with torch.no_grad():
        out = model(**given)
    if getattr(out, "logits_per_image", None) is not None:
        return torch.cat([out.image_embeds, out.text_embeds], 1)
    return out.logits


def step(model, given, seed=0):
    """One step of training."""
    torch.manual_seed(seed)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**given).loss
    loss.backward()
    with torch.no_grad():
        for p in trained:
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
            p.grad = None
    model.eval()


@pytest.mark.parametrize(("arch", "method", "kind"), quick([m for m in MATRIX if m[0] != "clip"], 4))
def test_trained_state_survives_saving_and_loading(arch, method, kind, tmp_path):
    model = wrapped(arch, method, kind)
    for seed in range(2):
        step(model, call_of(method, batch_of(arch, labels=True)), seed)
    model.save_pretrained(tmp_path)
    again = coterie.load(tmp_path).eval()
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, loaded[name]) and tensor.dtype == loaded[name].dtype, name
    if method == "st_gumbel":
        assert {int(b) for n, b in again.named_buffers() if n.endswith("select.step")} == {2}
    given = call_of(method, batch_of(arch))
    # the very same numbers at other addresses: a product's last bit follows how its operands lie in memory
    assert relative_error(answer(again, given), answer(model, given)) <= 1e-6
    assert again.coterie.spec.to_dict() == model.coterie.spec.to_dict()


@pytest.mark.parametrize(
    ("padding", "arch", "method", "kind"),
    quick([*(("right", *m) for m in MATRIX), *(("left", *m) for m in OTHERS if m[0] in CAN_LEFT)], 3),
)
def test_padding_and_batch_mates_change_nothing(padding, arch, method, kind):
    model = wrapped(arch, method, kind).eval()
    given = call_of(method, batch_of(arch, padding="" if arch in ("clip", "mamba") else padding))
    mask = given.get("attention_mask")
    if mask is not None and padding == "left" and arch != "t5":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    together = answer(model, given)
    for b in range(len(together)):
        alone = {k: v[b : b + 1] for k, v in given.items()}
        counted = slice(None) if mask is None else mask[b].bool()
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in alone:
                alone[name] = alone[name][:, counted]
        wanted = answer(model, alone)
        got = together[b : b + 1]
        if arch in ("gpt2", "llama", "qwen2", "mamba"):
            got = got[:, counted]
        assert relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize(("arch", "method", "kind"), quick(MATRIX, 4, 1))
def test_half_precision(arch, method, kind):
    """Finite, of the right dtype, and what selects nothing is close to single precision."""
    model = wrapped(arch, method, kind)
    given = call_of(method, batch_of(arch, labels=arch != "clip"))
    wanted = answer(model.eval(), given)
    model = model.to(torch.bfloat16).train()
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    out = model(**half)
    if arch != "clip":
        assert torch.isfinite(out.loss)
        out.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    got = answer(model.eval(), half)
    assert torch.isfinite(got).all()
    if method not in ("switch", "st_gumbel", "reinforce") and (arch, method) != ("vit", "hash"):  # pixels, rounded
        assert relative_error(got.float(), wanted) < 0.1


@pytest.mark.parametrize(("arch", "method", "kind"), [("bert", "smear", "lora"), ("gpt2", "switch", "bottleneck")])
def test_the_rest_of_the_model_stays_as_it_is(arch, method, kind):
    base = base_model(arch)
    before = {name: p.clone() for name, p in base.named_parameters()}
    include = ["*layer.0.*"] if arch == "bert" else ["*h.0.*"]
    model = wrapped(base, method, kind, modules={"include": include}, also_train=[])
    layers = model.coterie.layers
    assert layers and all(".0." in name for name in layers)
    step(model, call_of(method, batch_of(arch, labels=True)))
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            assert name not in layers
    shared = dict(model.named_parameters())
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name])
        path, _, leaf = name.rpartition(".")
        own = shared[f"{path}.base_weight" if path in layers and leaf == "weight" else name]
        assert own.data_ptr() == p.data_ptr() and not own.requires_grad
    assert {n for n, p in shared.items() if p.requires_grad} == {n for n in shared if ".bank." in n or ".router." in n}


def test_the_head_is_trained_and_the_users_stays():
    base = base_model("bert")
    before = base.classifier.weight.clone()
    model = wrapped(base, "smear")
    assert model.classifier.weight.requires_grad and not model.bert.embeddings.word_embeddings.weight.requires_grad
    step(model, batch_of("bert", labels=True))
    assert torch.equal(base.classifier.weight, before) and not torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize(
    ("arch", "method", "kind"),
    [("bert", "smear", "lora"), ("t5", "poly", "lora"), ("vit", "hash", "lora"), ("llama", "switch", "lora")],
)
def test_copies_are_independent(arch, method, kind):
    model = wrapped(arch, method, kind).eval()
    given = call_of(method, batch_of(arch))
    wanted = answer(model, given)
    other = copy.deepcopy(model)
    assert torch.equal(answer(other, given), wanted)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if ".bank." in name:
                p.mul_(2)
    assert torch.equal(answer(model, given), wanted)
    changed = answer(other, given)
    assert not torch.equal(changed, wanted)
    del model
    assert torch.equal(answer(other, given), changed)
    with coterie.routing_trace(other) as trace:
        answer(other, given)
    assert list(trace) == other.coterie.layers


def test_a_mixture_can_be_wrapped_again(tmp_path):
    """The second wrapping's forward and hooks stand alone: `generate` brings the encoder its tasks."""
    model = wrapped("t5", "poly").eval()
    model.save_pretrained(tmp_path)
    again = coterie.wrap(coterie.load(tmp_path), train="routers").eval()
    given = call_of("poly", {k: v for k, v in batch_of("t5").items() if k != "decoder_input_ids"})
    wanted = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert torch.equal(again.generate(**given, max_new_tokens=3, do_sample=False), wanted)
    encoder = again.get_encoder()
    assert len(encoder._forward_hooks) == len(model.get_encoder()._forward_hooks)
    assert len(again._forward_hooks) == len(model._forward_hooks)
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained and all(".router." in n for n in trained)


NAMES = ["a/b.c", "зима 雪", "0"]


@pytest.mark.parametrize("method", ["smear", "tag", "switch"])
def test_any_names(method, tmp_path):
    model = wrapped("bert", method, experts=NAMES).eval()
    model.save_pretrained(tmp_path)
    again = coterie.load(tmp_path).eval()
    assert again.coterie.expert_names == NAMES
    given = call_of(method, batch_of("bert"))
    with again.coterie.route(NAMES[1]), coterie.routing_trace(again) as trace:
        answer(again, given)
    for gates in trace.values():
        assert (gates[..., 1] == 1).all() and (gates[..., [0, 2]] == 0).all()


@pytest.mark.parametrize("method", quick([m for m, kind in KINDS if kind == "lora"], 3))
def test_it_starts_as_its_base(method):
    """A low-rank expert starts at zero, so nothing changes before the first step."""
    base = base_model("bert")
    model = wrapped(base, method, random=False).eval()
    given = batch_of("bert")
    with torch.no_grad():
        wanted = base(**given).logits
    assert torch.equal(answer(model, call_of(method, given)), wanted)


def test_seeds_decide_what_it_starts_from():
    """One seed, the same parameters; another, others; and no use of torch's own generator."""
    state = torch.random.get_rng_state()
    first, second, third = (wrapped("bert", "reinforce", random=False, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_hash_is_spread_over_the_experts_and_stays():
    model = wrapped("bert", "hash", experts=4).eval()
    given = batch_of("bert", batch=40, padding="")
    with coterie.routing_trace(model) as trace:
        answer(model, given)
    counts = torch.stack([gates[:, 0].sum(0) for gates in trace.values()])  # (layers, experts)
    assert (counts.sum(0) > 0.15 * counts.sum()).all()
    layers = torch.stack([gates[:, 0].argmax(-1) for gates in trace.values()])
    assert len({tuple(row.tolist()) for row in layers}) == len(layers)  # each layer its own
    from coterie.routing.call import Call
    from coterie.routing.known import Hash

    call = Call(2, torch.device("cpu"), key=torch.tensor([1, -(2**62)]))
    assert Hash(0, 4)(call, 5000).sum() == 2  # deep models


def test_embeddings_in_place_of_ids(tmp_path):
    model = wrapped("bert", "smear").eval()
    given = batch_of("bert")
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(given["input_ids"]),
        "attention_mask": given["attention_mask"],
    }
    assert relative_error(answer(model, embedded), answer(model, given)) <= 1e-6
    with torch.no_grad():
        assert torch.equal(model(given["input_ids"], given["attention_mask"]).logits, answer(model, given))


def test_checkpoints_hold_what_is_trained(tmp_path):
    base_dir = save(base_model("bert"), tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    model = wrapped(AutoModelForSequenceClassification.from_pretrained(base_dir), "st_gumbel")
    step(model, batch_of("bert", labels=True))
    model.save_pretrained(tmp_path / "checkpoint-1")
    from safetensors import safe_open

    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(".bank." in n or ".router." in n or n.startswith("classifier") for n in names)
    again = coterie.load(tmp_path / "checkpoint-1").eval()
    given = batch_of("bert")
    assert relative_error(answer(again, given), answer(model, given)) <= 1e-6
    assert {int(b) for n, b in again.named_buffers() if n.endswith("select.step")} == {1}


def test_running_statistics_are_the_mixtures_own(tmp_path):
    """Training changes a batch norm's: not the user's, and a checkpoint holds them."""
    from transformers import LevitConfig, LevitForImageClassification

    sizes = {"hidden_sizes": [16] * 3, "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [8] * 3}
    config = LevitConfig(image_size=64, mlp_ratio=[2] * 3, attention_ratio=[2] * 3, num_labels=3, **sizes)
    config.down_ops = [["Subsample", 8, 2, 2, 2, 2]] * 2
    base = LevitForImageClassification.from_pretrained(save(LevitForImageClassification(config), tmp_path / "base"))
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    model = wrapped(base, "smear", modules={"include": ["*linear_up*"]})
    given = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    model(**given)
    assert all(torch.equal(buffer, before[name]) for name, buffer in base.named_buffers())
    model.save_pretrained(tmp_path / "checkpoint-1")
    again = coterie.load(tmp_path / "checkpoint-1").eval()
    model.eval()
    assert relative_error(answer(again, given), answer(model, given)) <= 1e-6


assert set(BY_TASK) <= {m for m, _ in KINDS}
