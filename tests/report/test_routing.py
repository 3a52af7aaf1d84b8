"""What is measured of the routing equals the formulas, written naively in float64."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

import coterie
from coterie.errors import CoterieError
from coterie.report import routing
from zoo import base_model, fine_tune, inputs, make_adapter, save

PLACES = 1e-9


def naive_softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


def test_margin_and_entropy():
    scores = torch.randn(5, 4)
    scores[0, 2] = -torch.inf  # no candidate
    for row, margin, entropy in zip(scores, routing.margin(scores), routing.entropy(scores), strict=True):
        p = sorted(naive_softmax([s for s in row.tolist() if s > -math.inf]))
        assert float(margin) == pytest.approx(p[-1] - p[-2], abs=PLACES)
        assert float(entropy) == pytest.approx(-sum(q * math.log(q) for q in p) / math.log(len(p)), abs=PLACES)
    assert float(routing.entropy(torch.zeros(3))) == pytest.approx(1)
    assert float(routing.margin(torch.tensor([50.0, 0, 0]))) == pytest.approx(1)


def test_agreement_and_kappa():
    choices = torch.randint(0, 3, (4, 50))
    choices[1] = choices[0]
    same = routing.agreement(choices, 3)
    picks = torch.nn.functional.one_hot(choices, 3).double().mean(1)
    kappa = routing.cohen_kappa(same / 50, picks)
    for i in range(4):
        for j in range(4):
            a = sum(int(x == y) for x, y in zip(choices[i].tolist(), choices[j].tolist(), strict=True)) / 50
            c = sum(float((choices[i] == e).double().mean() * (choices[j] == e).double().mean()) for e in range(3))
            assert float(same[i, j]) / 50 == pytest.approx(a, abs=PLACES)
            assert float(kappa[i, j]) == pytest.approx((a - c) / (1 - c), abs=PLACES)
    assert float(kappa[0, 1]) == pytest.approx(1)
    assert routing.cohen_kappa(torch.full((2, 2), torch.nan), torch.full((2, 2), torch.nan)).isnan().all()


def test_committees():
    mass = torch.rand(5, 6, dtype=torch.float64)
    mass /= mass.sum(-1, keepdim=True)
    for size, (group, carried) in enumerate(routing.committees(mass), start=1):
        best = max(min(sum(row[i] for i in g) for row in mass.tolist()) for g in combinations(range(6), size))
        assert len(group) == size
        assert carried == pytest.approx(best, abs=1e-5)
        assert carried == pytest.approx(min(sum(row[i] for i in group) for row in mass.tolist()), abs=PLACES)


def test_standing_committee_tells_the_three_worlds_apart():
    alike = torch.full((4, 4), 0.25)
    assert len(routing.standing_committee(alike)) == 2
    assert len(routing.standing_committee(torch.eye(4))) == 4  # every task to an expert of its own
    one = torch.tensor([[0.6, 0.4, 0, 0], [0.6, 0, 0.4, 0], [0.7, 0, 0, 0.3]])
    assert routing.standing_committee(one) == [0]


def test_many_experts_grow_greedily():
    mass = torch.zeros(2, 20)
    mass[:, 7], mass[0, 3], mass[1, 4] = 0.6, 0.4, 0.4
    groups = routing.committees(mass)
    assert groups[0] == ([7], pytest.approx(0.6))
    assert [len(group) for group, _ in groups] == list(range(1, 21))
    assert groups[2][1] == pytest.approx(1)


def test_dead_and_dominant():
    assert routing.dead(torch.tensor([0.001, 0.4, 0.3, 0.299])) == [0]
    assert routing.dominant(torch.tensor([0.8, 0.1, 0.05, 0.05])) == [0]
    assert routing.dominant(torch.tensor([0.89, 0.11])) == []
    assert routing.dominant(torch.tensor([0.95, 0.05])) == [0]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    base = base_model("bert")
    save(base, folder / "base")
    for seed in (1, 2, 3):
        save(fine_tune(base, seed), folder / f"e{seed}")
    out = folder / "mixture"
    names = {f"e{seed}": str(folder / f"e{seed}") for seed in (1, 2, 3)}
    coterie.build(method="smile", base=str(folder / "base"), experts=names, parameters={"rank": 4}, out=out)
    return coterie.load(str(out))


def test_record_equals_naive_sums(mixture):
    batches = [inputs("bert", batch=3, seed=seed) for seed in (0, 1)]
    for batch in batches:
        batch["attention_mask"][1, 4:] = 0
        batch["attention_mask"][2, 2:] = 0
    found = routing.record(mixture, [("first", "e2", batches[:1]), ("all", None, batches)], examples=2)
    first, both = found.tasks
    assert (first.rows, both.rows, first.tokens, both.tokens) == (3, 6, 13, 26)
    assert first.hits.isfinite().any()
    assert not both.hits.isfinite().any()

    # Once more, token by token, from the gates of an ordinary call and from scores by the formula.
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        mixture.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: seen.__setitem__(path, x[0]))
        for path in found.layers
    ]
    picks: dict[str, list[int]] = {path: [] for path in found.layers}
    with coterie.routing_trace(mixture) as trace, torch.no_grad():
        for number, batch in enumerate(batches):
            mixture(**batch)
            mask = batch["attention_mask"].bool()
            for at, path in enumerate(found.layers):
                layer = mixture.get_submodule(path)
                pooled = trace[path].shape[1] == 1
                keep = torch.ones(3, 1).bool() if pooled else mask
                gates = trace[path][keep].double()
                picks[path] += gates.argmax(-1).tolist()
                if number:
                    continue
                assert first.share[at] == pytest.approx(gates.mean(0), abs=1e-6)
                rows = layer.bank.score_rows().double().unflatten(0, (3, -1))
                x = (seen[path] if not pooled else seen[path][:, None])[keep].double()
                scores = torch.stack([(x @ each.T).norm(dim=-1) for each in rows], dim=-1)
                p = scores.exp() / scores.exp().sum(-1, keepdim=True)
                top = p.sort(-1, descending=True).values
                assert float(first.margin[at]) == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), abs=1e-5)
                assert float(first.entropy[at]) == pytest.approx(
                    float(-(p * p.log()).sum(-1).mean() / math.log(3)), abs=1e-5
                )
                assert float(first.hits[at]) == pytest.approx(float((gates.argmax(-1) == 1).double().mean()))
    for hook in hooks:
        hook.remove()

    a, b = found.layers[0], found.layers[3]
    together = torch.tensor(picks[a] + picks[a][:13]), torch.tensor(picks[b] + picks[b][:13])  # the first batch twice
    assert float(found.agreement[0, 3]) == pytest.approx(float((together[0] == together[1]).double().mean()))
    pooler = [at for at, path in enumerate(found.layers) if "pooler" in path]
    assert found.agreement[pooler, 0].isnan().all()  # it never sees the same tokens
    assert [len(example.ids) for example in first.examples] == [7, 4]
    assert first.examples[0].gates.shape == (len(found.layers), 7, 3)
    assert found.mass.sum(-1) == pytest.approx(torch.ones(2).double())


def decisions(model, **batch):
    """What a record of one batch holds."""
    return routing.record(model, [("t", None, [batch])])


@pytest.mark.parametrize("method", ["logo", "vote", "xlora", "one for all"])
def test_layers_that_follow_one_decision_have_no_agreement(method, tmp_path):
    base = base_model("llama")
    if method == "logo":
        save(base, tmp_path / "base")
        adapters = {n: str(make_adapter(tmp_path / "base", tmp_path / n, s, arch="llama")) for s, n in enumerate("xy")}
        given = {"base": str(tmp_path / "base"), "experts": adapters, "parameters": {"layer": "*q_proj"}}
        coterie.build(method="logo", out=tmp_path / "out", **given)
        model = coterie.load(str(tmp_path / "out"))
    elif method == "vote":
        model = coterie.smile(base, {n: fine_tune(base, s) for s, n in enumerate("xy")}, rank=4, pool="model")
    else:
        parameters = {"layerwise": method == "xlora"}
        model = coterie.wrap(base, coterie.MixtureConfig(method="xlora", experts=["x", "y"], parameters=parameters))
    found = decisions(model.eval(), **inputs("llama", batch=2))
    together = method == "xlora"
    assert bool(found.agreement.isfinite().all()) == bool(found.kappa.isfinite().any()) == together
    assert bool(found.agreement.isfinite().any()) == together


def test_who_calls_says_where_prompts_end():
    base = base_model("llama")
    experts = {name: fine_tune(base, seed, scale=0.3) for seed, name in enumerate("xyz")}
    model = coterie.smile(base, experts, rank=4, gate_rank=2, pool="model")
    ids = torch.randint(3, 20, (6, 6), generator=torch.Generator().manual_seed(1))
    lengths, labels = torch.full((6,), 2), torch.where(torch.arange(6) < 2, -100, ids)
    by_length = decisions(model, input_ids=ids, prompt_lengths=lengths).tasks[0].share
    whole = decisions(model, input_ids=ids).tasks[0].share
    assert torch.equal(decisions(model, input_ids=ids, labels=labels).tasks[0].share, by_length)
    assert torch.equal(decisions(model, input_ids=ids, labels=ids).tasks[0].share, whole)  # no prompt is told apart
    assert torch.equal(decisions(model, input_ids=ids, attention_mask=torch.ones_like(ids)).tasks[0].share, whole)
    assert not torch.equal(whole, by_length)


def test_scores_are_recorded_on_every_path(mixture):
    batch = inputs("bert")
    with torch.no_grad():
        for path in ("auto", "grouped", "stacked"):
            with mixture.coterie.use_path(path), coterie.routing_trace(mixture, scores=True) as trace:
                mixture(**batch)
            assert set(trace.scores) == set(trace)
            for name, scores in trace.scores.items():
                assert scores.shape == trace[name].shape
                assert torch.equal(scores.argmax(-1), trace[name].argmax(-1))
        with mixture.coterie.route("e1"), coterie.routing_trace(mixture, scores=True) as trace:
            mixture(**batch)
    assert len(trace) and not trace.scores  # nothing was asked
    with coterie.routing_trace(mixture) as trace, torch.no_grad():
        mixture(**batch)
    assert not trace.scores
    assert all(not layer.router.score._forward_hooks for layer in map(mixture.get_submodule, mixture.coterie.layers))


@pytest.mark.parametrize(
    ("tasks", "said"),
    [([("t", "nobody", [])], "no expert 'nobody'"), ([("t", None, [])], "has no rows"), ([], "no tasks")],
)
def test_bad_tasks(mixture, tasks, said):
    with pytest.raises(CoterieError, match=said):
        routing.record(mixture, tasks)
