"""PHATGOOSE and average activation: gates trained, means gathered, models built of them, against naive float64."""

from __future__ import annotations

import copy

import pytest
import routed
import torch
from safetensors.torch import load_file, save_file

import coterie
from coterie.errors import CoterieError
from coterie.sources.statistics import read, write


@pytest.fixture(scope="module", params=["llama", "bert"])
def made(request, tmp_path_factory):
    """A library whose experts have random gates and gathered activations."""
    made = routed.fill(tmp_path_factory.mktemp(request.param), request.param)
    generator = torch.Generator().manual_seed(3)
    for name in routed.NAMES:
        expert = made.library[name]
        gates = {path: torch.randn(layer.shape[1], generator=generator) for path, layer in expert.layers.items()}
        made.library.put(name, "gate", gates)
        made.library.average_activation(name, made.model, routed.data(made.arch))
    return made


def standard(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt()


def by_vectors(made, kind, top_k):
    """The naive model: each token of each layer by itself."""
    found = routed.deltas(made)
    vectors = [made.library.statistics(name, kind) for name in routed.NAMES]

    def one(path, x):
        scores = {i: standard(vectors[i][path].double()) @ standard(x) / len(x) ** 0.5 for i in found[path]}
        best = sorted(scores, key=lambda i: -float(scores[i]))[:top_k]
        total = sum(scores[i].exp() for i in best)
        return sum(scores[i].exp() / total * (found[path][i] @ x) for i in best)

    def add(path, x):
        return torch.stack([one(path, token) for token in x.flatten(0, -2)]).view(*x.shape[:-1], -1)

    return routed.naive(made, add)


@pytest.mark.parametrize(("method", "kind"), [("phatgoose", "gate"), ("average_activation", "activation")])
def test_formula(made, method, kind, tmp_path):
    mixture = routed.build(made, method, tmp_path / "mixture", top_k=2)
    assert any(name.endswith("router.score.weight") for name in mixture.state_dict())
    given = routed.batch()
    with torch.no_grad():
        ours, theirs = mixture.double()(**given).logits, by_vectors(made, kind, 2)(**given).logits
        assert (ours - copy.deepcopy(made.model).double()(**given).logits).abs().max() > 1e-2
    routed.close_where_it_counts(ours, theirs, given["attention_mask"])


def test_one_decision_for_an_example(made, tmp_path):
    """Pooled: by the mean of the prompt, or of all tokens that count."""
    pool = "prompt" if made.arch == "llama" else "sequence"
    mixture = routed.build(made, "phatgoose", tmp_path / "mixture", pool=pool, top_k=2, temperature=0.5)
    found, given, lengths = routed.deltas(made), routed.batch(), torch.tensor([4, 3, 4])
    vectors = [made.library.statistics(name, "gate") for name in routed.NAMES]

    def add(path, x):
        out = []
        for row in range(len(x)):
            counted = int(lengths[row] if made.arch == "llama" else given["attention_mask"][row].sum())
            read = standard(x[row, :counted].mean(0))
            scores = {i: standard(vectors[i][path].double()) @ read / len(read) ** 0.5 / 0.5 for i in found[path]}
            best = sorted(scores, key=lambda i: -float(scores[i]))[:2]
            total = sum(scores[i].exp() for i in best)
            out.append(sum(scores[i].exp() / total * (x[row] @ found[path][i].T) for i in best))
        return torch.stack(out)

    more = {"prompt_lengths": lengths} if made.arch == "llama" else {}
    with torch.no_grad():
        ours, theirs = mixture.double()(**given, **more).logits, routed.naive(made, add)(**given).logits
    routed.close_where_it_counts(ours, theirs, given["attention_mask"])


def test_save_and_load(made, tmp_path):
    mixture = routed.build(made, "phatgoose", tmp_path / "mixture")
    mixture.save_pretrained(tmp_path / "again")
    again = coterie.load(tmp_path / "again")
    routed.equal_states(mixture, again)
    given = routed.batch()
    assert torch.equal(mixture(**given).logits, again(**given).logits)


def test_batch_mates_and_padding(made, tmp_path):
    mixture = routed.build(made, "phatgoose", tmp_path / "mixture")
    given = routed.batch()
    together = mixture(**given).logits
    for row in range(3):
        length = int(given["attention_mask"][row].sum())
        alone = mixture(input_ids=given["input_ids"][row : row + 1, :length]).logits[0]
        mine = together[row, :length] if together.ndim == 3 else together[row]
        torch.testing.assert_close(alone, mine, atol=1e-5, rtol=1e-5)


def test_causal_and_generates(made, tmp_path):
    if made.arch != "llama":
        pytest.skip("writes nothing")
    mixture = routed.build(made, "phatgoose", tmp_path / "mixture")
    ids = routed.batch()["input_ids"][:1]
    changed = ids.clone()
    changed[0, -1] = 7
    a, b = mixture(input_ids=ids).logits[:, :-1], mixture(input_ids=changed).logits[:, :-1]
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    written = mixture.generate(ids, max_new_tokens=4, do_sample=False)
    plain = mixture.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(written, plain)


def test_full_fine_tunes_bring_their_statistics(made, tmp_path):
    """Live modules: a layer that one did not change needs no vector of its own, any other does."""
    from coterie.building.in_memory import build_in_memory

    models = {}
    for i, name in enumerate(routed.NAMES):
        models[name] = copy.deepcopy(made.model)
        for path, each in routed.deltas(made).items():
            if i in each:
                models[name].get_submodule(path).weight.data += each[i].float()
    files = {name: str(made.library[name].path / "statistics" / "gate.safetensors") for name in routed.NAMES}
    live = build_in_memory("phatgoose", made.model, models, statistics=files)
    built = routed.build(made, "phatgoose", tmp_path / "mixture")
    given = routed.batch()
    torch.testing.assert_close(live(**given).logits, built(**given).logits, atol=1e-4, rtol=1e-4)
    tensors, _ = read(made.library["task"].path / "statistics" / "gate.safetensors")
    path = next(iter(tensors))
    write(tmp_path / "less.safetensors", {k: v for k, v in tensors.items() if k != path}, {"kind": "gate"})
    files["task"] = str(tmp_path / "less.safetensors")
    with pytest.raises(CoterieError, match=f"no vector for '{path}'.*train-gates"):
        build_in_memory("phatgoose", made.model, models, statistics=files)
    with pytest.raises(CoterieError, match=f"no vector for '{path}'.*train-gates"):
        experts = {n: {"source": f"{made.library.path}#{n}", "statistics": files[n]} for n in routed.NAMES}
        coterie.build(method="phatgoose", base=str(made.base), experts=experts, out=tmp_path / "a")


def test_gates_are_trained(made):
    """AdamW by hand, on a model whose layers are written out."""
    steps, rate = 5, 5e-3
    expert = made.library["task"]
    own = {path: each[0] for path, each in routed.deltas(made).items() if 0 in each}
    model = copy.deepcopy(made.model).double().train()
    gates = {path: torch.zeros(d.shape[1], dtype=torch.float64, requires_grad=True) for path, d in own.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path, delta in own.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, d=delta, v=gates[path]: out + (args[0] @ d.T) * torch.sigmoid(args[0] @ v)[..., None]
        )
    moments = {path: (torch.zeros_like(v), torch.zeros_like(v)) for path, v in gates.items()}
    batches = routed.data(made.arch)
    for step in range(steps):
        slopes = torch.autograd.grad(model(**batches[step % 2]).loss, [*gates.values()])
        for path, slope in zip(gates, slopes, strict=True):
            first, second = moments[path]
            first.mul_(0.9).add_(0.1 * slope)
            second.mul_(0.999).add_(0.001 * slope.square())
            root = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            with torch.no_grad():  # the warm-up is one step long, and its rate is zero
                gates[path] -= (rate if step else 0.0) * first / (1 - 0.9 ** (step + 1)) / root
    from coterie.library.vectors import train_gates

    before = copy.deepcopy(made.model.state_dict())
    found = train_gates(made.model, expert, batches, steps, rate)
    assert found.keys() == expert.layers.keys()
    for path, gate in gates.items():
        assert gate.abs().max() > 1e-3
        torch.testing.assert_close(found[path].double(), gate.detach(), atol=1e-4, rtol=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.model.state_dict().items())


def test_activations_are_means(made):
    """Of the tokens that are no padding, with the expert at work."""
    found = routed.deltas(made)
    seen: dict[str, list[torch.Tensor]] = {}
    mask = None

    def add(path, x):
        if 1 not in found[path]:
            return 0
        seen.setdefault(path, []).append(x[mask])
        return x @ found[path][1].T

    model = routed.naive(made, add)
    for batch in routed.data(made.arch):
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    ours = made.library.statistics("general", "activation")
    assert ours.keys() == seen.keys()
    for path, rows in seen.items():
        torch.testing.assert_close(ours[path].double(), torch.cat(rows).mean(0), atol=1e-5, rtol=1e-5)


def test_refusals(made, tmp_path):
    library = made.library

    def recipe(**more):
        experts = {n: {"source": f"{library.path}#{n}", **more.get(n, {})} for n in routed.NAMES}
        return {"method": "phatgoose", "base": str(made.base), "experts": experts}

    with pytest.raises(CoterieError, match=r"has no 'gate' statistics.*train-gates"):
        experts = {"task": f"{library.path}#task", "loose": str(made.root / "general")}
        coterie.build({"method": "phatgoose", "base": str(made.base), "experts": experts}, tmp_path / "a")
    file = library["task"].path / "statistics" / "gate.safetensors"
    with pytest.raises(CoterieError, match="made of other weights"):
        coterie.build(recipe(general={"statistics": str(file)}), tmp_path / "b")
    with pytest.raises(CoterieError, match="of kind activation"):
        wrong = file.with_name("activation.safetensors")
        coterie.build(recipe(task={"statistics": str(wrong)}), tmp_path / "c")
    with pytest.raises(CoterieError, match="no such file"):
        coterie.build(recipe(task={"statistics": "nowhere"}), tmp_path / "d")
    tensors = load_file(file)
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "changed.safetensors", {"kind": "gate"})
    with pytest.raises(CoterieError, match="was changed"):
        coterie.build(recipe(task={"statistics": str(tmp_path / "changed.safetensors")}), tmp_path / "e")
    with pytest.raises(CoterieError, match="no batches"):
        library.train_gates("task", made.model, [])
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in routed.data(made.arch)]
    with pytest.raises(CoterieError, match="no loss"):
        library.train_gates("task", made.model, batches)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_library_keeps_trained_gates(made):
    made.library.train_gates("same", made.model, routed.data(made.arch), steps=3)
    file = made.library["same"].path / "statistics" / "gate.safetensors"
    assert read(file)[1]["steps"] == "3"
    assert made.library.statistics("same", "gate").keys() == made.library["same"].layers.keys()


def test_routing_that_a_model_cannot_have_is_refused_before_anything_is_written(made, tmp_path):
    with pytest.raises(CoterieError, match=r"has no 'gate' statistics|look ahead") as told:
        coterie.build(
            method="phatgoose",
            base=str(made.base),
            experts={"loose": str(made.root / "general")},
            parameters={"pool": "sequence"},
            out=tmp_path / "a",
        )
    assert ("look ahead" in str(told.value)) == (made.arch == "llama")
    assert not (tmp_path / "a").exists()
