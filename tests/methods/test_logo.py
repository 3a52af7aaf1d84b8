"""LoGo: what experts would give for the prompt's last token in one layer weighs them everywhere."""

from __future__ import annotations

import copy

import pytest
import routed
import torch

import coterie
from coterie.errors import CoterieError

LAYER = {"llama": "*q_proj", "bert": "*query"}
LENGTHS = torch.tensor([4, 3, 4])


@pytest.fixture(scope="module", params=["llama", "bert"])
def made(request, tmp_path_factory):
    return routed.fill(tmp_path_factory.mktemp(request.param), request.param)


def last_of(made):
    """The layer that is listened to."""
    end = LAYER[made.arch][1:]
    return [path for path, _ in made.model.named_modules() if path.endswith(end)][-1]


def naive(made, given, signal, k):
    """(gates (batch, E), logits), float64: a pass of the base, then one with the experts."""
    found, path = routed.deltas(made), last_of(made)
    base, seen = copy.deepcopy(made.model).double(), []
    base.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append(args[0]))
    base(**given)
    gates = torch.zeros(len(LENGTHS), len(routed.NAMES), dtype=torch.float64)
    for row in range(len(LENGTHS)):
        counted = given["attention_mask"][row].nonzero()[:, 0]
        at = counted[LENGTHS[row] - 1] if made.arch == "llama" else counted[-1]
        signals = {}
        for i, delta in found[path].items():
            out = delta @ seen[0][row, at]
            p = out.exp() / out.exp().sum()
            signals[i] = out.square().sum().sqrt() if signal == "norm" else 1 / (-(p * p.log()).sum() + 1e-6)
        best = sorted(signals, key=lambda i: -float(signals[i]))[:k]
        for i in best:
            gates[row, i] = signals[i] / sum(signals[j] for j in best)

    def add(at, x):
        out = 0
        for i, delta in found[at].items():
            out = out + gates[:, i].view(-1, *[1] * (x.ndim - 1)) * (x @ delta.T)
        return out

    return gates, routed.naive(made, add)(**given).logits


def asked(made, given):
    return {**given, "prompt_lengths": LENGTHS} if made.arch == "llama" else given


@pytest.mark.parametrize(("signal", "k"), [("norm", 2), ("entropy", 2), ("norm", 3)])
def test_formula(made, signal, k, tmp_path):
    mixture = routed.build(made, "logo", tmp_path / "mixture", top_k=k, signal=signal, layer=LAYER[made.arch])
    for side in ("right", "left"):
        given = routed.batch(side=side)
        with torch.no_grad(), coterie.routing_trace(mixture) as trace:
            ours = mixture(**asked(made, given)).logits
            gates, theirs = naive(made, given, signal, k)
        path = last_of(made)
        torch.testing.assert_close(trace[path][:, 0].double(), gates, atol=1e-5, rtol=1e-5)
        routed.close_where_it_counts(ours, theirs, given["attention_mask"])


def test_weights_scale_deltas_and_no_signal(made, tmp_path):
    layer = LAYER[made.arch]
    plain = routed.build(made, "logo", tmp_path / "plain", layer=layer)
    scaled = routed.build(made, "logo", tmp_path / "scaled", {"task": -0.5, "same": 0.0}, layer=layer)
    given, traces = asked(made, routed.batch()), []
    for mixture in (plain, scaled):
        with torch.no_grad(), coterie.routing_trace(mixture) as trace:
            mixture(**given)
        traces.append(trace[last_of(made)][:, 0])
    kept = traces[0].clone()
    kept[:, 2] = 0
    torch.testing.assert_close(traces[1], kept / kept.sum(-1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_save_and_load(made, tmp_path):
    mixture = routed.build(made, "logo", tmp_path / "mixture", layer=LAYER[made.arch])
    mixture.save_pretrained(tmp_path / "again")
    again = coterie.load(tmp_path / "again")
    routed.equal_states(mixture, again)
    given = asked(made, routed.batch())
    assert torch.equal(mixture(**given).logits, again(**given).logits)


def test_batch_mates_and_padding(made, tmp_path):
    mixture = routed.build(made, "logo", tmp_path / "mixture", layer=LAYER[made.arch])
    given = routed.batch()
    together = mixture(**asked(made, given)).logits
    for one, mine in routed.alone(given, together, LENGTHS if made.arch == "llama" else None):
        torch.testing.assert_close(mixture(**one).logits[0], mine, atol=1e-5, rtol=1e-5)


def test_after_the_prompt_nothing_decides(made, tmp_path):
    if made.arch != "llama":
        pytest.skip("writes nothing")
    mixture = routed.build(made, "logo", tmp_path / "mixture", layer="*q_proj")
    routed.decides_by_the_prompt_alone(mixture)


def test_refusals_and_one_expert(made, tmp_path):
    with pytest.raises(CoterieError, match=r"no mixture layer matches '\*nothing'"):
        routed.build(made, "logo", tmp_path / "a", layer="*nothing")
    assert not (tmp_path / "a").exists()
    experts = {"task": f"{made.library.path}#task"}
    coterie.build(method="logo", base=str(made.base), experts=experts, out=tmp_path / "one")
    one, given = coterie.load(tmp_path / "one"), routed.batch()
    with torch.no_grad(), one.coterie.route("task"):
        named = one(**given).logits
    torch.testing.assert_close(one(**asked(made, given)).logits, named, atol=1e-5, rtol=1e-5)
