"""`coterie train`: recipes, data, runs that are interrupted, and what comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertTokenizer, PreTrainedTokenizerFast, TrainerCallback

import coterie
from coterie.training.recipe import read_train_recipe
from coterie.training.train import train
from zoo import base_model, inputs, make_adapter, outputs, save

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "book", "sea", "rock", "is", "a"]


@pytest.fixture(scope="module")
def drawer(tmp_path_factory):
    """Bases with tokenizers, and data of two tasks."""
    folder = tmp_path_factory.mktemp("drawer")
    save(base_model("bert"), folder / "bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    for arch in ("llama", "t5"):
        save(base_model(arch), folder / arch)
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "<s>", "</s>", *WORDS[1:]])}, "[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / arch)
    rows = [(f"{a} {b} is a {c}", a, b) for a in ("good", "bad") for b in ("film", "book") for c in ("sea", "rock")]
    (folder / "opinion.csv").write_text("text,label\n" + "".join(f"{t},{a}\n" for t, a, _ in rows))
    (folder / "object.csv").write_text("text,label\n" + "".join(f"{t},{b}\n" for t, _, b in rows))
    both = [{"text": t, "label": a, "kind": "opinion" if i % 2 else "other"} for i, (t, a, _) in enumerate(rows)]
    (folder / "both.jsonl").write_text("\n".join(map(json.dumps, both)))
    pairs = [{"text": t, "answer": f"{a} {b}"} for t, a, b in rows]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    tags = [
        {"tokens": t.split(), "tags": ["X" if w in ("good", "bad") else "O" for w in t.split()]} for t, _, _ in rows
    ]
    (folder / "tags.jsonl").write_text("\n".join(map(json.dumps, tags)))
    return folder


@pytest.fixture
def recipe(drawer, monkeypatch, tmp_path):
    monkeypatch.chdir(drawer)
    return {
        "task": "text-classification",
        "base": "bert",
        "method": "smear",
        "experts": 3,
        "parameters": {"rank": 2},
        "data": {"train": "opinion.csv", "validation": "opinion.csv", "target": "label"},
        "training": {
            "num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True, "logging_steps": 1,
            "learning_rate": 0.01,
        },
    }  # fmt: skip


def other(recipe, **given):
    """A copy with other keys; those of `data` and `training` are added to what it has."""
    merged = {**recipe, **given}
    for key in ("data", "training"):
        merged[key] = {k: v for k, v in {**recipe[key], **given.get(key, {})}.items() if v is not None}
    return {k: v for k, v in merged.items() if v is not None}


def test_a_mixture_comes_out(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(other(recipe, training={"report_to": ["tensorboard"]})))
    from coterie.cli import main

    sys.argv = ["coterie", "train", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index('{\n "out"') :])
    assert report["steps"] == 4
    assert 0 <= report["metrics"]["accuracy"] <= 1
    assert sum(report["load"]["all"]) == pytest.approx(1, abs=1e-3)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "model.safetensors", "mixture.json", "README.md", "tokenizer.json", "runs"}
    assert wanted <= files
    assert not {"run", "journal.jsonl", "lock"} & files
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.coterie.expert_names == ["expert 0", "expert 1", "expert 2"]
    record = json.loads((tmp_path / "out/mixture.json").read_text())
    assert record["recipe"]["method"] == "smear"
    assert len(record["data"]["opinion.csv"]) == 64
    assert record["training"]["metrics"] == report["metrics"]
    card = (tmp_path / "out/README.md").read_text()
    meta = yaml.safe_load(card.split("---")[1])
    assert meta["pipeline_tag"] == "text-classification"
    assert "| task | expert 0 | expert 1 | expert 2 |" in card
    from coterie.report.inspect import inspect

    assert inspect(str(tmp_path / "out")).sources == ["trained"] * 3


@pytest.mark.parametrize("saved", [{"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 2}])
def test_an_interrupted_run_goes_on_to_the_same_weights(saved, recipe, tmp_path, monkeypatch):
    """Also from a checkpoint at the end of an epoch that was made before the epoch's validation."""
    recipe = other(recipe, parameters={"rank": 2, "dropout": 0.1}, training=saved)
    train(recipe, tmp_path / "whole", quiet=True)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    import coterie.training.train as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "watch", lambda trainer: trainer.add_callback(Stop()))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".out.partial")]
    assert len(left) == 1
    with pytest.raises(coterie.CoterieError, match="seed"):
        train(other(recipe, seed=5), tmp_path / "out", resume=True, quiet=True)
    report = train(recipe, tmp_path / "out", resume=True, quiet=True)
    assert report.steps == 4
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert set(whole) == set(again)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_a_mixture_is_trained_further(recipe, tmp_path):
    train(recipe, tmp_path / "first", quiet=True)
    again = other(recipe, base=str(tmp_path / "first"), method=None, experts=None, parameters=None, train="routers")
    train(again, tmp_path / "second", quiet=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert all(".router." in name for name in changed)
    routed = {**again, "method": "switch", "also_train": ["*LayerNorm.bias"], "training": {"max_steps": 1}}
    train(routed, tmp_path / "third", quiet=True)
    three = load_file(tmp_path / "third" / "model.safetensors")
    beside = {
        n for n in one if not torch.equal(one[n], three.get(n, one[n])) and ".router." not in n and ".bank." not in n
    }
    assert beside and all(name.endswith("LayerNorm.bias") for name in beside)
    for key, value in {"modules": {"include": ["*query"]}, "parameters": {"rank": 2}}.items():
        with pytest.raises(coterie.CoterieError, match=f"which has its {key}"):
            train({**again, key: value}, tmp_path / "fourth", quiet=True)


def test_a_mixture_is_first_built(recipe, drawer, tmp_path):
    for seed in (1, 2):
        make_adapter(drawer / "bert", tmp_path / f"adapter{seed}", seed, arch="bert")
    experts = {"a": str(tmp_path / "adapter1"), "b": {"source": str(tmp_path / "adapter2"), "weight": 0.5}}
    parameters = {"rank": 4, "gate_rank": 2}
    classes = {"labels": {"bad": "LABEL_0", "good": "LABEL_1", "none": "LABEL_2"}}
    built = other(recipe, method="smile", experts=experts, parameters=parameters, data=classes)
    report = train(built, tmp_path / "out", quiet=True)
    assert coterie.load(tmp_path / "out").coterie.expert_names == ["a", "b"]
    assert set(report.load) == {"all"}


def files(name, **columns):
    return {"train": f"{name}.jsonl", "validation": f"{name}.jsonl", **columns}


@pytest.mark.parametrize(
    ("task", "base", "keys"),
    [
        ("token-classification", "bert", {"data": files("tags", input="tokens", target="tags")}),
        ("causal-lm", "llama", {"data": files("pairs", target="answer"), "parameters": {"rank": 2, "pool": "prompt"}}),
        ("causal-lm", "llama", {"data": files("pairs", target=None), "method": "switch"}),
        pytest.param("seq2seq", "t5", {"data": files("pairs", target="answer")}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_other_tasks(task, base, keys, recipe, tmp_path):
    report = train(other(recipe, task=task, base=base, **keys), tmp_path / "out", quiet=True)
    assert ("perplexity" if task in ("causal-lm", "seq2seq") else "accuracy") in report.metrics
    model = coterie.load(tmp_path / "out")
    assert model.config.architectures
    assert getattr(model.config, "use_cache", True)  # the Trainer's own setting does not stay


@pytest.mark.slow
def test_images(recipe, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessor

    save(base_model("vit"), tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    lines = ["file,label"]
    for i in range(6):
        image.new("RGB", (20, 20), (40 * i, 10, 10)).save(tmp_path / f"{i}.png")
        lines.append(f"{tmp_path / str(i)}.png,{'red' if i > 2 else 'dark'}")
    (tmp_path / "images.csv").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "images.csv"), "validation": None, "input": "file"}
    given = other(recipe, task="image-classification", base=str(tmp_path / "vit"), data=data)
    report = train(given, tmp_path / "out", quiet=True)
    assert report.metrics == {}
    assert coterie.load(tmp_path / "out").config.num_labels == 2


def test_truth_values_of_csv_are_labels(recipe, tmp_path):
    """Which are texts there."""
    rows = [f"what a film,{'true' if i % 3 else 'false'}" for i in range(6)]
    (tmp_path / "truth.csv").write_text("\n".join(["text,label", *rows]))
    file, labels = str(tmp_path / "truth.csv"), {True: "right", False: "wrong"}
    data = {"train": file, "validation": file, "labels": labels}
    train(other(recipe, data=data), tmp_path / "out", quiet=True)
    assert set(coterie.load(tmp_path / "out").config.id2label.values()) == {"right", "wrong"}


def test_tasks_are_read_and_reported(recipe, tmp_path):
    data = {"train": {"opinion": "opinion.csv", "object": "opinion.csv"}, "validation": "both.jsonl", "task": None}
    report = train(other(recipe, data={**data, "validation": None}), tmp_path / "files", quiet=True)
    assert set(report.load) == {"all", "opinion", "object"}
    given = other(
        recipe,
        method="tag",
        experts=["one", "two"],
        data={"train": "both.jsonl", "validation": "both.jsonl", "task": "kind"},
    )
    report = train(given, tmp_path / "column", quiet=True)
    assert {"accuracy", "other/accuracy", "opinion/accuracy"} <= set(report.metrics)
    assert report.load["other"] == [1.0, 0.0]
    assert report.load["opinion"] == [0.0, 1.0]


def test_label_smoothing_and_a_lost_loss(recipe, tmp_path):
    smooth = {"label_smoothing_factor": 0.1, "num_train_epochs": 1}
    train(other(recipe, method="switch", training=smooth), tmp_path / "smooth", quiet=True)
    hot = {"learning_rate": 1e30, "max_grad_norm": 0.0, "optim": "sgd", "num_train_epochs": 4}
    with pytest.raises(coterie.CoterieError, match=r"step \d+, batch \d+ of epoch \d.*the loss is not finite"):
        train(other(recipe, training=hot), tmp_path / "lost", quiet=True)
    assert not (tmp_path / "lost").exists()


LLAMA = {"task": "causal-lm", "base": "llama"}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"methd": "smear"}, "unknown key 'methd'; did you mean 'method'"),
        ({"data": {"trian": "x"}}, r"unknown key 'data.trian'; did you mean 'train'"),
        ({"training": {"lerning_rate": 1.0}}, r"unknown key 'training.lerning_rate'; did you mean 'learning_rate'"),
        ({"training": {"output_dir": "x"}}, r"unknown key 'training.output_dir'; it is -o DIR"),
        ({"training": {"lr_scheduler_type": "nope"}}, "training: .*nope"),
        ({"task": "poetry"}, "task is 'poetry'; it must be"),
        ({"method": None}, "method is missing"),
        ({"method": "smeer"}, "unknown method 'smeer'; did you mean 'smear'"),
        ({"method": "smile"}, "smile is built from experts"),
        ({"method": "switch", "parameters": {"top_k": 9}}, "top_k is 9 and there are 3 experts"),
        ({"parameters": {"rank": 0}}, "rank is 0"),
        ({"modules": {"include": ["*nothing*"]}}, "no layer would become a mixture layer"),
        ({"also_train": ["*nothing*"]}, "no parameter of the base matches"),
        ({"method": "smile", "experts": {"a": "b"}, "also_train": ["*classifier*"]}, "trained as it is"),
        ({"method": "tag"}, "goes by each row's task, and the data names none"),
        ({"method": "tag", "experts": 1, "data": files("both", task="kind")}, "the data has 2 tasks, and tag"),
        ({"data": {"target": None}}, "data.target is missing"),
        ({"data": {"target": "labl"}}, "no column 'labl'; did you mean 'label'"),
        ({"data": {"train": "opinon.csv"}}, "no such file"),
        ({"data": {"train": "vocab.txt"}}, "is no CSV, JSONL or Parquet file"),
        ({"data": {"labels": ["good", "fine"]}}, "row 5: 'bad' in column 'label' is no label"),
        ({"data": {"validation": "object.csv"}}, r"data.validation: row 1: 'film' in column 'label' is no label"),
        ({"base": "nowhere"}, "no such directory"),
        ({**LLAMA, "data": {"target": None}, "parameters": {"pool": "prompt"}}, "but whole texts"),
        ({**LLAMA, "data": {"target": None}}, "would look ahead"),
        ({**LLAMA, "data": {"max_tokens": 2}, "parameters": {"pool": "prompt"}}, "nothing left that is learned"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_training(change, wanted, recipe, tmp_path):
    with pytest.raises(coterie.CoterieError, match=wanted):
        train(other(recipe, **change), tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("text,label\n", "has no rows"),
        ("text,label\ngood film,1\nbad film,1\n", "holds one class alone"),
        ("text,label\ngood film,1\n,0\n", "row 2 has nothing in column 'text'"),
    ],
)
def test_bad_data_is_refused(content, wanted, recipe, tmp_path):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(coterie.CoterieError, match=wanted):
        train(
            other(recipe, data={"train": str(tmp_path / "bad.csv"), "validation": None}), tmp_path / "out", quiet=True
        )
    assert not (tmp_path / "out").exists()


def test_a_recipe_is_read_once(recipe):
    given = read_train_recipe(recipe)
    assert read_train_recipe(given) is given
    assert outputs(base_model("bert"), inputs("bert")).shape == (2, 3)


def test_the_example_runs(recipe, drawer, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    example = yaml.safe_load((root / "examples/train-smear.yml").read_text())
    monkeypatch.chdir(root)
    example |= {"base": str(drawer / "bert")}
    example["training"] |= {"num_train_epochs": 1, "use_cpu": True}
    report = train(example, tmp_path / "out", quiet=True)
    assert set(report.load) == {"all", "films", "food", "travel"}
