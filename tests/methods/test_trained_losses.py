"""Auxiliary losses: their formulas, what counts in them, how they accumulate; the gradient through one expert alone."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from trained import batch_of, call_of, tasks, wrapped

import coterie
from coterie.methods.registry import Mixture
from coterie.mixture.losses import example_losses
from coterie.routing.balance import balance, z
from coterie.routing.decision import Decision
from coterie.routing.gumbel import Gumbel
from coterie.routing.router import Routing
from coterie.routing.select import Softmax, TopK


def scores(n=6, experts=4, seed=0):
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_and_z(k, masked):
    s, n = scores(), 4
    valid = torch.tensor([True, True, False, True, False, True]) if masked else None
    decision = TopK(k, renormalise=False)(s)
    rows = [i for i in range(len(s)) if valid is None or valid[i]]
    p = [naive.softmax(s[i]) for i in rows]
    share = [sum(float(e in p_i.sort(descending=True).indices[:k]) for p_i in p) / len(rows) for e in range(n)]
    wanted = n * sum(share[e] * sum(p_i[e] for p_i in p) / len(rows) for e in range(n))
    assert torch.allclose(balance(s, decision, valid), wanted)
    assert torch.allclose(z(s, decision, valid), sum(s[i].exp().sum().log() ** 2 for i in rows) / len(rows))


def test_balance_is_least_where_all_are_used_alike():
    even = torch.eye(4).repeat(2, 1).double() * 3
    one = torch.zeros(8, 4, dtype=torch.float64)
    one[:, 0] = 3
    least, most = (balance(s, TopK(1, renormalise=False)(s), None) for s in (even, one))
    assert torch.allclose(least, torch.ones(()).double()) and most > 2.5


def test_padding_does_not_enter():
    """More padding, another token under it: the same losses."""
    model = wrapped("bert", "switch", balance=0.7, z_loss=0.3)
    given = batch_of("bert", labels=True)
    given["attention_mask"][:, 5:] = 0
    loss = model(**given).loss
    terms = dict(model.coterie._context.last_losses)
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][:, 5:] = 77
    assert torch.allclose(model(**other).loss, loss, rtol=1e-6)
    cut = {k: v[:, :5] if v.ndim > 1 else v for k, v in given.items()}
    assert torch.allclose(model(**cut).loss, loss, rtol=1e-6)
    for name, term in model.coterie._context.last_losses.items():
        assert torch.allclose(term, terms[name], rtol=1e-6)


def test_padded_labels_do_not_enter_in_a_decoder():
    model = wrapped("t5", "switch", balance=0.7, z_loss=0.3)
    given = batch_of("t5", padding="", labels=True)
    loss = model(**given).loss
    padded = {**given, "labels": torch.nn.functional.pad(given["labels"], (0, 3), value=-100)}
    assert torch.allclose(model(**padded).loss, loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("switch", {"balance": 0.7, "z_loss": 0.3}),
        ("dselect_k", {"entropy": 0.5}),
        ("reinforce", {"policy": 0.7, "policy_entropy": 0.2, "value": 0.4}),
        ("adamix", {"consistency": 0.6}),
    ],
)
def test_weights_scale_the_terms_and_zero_removes_them(method, weights):
    given = call_of(method, batch_of("bert", labels=True))

    def loss(**options):
        model = wrapped("bert", method, **options)
        torch.manual_seed(5)
        value = float(model(**given).loss.detach())
        return value, {name: float(t) for name, t in model.coterie._context.last_losses.items()}

    plain, none = loss(**dict.fromkeys(weights, 0.0))
    assert all(term == 0 for term in none.values())
    once, terms = loss(**weights)
    twice, doubled = loss(**{name: 2 * w for name, w in weights.items()})
    assert once == pytest.approx(plain + sum(terms.values()), rel=1e-5)
    assert twice == pytest.approx(plain + 2 * sum(terms.values()), rel=1e-5)
    assert doubled == pytest.approx({name: 2 * term for name, term in terms.items()}, rel=1e-5)
    assert all(abs(term) > 1e-4 for term in terms.values())


def test_terms_are_means_over_layers():
    """Twice the layers, each with the same term, and the loss is what it was."""
    few = wrapped("bert", "switch", random=False, z_loss=1.0, balance=0.0, modules={"include": ["*query"]})
    many = wrapped("bert", "switch", random=False, z_loss=1.0, balance=0.0)
    given = batch_of("bert", labels=True)
    wanted = math.log(3) ** 2  # routers start nearly level
    for model in (few, many):
        model(**given)
        assert float(model.coterie._context.last_losses["z"]) == pytest.approx(wanted, rel=0.15)


def test_nothing_is_added_in_evaluation():
    for method in ("switch", "reinforce", "dselect_k", "adamix"):
        model = wrapped("bert", method).eval()
        given = batch_of("bert", labels=True)
        out = model(**given)
        plain = torch.nn.functional.cross_entropy(out.logits, given["labels"])
        assert torch.allclose(out.loss, plain)
        with torch.no_grad():
            assert torch.isfinite(model.train()(**given).loss)  # without gradients, no losses either


@pytest.mark.parametrize(
    ("arch", "method", "options"),
    [
        ("llama", "switch", {}),
        ("llama", "dselect_k", {"pool": "prompt"}),
        ("t5", "switch", {}),
        ("bert", "switch", {}),
        ("bert", "dselect_k", {}),
    ],
)
def test_micro_batches_accumulate_to_one(arch, method, options):
    """The Trainer divides by a whole step's items: two halves that are alike give one's gradient; weights add up."""
    model = wrapped(arch, method, **options)
    given = batch_of(arch, labels=True)
    labels = given["labels"][:, 1:] if arch == "llama" else given["labels"]
    items = (labels != -100).sum()

    def gradients(*micro):
        for batch, count in micro:
            model(**batch, num_items_in_batch=count).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    once, twice = gradients((given, items)), gradients((given, 2 * items), (given, 2 * items))
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-5, atol=1e-7)
    first, second = ({k: v[part] for k, v in given.items()} for part in (slice(0, 1), slice(1, 3)))
    counts = [(labels[part] != -100).sum() for part in (slice(0, 1), slice(1, 3))]
    whole = sum(model(**b, num_items_in_batch=items).loss for b in (first, second))
    alone = [model(**b).loss for b in (first, second)]
    assert torch.allclose(whole, sum(loss * c / items for loss, c in zip(alone, counts, strict=True)), rtol=1e-5)


def test_dselects_entropy_drives_to_one_expert():
    model = wrapped("bert", "dselect_k", random=False, entropy=1.0, modules={"include": ["*pooler.dense"]})
    given = batch_of("bert", labels=True)
    trained = [p for n, p in model.named_parameters() if ".router." in n]
    optimiser = torch.optim.Adam(trained, lr=0.05)
    seen = []
    for _ in range(40):
        optimiser.zero_grad()
        model(**given).loss.backward()
        optimiser.step()
        seen.append(float(model.coterie._context.last_losses["entropy"]))
    with coterie.routing_trace(model.eval()) as trace, torch.no_grad():
        model(**given)
    assert seen[-1] < seen[0] / 2
    assert trace["bert.pooler.dense"].max(-1).values.min() > 0.9


def test_reinforce_learns_which_expert_is_rewarded():
    """One expert that is right for every example is found by its reward alone."""
    model = wrapped("bert", "reinforce", policy=1.0, value=1.0, experts=2, modules={"include": ["*pooler.dense"]})
    given = batch_of("bert", batch=8, padding="")
    routers = [p for n, p in model.named_parameters() if ".router." in n]
    with torch.no_grad():
        model.bert.pooler.dense.bank.up.mul_(6)
        logits = {}
        for name in model.coterie.expert_names:
            with model.coterie.route(name):
                logits[name] = model.eval()(**given).logits
        first, second = (each.log_softmax(-1).mean(0) for each in logits.values())
        label = int((first - second).argmax())  # what the first expert makes likelier
    given["labels"] = torch.full((8,), label)
    optimiser = torch.optim.Adam(routers, lr=0.02)
    model.train()
    for _ in range(100):
        optimiser.zero_grad()
        model(**given).loss.backward()
        optimiser.step()
    with coterie.routing_trace(model.eval()) as trace, torch.no_grad():
        model(**given)
    assert trace["bert.pooler.dense"][..., 0].mean() > 0.9


# --- the gradient where one expert answers


def test_top_one_has_the_straight_through_gradient():
    """Renormalised, the gate is exactly 1; its gradient is that of the chosen expert's probability."""
    s = scores().requires_grad_()
    decision = TopK(1).train()(s)
    assert torch.equal(decision.weight, torch.ones(6, 1).double())
    weights = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (decision.weight[:, 0] * weights).sum().backward()
    other = s.detach().clone().requires_grad_()
    sum(w * naive.softmax(row)[row.argmax()] for w, row in zip(weights, other, strict=True)).backward()
    torch.testing.assert_close(s.grad, other.grad)
    assert s.grad.abs().sum() > 0
    assert TopK(1).eval()(s).weight is None


