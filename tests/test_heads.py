"""Task heads are kept per expert and selected by name, with everything in the configuration that belongs to them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import coterie
from matching import build, relative_error, smile
from zoo import base_model, fine_tune, inputs, load_dense, make_adapter, outputs, save

LABELS = {
    "polarity": {0: "negative", 1: "positive"},
    "topic": {i: f"topic {i}" for i in range(5)},
    "tags": {i: f"tag {i}" for i in range(4)},
}


def experts_of(base):
    """Three experts whose heads have different widths, labels and problem types."""
    made = {}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        expert = fine_tune(base, seed, heads=False)
        gen = torch.Generator().manual_seed(seed)
        head = torch.nn.Linear(32, len(labels))
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=gen) / 5)
            head.bias.copy_(torch.randn(head.bias.shape, generator=gen) / 5)
        expert.classifier = head
        expert.num_labels = len(labels)
        expert.config = copy.deepcopy(base.config)
        expert.config.id2label = dict(labels)
        expert.config.label2id = {v: k for k, v in labels.items()}
        if name == "tags":
            expert.config.problem_type = "multi_label_classification"
        made[name] = expert.eval()
    return made


def check_head(model, expert, name, batch):
    """The model answers with the head of ``name`` and its configuration says so."""
    labels = LABELS[name]
    assert model.config.num_labels == len(labels)
    assert {int(k): v for k, v in model.config.id2label.items()} == labels
    assert model.config.label2id == {v: k for k, v in labels.items()}
    assert model.config.problem_type == ("multi_label_classification" if name == "tags" else None)
    if hasattr(model, "num_labels"):
        assert model.num_labels == len(labels)
    with torch.no_grad():
        pooled = model.bert(**batch).pooler_output
        wanted = torch.nn.functional.linear(pooled, expert.classifier.weight, expert.classifier.bias)
    got = outputs(model, batch)
    assert got.shape == (len(batch["input_ids"]), len(labels))
    assert relative_error(got, wanted) <= 1e-5


@pytest.fixture(params=["live", "directory"])
def case(request, tmp_path):
    base = base_model("bert", num_labels=2)
    experts = experts_of(base)
    if request.param == "live":
        return smile(base, experts, rank=6, gate_rank=4), experts
    save(base, tmp_path / "base")
    for i, model in enumerate(experts.values()):
        save(model, tmp_path / f"e{i}")
    sources = {n: tmp_path / f"e{i}" for i, n in enumerate(experts)}
    return build(tmp_path / "out", tmp_path / "base", sources, parameters={"rank": 6, "gate_rank": 4}), experts


def test_use_head_for_good(case):
    model, experts = case
    batch = inputs("bert")
    assert list(model.coterie.expert_names) == list(LABELS)
    for name in ("topic", "tags", "polarity", "tags"):
        model.coterie.use_head(name)
        check_head(model, experts[name], name, batch)


def test_use_head_for_a_block(case):
    model, experts = case
    batch = inputs("bert")
    model.coterie.use_head("polarity")
    with model.coterie.use_head("topic"):
        check_head(model, experts["topic"], "topic", batch)
        with model.coterie.use_head("tags"):
            check_head(model, experts["tags"], "tags", batch)
        check_head(model, experts["topic"], "topic", batch)
    check_head(model, experts["polarity"], "polarity", batch)
    with pytest.raises(ZeroDivisionError), model.coterie.use_head("topic"):
        raise ZeroDivisionError
    check_head(model, experts["polarity"], "polarity", batch)


def test_the_default_is_the_first_with_a_warning(tmp_path):
    base = base_model("bert", num_labels=2)
    experts = experts_of(base)
    with pytest.warns(UserWarning, match="polarity"):
        model = coterie.smile(base, experts, rank=6, gate_rank=4).eval()
        got = outputs(model, inputs("bert"))
    assert got.shape[1] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_head(model, experts["polarity"], "polarity", inputs("bert"))


def test_an_unknown_head_is_refused_by_name(case):
    model, _ = case
    with pytest.raises(Exception, match="topicc") as caught:
        model.coterie.use_head("topicc")
    assert "topic" in str(caught.value).replace("topicc", "")


def test_losses_follow_the_head(case):
    model, _ = case
    batch = inputs("bert")
    model.coterie.use_head("topic")
    loss = model(**batch, labels=torch.tensor([4, 0])).loss
    assert torch.isfinite(loss)
    model.coterie.use_head("tags")
    loss = model(**batch, labels=torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])).loss
    assert torch.isfinite(loss)
    model.coterie.use_head("topic")
    assert torch.isfinite(model(**batch, labels=torch.tensor([4, 0])).loss)


def test_heads_survive_saving(case, tmp_path):
    model, experts = case
    batch = inputs("bert")
    model.coterie.use_head("topic")
    model.save_pretrained(tmp_path / "again")
    again = coterie.load(tmp_path / "again").eval()
    for name in LABELS:
        again.coterie.use_head(name)
        check_head(again, experts[name], name, batch)


def test_heads_that_agree_are_one_head():
    base = base_model("bert")
    tuned = fine_tune(base, 1)
    other = fine_tune(base, 2, heads=False)
    other.classifier.load_state_dict(tuned.classifier.state_dict())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = coterie.smile(base, {"a": tuned, "b": other}, rank=6, gate_rank=4).eval()
    assert not [w for w in told if "head" in str(w.message)]
    with torch.no_grad():
        pooled = model.bert(**inputs("bert")).pooler_output
        wanted = torch.nn.functional.linear(pooled, tuned.classifier.weight, tuned.classifier.bias)
    assert relative_error(outputs(model, inputs("bert")), wanted) <= 1e-5
    assert sum(p.shape == tuned.classifier.weight.shape for p in model.parameters()) == 1


def test_heads_of_adapters(tmp_path):
    base_dir = save(base_model("bert"), tmp_path / "base")
    paths = {
        f"a{s}": make_adapter(base_dir, tmp_path / f"a{s}", s, arch="bert", modules_to_save=["classifier"])
        for s in (1, 2)
    }
    model = build(tmp_path / "out", base_dir, paths, parameters={"rank": 6, "gate_rank": 4})
    import peft

    for name, path in paths.items():
        merged = peft.PeftModel.from_pretrained(load_dense(base_dir, "bert"), str(path)).merge_and_unload().eval()
        with torch.no_grad(), model.coterie.use_head(name):
            pooled = model.bert(**inputs("bert")).pooler_output
            wanted = torch.nn.functional.linear(pooled, merged.classifier.weight, merged.classifier.bias)
            assert relative_error(outputs(model, inputs("bert")), wanted) <= 1e-5


def test_a_head_that_the_base_lacks(tmp_path):
    """A classification expert of an encoder without a head: the head is kept and the mixture has the expert's class."""
    base = base_model("bert")
    save(base.bert, tmp_path / "base")
    experts = {}
    for seed in (1, 2):
        experts[f"e{seed}"] = fine_tune(base, seed)
        save(experts[f"e{seed}"], tmp_path / f"e{seed}")
    sources = {n: tmp_path / n for n in experts}
    model = build(tmp_path / "out", tmp_path / "base", sources, parameters={"rank": 6, "gate_rank": 4})
    assert type(model).__name__.endswith("BertForSequenceClassification")
    for name, expert in experts.items():
        with torch.no_grad(), model.coterie.use_head(name):
            pooled = model.bert(**inputs("bert")).pooler_output
            wanted = torch.nn.functional.linear(pooled, expert.classifier.weight, expert.classifier.bias)
            assert relative_error(outputs(model, inputs("bert")), wanted) <= 1e-5
