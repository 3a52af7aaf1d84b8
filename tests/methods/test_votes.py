"""Pool "model": every layer votes in a pass without experts, and all follow the majority."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import routed
import torch
from transformers import AlbertConfig, AlbertModel

import coterie
from coterie.errors import CoterieError
from zoo import base_model, fine_tune, make_adapter, save

LENGTHS = torch.tensor([4, 3, 4])
GATE = 2


@pytest.fixture(scope="module", params=["llama", "bert"])
def made(request, tmp_path_factory):
    """With mean activations: what a layer reads of one row each, for one expert, for the next."""
    made, seen = routed.fill(tmp_path_factory.mktemp(request.param), request.param), {}
    with torch.no_grad(), reads(copy.deepcopy(made.model), routed.deltas(made), seen) as base:
        base(**routed.batch())
    for row, name in enumerate(routed.NAMES):
        means = {path: seen[path][row].mean(0) for path in made.library[name].layers}
        made.library.put(name, "activation", means)
    return made


@contextmanager
def reads(model, paths, seen):
    """The model, which notes what these layers of it read."""
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda _, args, out, path=path: seen.update({path: args[0]}))
    yield model


def asked(made, given):
    return {**given, "prompt_lengths": LENGTHS} if made.arch == "llama" else given


def score(made, method, path, i, delta, x):
    """Of tokens x (n, width), float64."""
    if method == "smile":
        return (x @ torch.linalg.svd(delta)[2][:GATE].T).square().sum(-1).sqrt()
    vector = made.library.statistics(routed.NAMES[i], "activation")[path].double()
    vector, x = ((v - v.mean(-1, keepdim=True)) / v.var(-1, keepdim=True, correction=0).sqrt() for v in (vector, x))
    return x @ vector / x.shape[-1] ** 0.5


def naive(made, given, method, k):
    """(gates (batch, E), logits), float64: a pass of the base, then one with the experts."""
    found, seen = routed.deltas(made), {}
    voters = [path for path, experts in found.items() if len(experts) == 3]
    with reads(copy.deepcopy(made.model).double(), voters, seen) as base:
        base(**given)
    votes = torch.zeros(len(LENGTHS), 3, dtype=torch.float64)
    for row in range(len(LENGTHS)):
        counted = given["attention_mask"][row].nonzero()[:, 0]
        counted = counted[: LENGTHS[row]] if made.arch == "llama" else counted
        for path in voters:
            means = [score(made, method, path, i, found[path][i], seen[path][row, counted]).mean() for i in range(3)]
            votes[row, int(torch.stack(means).argmax())] += 1
    gates = torch.zeros_like(votes)
    for row in range(len(votes)):
        best = sorted(range(3), key=lambda i: -float(votes[row, i]))[:k]
        gates[row, best] = votes[row, best] / votes[row, best].sum()

    def add(at, x):
        out = 0
        for i, delta in found[at].items():
            out = out + gates[:, i].view(-1, *[1] * (x.ndim - 1)) * (x @ delta.T)
        return out

    return gates, routed.naive(made, add)(**given).logits


OPTIONS = {"smile": {"gate_rank": GATE, "rank": "full"}, "average_activation": {}}


@pytest.mark.parametrize(("method", "k"), [("smile", 1), ("smile", 3), ("average_activation", 1)])
def test_formula(made, method, k, tmp_path):
    mixture = routed.build(made, method, tmp_path / "mixture", top_k=k, pool="model", **OPTIONS[method])
    answered = set()
    for side in ("right", "left"):
        given = routed.batch(side=side)
        with torch.no_grad(), coterie.routing_trace(mixture) as trace:
            ours = mixture(**asked(made, given)).logits
            gates, theirs = naive(made, given, method, k)
        answered |= set(gates.argmax(-1).tolist())
        for path, experts in routed.deltas(made).items():
            wanted = gates[:, list(experts)]
            torch.testing.assert_close(trace[path][:, 0, list(experts)].double(), wanted, atol=1e-6, rtol=1e-6)
        routed.close_where_it_counts(ours, theirs, given["attention_mask"])
    assert len(answered) > 1


def test_a_layer_that_lacks_the_winner_stays_as_in_the_base(made, tmp_path):
    """And one whose only expert is another does not give that one."""
    mixture = routed.build(made, "smile", tmp_path / "mixture", pool="model", rank="full", gate_rank=GATE)
    given = asked(made, routed.batch())
    with torch.no_grad(), coterie.routing_trace(mixture) as trace:
        mixture(**given)
    alone = {path: list(experts) for path, experts in routed.deltas(made).items() if len(experts) == 1}
    assert alone or made.arch == "bert"
    voter = next(path for path, experts in routed.deltas(made).items() if len(experts) == 3)
    for path, (only,) in alone.items():
        assert torch.equal(trace[path][:, 0, only], trace[voter][:, 0, only])


def test_batch_mates_padding_and_dense_speed(made, tmp_path):
    mixture = routed.build(made, "smile", tmp_path / "mixture", pool="model", rank="full", gate_rank=GATE)
    given = routed.batch()
    with torch.no_grad():
        together = mixture(**asked(made, given)).logits
        for one, mine in routed.alone(given, together, LENGTHS if made.arch == "llama" else None):
            for path in ("auto", "merged"):
                with mixture.coterie.use_path(path):
                    torch.testing.assert_close(mixture(**one).logits[0], mine, atol=1e-5, rtol=1e-5)


def test_save_and_load(made, tmp_path):
    mixture = routed.build(made, "average_activation", tmp_path / "mixture", pool="model")
    mixture.save_pretrained(tmp_path / "again")
    again = coterie.load(tmp_path / "again")
    routed.equal_states(mixture, again)
    given = asked(made, routed.batch())
    assert torch.equal(mixture(**given).logits, again(**given).logits)


def test_after_the_prompt_nothing_decides(made, tmp_path):
    if made.arch != "llama":
        pytest.skip("writes nothing")
    mixture = routed.build(made, "smile", tmp_path / "mixture", pool="model", rank="full", gate_rank=GATE)
    routed.decides_by_the_prompt_alone(mixture)
    given = routed.batch()["input_ids"][:1]
    how = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4, "do_sample": False}
    written = mixture.generate(input_ids=given, **how)
    with mixture.coterie.use_path("merged"):
        dense = mixture.generate(input_ids=given, **how)
    for a, b in zip(written.logits, dense.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_one_expert_and_named_ones(made, tmp_path):
    experts = {"task": f"{made.library.path}#task"}
    coterie.build(
        method="smile", base=str(made.base), experts=experts, parameters={"pool": "model"}, out=tmp_path / "o"
    )
    one, given = coterie.load(tmp_path / "o"), routed.batch()
    with torch.no_grad(), one.coterie.route("task"):
        named = one(**given).logits
    torch.testing.assert_close(one(**asked(made, given)).logits, named, atol=1e-5, rtol=1e-5)


def test_an_expert_that_no_layer_could_vote_for_is_refused(made, tmp_path):
    layers = {"llama": ("*q_proj", "*up_proj"), "bert": ("*query", "*value")}[made.arch]
    adapters = {"a": layers[:1], "b": layers[:1], "c": layers[1:]}
    for seed, (name, targets) in enumerate(adapters.items()):
        make_adapter(made.root / "base", tmp_path / name, seed, 2, [t[1:] for t in targets], arch=made.arch)
    experts = {name: str(tmp_path / name) for name in adapters}
    recipe = {"method": "smile", "base": str(made.base), "experts": experts, "out": tmp_path / "mixture"}
    with pytest.raises(CoterieError, match="expert 'c': is in none of the layers that vote, those with 2 experts"):
        coterie.build(parameters={"pool": "model"}, **recipe)
    assert not (tmp_path / "mixture").exists()


def test_a_layer_that_stands_in_several_blocks_votes_in_each(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = AlbertConfig(vocab_size=64, embedding_size=16, **sizes)
    model = AlbertModel(config).eval()
    save(model, tmp_path / "base")
    experts = {}
    for seed, name in enumerate("ab"):
        tuned = copy.deepcopy(model)
        for parameter in tuned.encoder.parameters():
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) / 9
        experts[name] = str(save(tuned, tmp_path / name))
    coterie.build(
        method="smile", base=str(tmp_path / "base"), experts=experts, parameters={"pool": "model", "gate_rank": GATE},
        out=tmp_path / "mixture",
    )  # fmt: skip
    mixture, seen = coterie.load(tmp_path / "mixture"), []
    forward = mixture.coterie._forward
    by_votes = forward._by_votes
    forward._by_votes = lambda before: seen.append(before.votes) or by_votes(before)
    with torch.no_grad():
        mixture(**routed.batch())
    counts = {int(votes.sum()) for votes in seen[0].values() if votes is not None}
    assert 9 in counts and max(counts) == 9  # three examples, three blocks


def test_an_encoder_decoder_is_refused(tmp_path):
    model = base_model("t5")
    save(model, tmp_path / "base")
    experts = {"a": str(save(fine_tune(model, 1), tmp_path / "a"))}
    with pytest.raises(CoterieError, match='use pool "token"'):
        coterie.build(
            method="smile",
            base=str(tmp_path / "base"),
            experts=experts,
            parameters={"pool": "model"},
            out=tmp_path / "o",
        )
    assert not (tmp_path / "o").exists()