def test_more_than_one_has_the_softmax_of_those_kept():
    s = scores().requires_grad_()
    decision = TopK(2)(s)
    for i, row in enumerate(s):
        kept = row.sort(descending=True)
        torch.testing.assert_close(decision.weight[i], naive.softmax(kept.values[:2]))
        assert decision.index[i].tolist() == kept.indices[:2].tolist()


def test_a_router_of_ones_own_with_top_one_learns():
    """Through a whole model: the axes put together by hand."""
    from coterie.experts.fresh import Fresh

    assembly = Mixture(Fresh(4), Routing(score="linear", select="top_k", k=1, losses={"balance": 0.1}))
    from zoo import base_model

    model = coterie.wrap(base_model("bert"), coterie.MixtureConfig(method=assembly, experts=3))
    from trained import randomise

    randomise(model)
    model(**batch_of("bert", labels=True)).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("score.weight")]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    assert float(model.coterie._context.last_losses["balance"]) > 0


def test_straight_through_gumbel():
    """The gate is 1 with the gradient of `softmax((s + G) / T)`, T at its annealed value and not below its floor."""
    for step, temperature in ((0, 10.0), (1, 10.0), (10_001, 10 * math.exp(-1)), (10**6, 0.5)):
        select = Gumbel(temperature=10.0, anneal=1e-4).train()
        select.step.fill_(step)
        s = scores().requires_grad_()
        with naive.Draws() as draws:
            decision = select(s)
        assert torch.allclose(decision.weight, torch.ones(6, 1).double())
        decision.weight.sum().backward()
        other = s.detach().clone().requires_grad_()
        y = [naive.softmax((row - e.log()) / temperature) for row, e in zip(other, draws.log[0], strict=True)]
        assert decision.index[:, 0].tolist() == [int(row.argmax()) for row in y]
        sum(row.max() for row in y).backward()
        torch.testing.assert_close(s.grad, other.grad)


