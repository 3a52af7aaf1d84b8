"""Retrieval by text embeddings, for a whole model and an example: against naive float64."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import routed
import torch
from safetensors.torch import load_file

import coterie
from coterie.errors import CoterieError

TEXTS = ["third", "whatever", "a thing, the third"]


@pytest.fixture(scope="module", params=["llama", "bert"])
def made(request, tmp_path_factory):
    made = routed.fill(tmp_path_factory.mktemp(request.param), request.param)
    for kind in ("task", "examples"):
        made.library.embed(routed.encoder, kind)
    return made


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def similarities(made, kind):
    """(texts, experts) float64."""
    rows = []
    for text in TEXTS:
        query, row = unit(routed.encoder([text]).double()[0]), []
        for name in routed.NAMES:
            known = unit(routed.encoder(routed.TEXTS[name]).double())
            row.append(float((known @ query).max() if kind == "examples" else unit(known.mean(0)) @ query))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def gates_of(cosines, k, weigh):
    gates = torch.zeros_like(cosines)
    for row in range(len(cosines)):
        best = cosines[row].argsort(descending=True)[:k]
        gates[row, best] = weigh(cosines[row, best])
    return gates


CASES = {
    "retriever": ("task", {}, 3, lambda c: torch.full_like(c, 1 / len(c))),
    "retriever of two": ("task", {"top_k": 2, "combine": "mixture"}, 2, lambda c: torch.full_like(c, 1 / len(c))),
    "retriever, one": ("task", {"combine": "selection"}, 1, torch.ones_like),
    "nearest_example": ("examples", {}, 1, torch.ones_like),
    "task_embedding": ("task", {"top_k": 2, "temperature": 0.2}, 2, lambda c: (c / 0.2).exp() / (c / 0.2).exp().sum()),
}


def outputs_mixed(made, gates):
    found = routed.deltas(made)

    def add(path, x):
        out = torch.zeros(*x.shape[:-1], len(next(iter(found[path].values()))), dtype=torch.float64)
        for row in range(len(x)):
            for i, delta in found[path].items():
                out[row] += gates[row, i] * x[row] @ delta.T
        return out

    return routed.naive(made, add)


@pytest.mark.parametrize("case", CASES)
def test_formula(made, case, tmp_path):
    kind, parameters, k, weigh = CASES[case]
    mixture = routed.build(made, case.split()[0].rstrip(","), tmp_path / "mixture", **parameters)
    cosines = similarities(made, kind)
    assert len(cosines.argmax(1).unique()) > 1
    gates = gates_of(cosines, k, weigh)
    given = routed.batch()
    with torch.no_grad(), mixture.coterie.retrieve(TEXTS, routed.encoder), coterie.routing_trace(mixture) as trace:
        ours = mixture(**given).logits
    for path, seen in trace.items():
        here = torch.tensor([i in mixture.coterie.spec.layers[path].experts for i in range(3)])
        torch.testing.assert_close(seen[:, 0].double(), gates * here, atol=1e-6, rtol=1e-6)
    theirs = outputs_mixed(made, gates)(**given).logits
    assert (ours - made.model(**given).logits).abs().max() > 1e-2
    routed.close_where_it_counts(ours, theirs, given["attention_mask"])


def test_fusion_averages_factors(made, tmp_path):
    mixture = routed.build(made, "retriever", tmp_path / "mixture", top_k=2, combine="fusion")
    gates = gates_of(similarities(made, "task"), 2, lambda c: torch.full_like(c, 0.5))
    found = routed.factors(made)

    def add(path, x):
        rank = max(len(a) for _, a in found[path].values())
        out = []
        for row in range(len(x)):
            up = torch.zeros(len(next(iter(found[path].values()))[0]), rank, dtype=torch.float64)
            down = torch.zeros(rank, x.shape[-1], dtype=torch.float64)
            for i, (b, a) in found[path].items():
                up[:, : b.shape[1]] += gates[row, i] * b
                down[: len(a)] += gates[row, i] * a
            out.append(x[row] @ down.T @ up.T)
        return torch.stack(out)

    given = routed.batch()
    with torch.no_grad(), mixture.coterie.retrieve(TEXTS, routed.encoder):
        ours = mixture(**given).logits
    theirs = routed.naive(made, add)(**given).logits
    assert (theirs - outputs_mixed(made, gates)(**given).logits).abs().max() > 1e-3
    routed.close_where_it_counts(ours, theirs, given["attention_mask"])


def test_save_and_load(made, tmp_path):
    mixture = routed.build(made, "nearest_example", tmp_path / "mixture")
    mixture.save_pretrained(tmp_path / "again")
    again = coterie.load(tmp_path / "again")
    routed.equal_states(mixture, again)
    assert mixture.coterie_router.weight.shape == (6, 8)
    experts = {name: f"{made.library.path}#{name}" for name in routed.NAMES}
    plan = coterie.plan(method="nearest_example", base=str(made.base), experts=experts)
    assert plan.parameters >= sum(p.numel() for p in mixture.parameters())
    given = routed.batch()
    with mixture.coterie.retrieve(TEXTS, routed.encoder), again.coterie.retrieve(TEXTS, routed.encoder):
        assert torch.equal(mixture(**given).logits, again(**given).logits)
    assert any("coterie_router" in name for file in tmp_path.glob("mixture/*.safetensors") for name in load_file(file))


def test_batch_mates_padding_and_later_tokens(made, tmp_path):
    mixture = routed.build(made, "task_embedding", tmp_path / "mixture", top_k=2)
    given = routed.batch()
    with mixture.coterie.retrieve(TEXTS, routed.encoder):
        together = mixture(**given).logits
    for row in range(3):
        length = int(given["attention_mask"][row].sum())
        with mixture.coterie.retrieve([TEXTS[row]], routed.encoder):
            alone = mixture(input_ids=given["input_ids"][row : row + 1, :length]).logits[0]
        mine = together[row, :length] if together.ndim == 3 else together[row]
        torch.testing.assert_close(alone, mine, atol=1e-5, rtol=1e-5)


def test_compiles_whole(made, tmp_path):
    mixture = routed.build(made, "nearest_example", tmp_path / "mixture")
    compiled = torch.compile(mixture, backend="eager", fullgraph=True)
    with torch.no_grad(), mixture.coterie.retrieve(TEXTS, routed.encoder):
        given = routed.batch()
        torch.testing.assert_close(compiled(**given).logits, mixture(**given).logits, atol=1e-5, rtol=1e-5)


def test_generates(made, tmp_path):
    if made.arch != "llama":
        pytest.skip("writes nothing")
    mixture = routed.build(made, "retriever", tmp_path / "mixture", combine="selection")
    given = routed.batch(side="left")
    names = [routed.NAMES[i] for i in similarities(made, "task").argmax(1)]
    with mixture.coterie.retrieve(TEXTS, routed.encoder):
        written = mixture.generate(**given, max_new_tokens=4, do_sample=False)
    with mixture.coterie.route(names):
        named = mixture.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(written, named)
    with mixture.coterie.retrieve([t for t in TEXTS for _ in range(2)], routed.encoder):
        assert mixture.generate(**given, max_new_tokens=3, num_beams=2, do_sample=False).shape == (3, 10)


def test_refusals(made, tmp_path):
    mixture = routed.build(made, "retriever", tmp_path / "mixture")
    given = routed.batch()
    with pytest.raises(CoterieError, match="the call comes without"):
        mixture(**given)
    with pytest.raises(CoterieError, match="embedded by 'encoder'"):
        mixture.coterie.retrieve(TEXTS, lambda texts: routed.encoder(texts))
    with pytest.raises(CoterieError, match="one text is given"):
        mixture.coterie.retrieve("a text", routed.encoder)
    with (
        mixture.coterie.retrieve(TEXTS[:2], routed.encoder),
        pytest.raises(CoterieError, match="1 for each of 2"),
    ):
        mixture(**given)
    uniform = routed.build(made, "uniform", tmp_path / "uniform")
    with pytest.raises(CoterieError, match="does not route by retrieval"):
        uniform.coterie.retrieve(TEXTS, routed.encoder)
    with mixture.coterie.route("general"):
        mixture(**given)


def test_readers_tell_the_texts_unless_somebody_has_decided(made, tmp_path, monkeypatch):
    from coterie.evaluation.reader import told
    from coterie.library import encoder

    monkeypatch.setattr(encoder, "minilm", lambda: routed.encoder)
    mixture, given = routed.build(made, "retriever", tmp_path / "mixture"), routed.batch()
    uniform = routed.build(made, "uniform", tmp_path / "uniform")

    def logits(*blocks):
        with torch.no_grad(), ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block())
            return mixture(**given).logits

    retrieved = logits(lambda: mixture.coterie.retrieve(TEXTS, routed.encoder))
    named = logits(lambda: mixture.coterie.route("general"))
    assert torch.equal(logits(lambda: told(mixture, TEXTS)), retrieved) and not torch.equal(retrieved, named)
    assert torch.equal(logits(lambda: mixture.coterie.route("general"), lambda: told(mixture, TEXTS)), named)
    with told(uniform, [torch.zeros(2)]), torch.no_grad():
        uniform(**given)
    with pytest.raises(CoterieError, match="it retrieves by texts, and the inputs are Tensor"):
        told(mixture, [torch.zeros(2)])


def test_several_encoders_are_refused(made, tmp_path):
    library = copy.copy(made.library)

    def other(texts):
        return routed.encoder(texts).flip(-1)

    library.embed(other, "task", ["same"])
    with pytest.raises(CoterieError, match="by several encoders"):
        routed.build(made, "retriever", tmp_path / "mixture")
    with pytest.raises(CoterieError, match="has no 'description' statistics"):
        library.statistics("task", "description")
    library.embed(routed.encoder, "task", ["same"])


def test_what_is_no_text_is_retrieved_by(tmp_path):
    """Vectors of anything, put into the library under their encoder's name; here lists of numbers."""
    made, seen = routed.fill(tmp_path, "bert"), {name: [float(n), 1.0] for n, name in enumerate(routed.NAMES)}
    for name, values in seen.items():
        made.library.put(name, "examples", {"embedding": torch.tensor([values])}, encoder="numbers")
    mixture, given = routed.build(made, "nearest_example", tmp_path / "mixture"), routed.batch()

    def numbers(rows):
        return torch.tensor(rows)

    numbers.name = "numbers"
    with torch.no_grad(), mixture.coterie.retrieve(list(seen.values()), numbers):
        found = mixture(**given).logits
    for row, name in enumerate(routed.NAMES):
        with torch.no_grad(), mixture.coterie.route(name):
            alone = mixture(**given).logits
        assert [torch.allclose(found[i], alone[i], atol=1e-5) for i in range(3)] == [i == row for i in range(3)]
    with pytest.raises(CoterieError, match="embedded by 'numbers', and the texts would be by 'encoder'"):
        mixture.coterie.retrieve(TEXTS, routed.encoder)