@pytest.mark.parametrize("pool", ["sequence", "token"])
def test_gumbels_steps_are_calls_in_training(pool):
    model = wrapped("bert", "st_gumbel", pool=pool)
    given = batch_of("bert", labels=True)
    steps = [b for n, b in model.named_buffers() if n.endswith("select.step")]
    for _ in range(3):
        model(**given).loss.backward()
    assert {int(b) for b in steps} == {3}
    model.eval()(**given)
    with torch.no_grad():
        model.train()(**given)
    assert {int(b) for b in steps} == {3}


def test_switch_has_the_probabilitys_gradient():
    s = scores().requires_grad_()
    decision = TopK(1, renormalise=False)(s)
    torch.testing.assert_close(decision.weight[:, 0], torch.stack([naive.softmax(row).max() for row in s]))


def test_expert_dropout_leaves_all_in_where_none_is_left():
    """The reference's `+ 1e-10`: where all are dropped, all answer alike, and the merged expert does not vanish."""
    select = Softmax(dropout=0.999999).train()
    gates = select(scores()).weight
    assert torch.allclose(gates, torch.full_like(gates, 0.25))
    assert torch.allclose(Softmax(dropout=0.999).eval()(scores()).weight, scores().softmax(-1))
    kept = Softmax(dropout=0.5).train()(scores(1000)).weight
    assert 0.4 < float((kept < 1e-6).double().mean()) < 0.6
    assert torch.allclose(kept.sum(-1), torch.ones(1000).double())


def test_adamix_draws_each_examples_pair():
    model = wrapped("bert", "adamix", consistency=0.0)
    given = batch_of("bert", batch=50, padding="", labels=True)
    with naive.Draws() as draws:
        model(**given)
    assert len(draws.log) == 2 * len(model.coterie.layers)  # two passes
    pairs = torch.cat([d.T for d in draws.log])
    assert len({tuple(p.tolist()) for p in pairs}) == 9


def test_poly_samples_in_training_and_rests_in_use():
    model = wrapped("bert", "poly")
    given = {**batch_of("bert"), "task_ids": tasks()}
    with torch.no_grad():
        assert not torch.equal(model(**given).logits, model(**given).logits)
        assert torch.equal(model.eval()(**given).logits, model(**given).logits)


def test_a_decision_of_none():
    assert Decision.constant((1.0, 0.0), 3, torch.device("cpu")).gates().tolist() == [[1.0, 0.0]] * 3


def test_padding_does_not_enter_where_a_decoder_reads_the_encoder():
    """Keys and values of cross-attention are of the encoder's tokens, also where there are as many of the decoder's."""
    model = wrapped("t5", "switch", balance=0.7, z_loss=0.3)
    for length in (7, 5):  # the decoder has 5 tokens
        given = batch_of("t5", length=length, labels=True)
        loss = model(**given).loss
        other = {**given, "input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 77)}
        assert torch.allclose(model(**other).loss, loss, rtol=1e-6)


def test_losses_join_a_loss_of_other_labels():
    """Question answering has no `labels`, and a loss."""
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = wrapped(BertForQuestionAnswering(BertConfig(vocab_size=100, **sizes)), "switch", balance=0.7, z_loss=0.0)
    given = {"input_ids": torch.arange(10).view(2, 5)}
    places = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 2])}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = model(**given, **places).loss
    added = sum(model.coterie._context.last_losses.values())
    assert added > 0 and model.coterie.losses() == 0
    assert torch.allclose(loss - added, model.eval()(**given, **places).loss, atol=1e-6)


def test_losses_of_an_earlier_call_are_not_taken_for_this_ones():
    model, given = wrapped("bert", "switch"), batch_of("bert", labels=True)
    model(**{name: value for name, value in given.items() if name != "labels"})
    model(**given)
    assert model.coterie.losses() == 0


def test_consistency_is_of_the_tokens_that_are_learned():
    """In a causal model, the token before a label predicts it; what predicts none must not matter."""
    model, given = wrapped("llama", "adamix", consistency=1.0), batch_of("llama", padding="", labels=True)
    given["labels"][:, 4:] = -100

    def apart(**more):
        torch.manual_seed(0)
        model(**{**given, **more})
        return model.coterie._context.last_losses["consistency"]

    after = given["input_ids"].clone()
    after[:, 3:] = 77  # read by tokens that predict nothing which is learned
    assert torch.allclose(apart(input_ids=after), apart(), rtol=1e-5)


def test_the_reward_of_several_classes():
    logits, labels = torch.randn(2, 3), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    wanted = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean(1)
    assert torch.allclose(example_losses(logits, labels, causal=False, several=True), wanted)
