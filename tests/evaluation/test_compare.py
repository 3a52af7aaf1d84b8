"""Comparisons: what they hold, that nothing is computed twice, and that what goes wrong loses nothing."""

import csv
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from small import LETTERS, encoder_suite

from coterie.errors import CoterieError
from coterie.evaluation import combine, demo
from coterie.evaluation.anchors import AnchorReader
from coterie.evaluation.cells import Cells
from coterie.evaluation.compare import compare
from coterie.evaluation.comparer import routed_share
from coterie.evaluation.suite import Split, Suite, Task, weights_sha256

GRIDS = {"smile": [{"rank": 4, "gate_rank": 2}], "task_arithmetic": [{"scale": 0.8}]}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return encoder_suite(tmp_path_factory.mktemp("small"))


def run(suite: Suite, folder: Path, methods: str = "smile,task_arithmetic", **options: Any) -> dict[str, Any]:
    options = {"cache": folder / "cache", "grids": GRIDS, "experts": "committed", **options}
    return compare(suite, methods, folder / "out", **options)


@pytest.fixture(scope="module")
def done(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison, with its cache."""
    run(suite, folder := tmp_path_factory.mktemp("done"))
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison's cache."""
    shutil.copytree(done / "cache", tmp_path / "cache")
    return tmp_path


def results(found: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [each for each in found["comparisons"][0]["results"] if each["method"] == method]


def test_what_a_comparison_holds(suite: Suite, copied: Path) -> None:
    found = run(suite, tmp_path := copied)
    (comparison,) = found["comparisons"]
    names = [each["method"] for each in comparison["results"]]
    assert list(dict.fromkeys(names)) == [
        "base", "expert of the task", "best single expert", "average", "smile", "task_arithmetic"
    ]  # fmt: skip
    (base,), (expert,) = results(found, "base"), results(found, "expert of the task")
    assert base["recovered_gap"]["value"] == 0
    assert expert["skill"] == [1.0, 1.0] and expert["task"] == "known"
    assert expert["normalised"]["value"] == expert["recovered_gap"]["value"] == 1
    assert expert["ratio"] == 2  # both fine-tunes are kept whole
    assert [comparison["matrix"][n][i] for i, n in enumerate(suite.committed)] == [1.0, 1.0]
    ways = {(r["others"], r["task"]): r for r in results(found, "smile") if "best" in r["setting"]}
    assert set(ways) == {(o, t) for o in ("base", "average") for t in ("known", "not known")}
    assert all(r["ratio"] > 1 and r["seconds"] > 0 for r in ways.values())
    # The ladder ends in the mixture, and a known task is oracle routing.
    last = comparison["ladder"]["smile, its own routing"]
    assert last == ways["base", "not known"]["skill"]
    rank = ways["base", "known"]["parameters"]["rank"]
    np.testing.assert_allclose(
        comparison["ladder"][f"rank {rank}, oracle routing"], ways["base", "known"]["skill"], atol=0.026
    )
    assert len(comparison["routing"]["smile"]) == 2
    settings = [r["setting"] for r in results(found, "task_arithmetic")]
    assert settings in (["default and best on validation"], ["default", "best on validation"])
    assert {r["task"] for r in results(found, "task_arithmetic")} == {"not known"}
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(lines) == 2 * len(comparison["results"])
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert "| task_arithmetic |" in (tmp_path / "out" / "results.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page and "http" not in page


def test_a_merge_is_its_formula(suite: Suite, copied: Path) -> None:
    found = run(suite, copied, "task_arithmetic")
    reader = AnchorReader(suite.base(copied, "cpu", False))
    base = {n: t.double() for n, t in reader.model.state_dict().items()}
    states = [type(reader.model).from_pretrained(path).state_dict() for path in suite.committed.values()]
    for each in [*results(found, "average"), *results(found, "task_arithmetic")]:
        scale = each["parameters"].get("scale", 1 / 2)
        merged = {n: (b + scale * sum(s[n].double() - b for s in states)).float() for n, b in base.items()}
        model = reader.base_model()
        model.load_state_dict(merged)
        for skill, task in zip(each["skill"], suite.tasks(), strict=True):
            assert skill == pytest.approx(reader.scores(model, task, task.test).mean(), abs=0.026)


def test_merges_that_need_statistics_are_given_them(suite: Suite, copied: Path) -> None:
    found = run(suite, copied, "fisher,regmean,average")
    assert all("validation rows, too" in note for note in found["comparisons"][0]["notes"])  # texts drawn at random
    average, fisher, regmean = (results(found, name)[0]["skill"] for name in ("average", "fisher", "regmean"))
    assert average != fisher and average != regmean
    assert not list((copied / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_routers_that_need_statistics_are_given_them(
    kind: str, suite: Suite, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And retrieval is told the texts, but where the task is known."""
    pytest.importorskip("peft")
    from coterie.library import encoder

    def letters(texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[sum(map(text.count, letters)) + 0.1 for letters in LETTERS.values()] for text in texts])

    monkeypatch.setattr(combine, "minilm", lambda: letters)
    monkeypatch.setattr(encoder, "minilm", lambda: letters)
    options = {"experts": kind, "tiny": True, "grids": {}}
    found = run(suite, copied, "nearest_example,retriever,phatgoose,average_activation", **options)
    rows = {name: results(found, name) for name in ("nearest_example", "retriever", "phatgoose", "average_activation")}
    assert not [row["note"] for each in rows.values() for row in each if not row["skill"]]
    expert = results(found, "expert of the task")[0]["skill"]
    told = {row["task"]: row["skill"] for row in rows["nearest_example"] if row["others"] == "base"}
    if kind == "lora":
        assert told["known"] == expert
    assert told["known"] == told["not known"]  # the letters tell the tasks apart
    assert rows["phatgoose"][0]["parameters"]["rank"] == ("full" if kind == "lora" else combine.FULL_RANK)
    assert found["comparisons"][0]["routing"]["nearest_example"] == [1.0, 1.0]
    models = copied / "cache" / "models"
    assert [path.name for path in models.iterdir()] == ["vectors"]
    kept = {path: path.stat().st_mtime_ns for path in models.rglob("*.safetensors")}
    assert len(kept) == 4 * 2  # of each method and expert
    again = run(suite, copied, "phatgoose", experts=kind, tiny=True, grids={"phatgoose": [{"top_k": 1}]})
    assert results(again, "phatgoose")[0]["skill"]
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*.safetensors")} == kept


@pytest.mark.parametrize("kind", ["activation", "gram"])
def test_damaged_statistics_are_said_and_made_anew(kind: str, suite: Suite, tmp_path: Path) -> None:
    said: list[str] = []
    reader = AnchorReader(suite.base(tmp_path, "cpu", False))
    experts = combine.Experts(reader, dict(suite.committed), {task.name: task for task in suite.tasks()}, said.append)
    file = experts.statistics("first", kind, tmp_path)
    good = load(file.read_bytes())
    file.write_bytes(file.read_bytes()[:-8])
    assert experts.statistics("first", kind, tmp_path) == file and len(said) == 1 and "is damaged" in said[0]
    assert all(torch.equal(tensor, good[name]) for name, tensor in load(file.read_bytes()).items())
    made = file.stat().st_mtime_ns
    assert experts.statistics("first", kind, tmp_path).stat().st_mtime_ns == made and len(said) == 1


def test_the_seconds_of_statistics_count(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are kept from before."""
    reader, tasks = AnchorReader(suite.base(tmp_path, "cpu", False)), {task.name: task for task in suite.tasks()}

    def slowed(gather: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: time.sleep(1) or gather(*args, **options)

    def seconds(way: combine.Way) -> float:
        experts = combine.Experts(reader, dict(suite.committed), tasks)
        with combine.combined(way, experts, tmp_path) as make:
            return float(make()[1]["seconds"])

    assert seconds(combine.ways("average", 2)[0]) < 2
    monkeypatch.setattr(combine, "gram", slowed(combine.gram))
    monkeypatch.setattr(combine.Experts, "_vectors", slowed(combine.Experts._vectors))
    first, again, *_ = combine.ways("average_activation", 2, adapters=False)
    assert min(seconds(combine.ways("regmean", 2)[0]), seconds(first), seconds(again)) > 2
    assert len(list(tmp_path.rglob("vectors/*/*"))) == 2


def test_statistics_need_training_rows(suite: Suite, copied: Path) -> None:
    """The methods that ask for them say so, and cost no other."""
    none = Split((), np.zeros(0, dtype=np.int64))
    bare = replace(suite, tasks=lambda **sizes: tuple(replace(task, train=none) for task in suite.tasks()))
    found = run(bare, copied, "regmean,average")
    assert results(found, "average")[0]["skill"]
    assert results(found, "regmean")[0]["note"].startswith("task 'first': has no train rows, of which its 'gram'")


def test_the_choice_is_made_on_validation_rows(suite: Suite, copied: Path) -> None:
    """With the validation rows' targets turned about, another scale is chosen, and the test rows have no say."""
    tasks = suite.tasks()

    def chosen(tasks: tuple[Task, ...]) -> float:
        grids = {"task_arithmetic": [{"scale": s} for s in (0.001, 1.0)]}
        other = replace(suite, tasks=lambda **sizes: tasks)
        found = run(other, copied, "task_arithmetic", grids=grids)
        return next(r for r in results(found, "task_arithmetic") if "best" in r["setting"])["parameters"]["scale"]

    reader = AnchorReader(suite.base(copied, "cpu", False))

    def by_base(task: Task) -> Task:
        """Validation rows on which the base is right."""
        cosines = reader.features(task.validation.inputs) @ reader.anchors(task.labels).numpy().T
        return replace(task, validation=Split(task.validation.inputs, cosines.argmax(1)))

    assert chosen(tuple(by_base(task) for task in tasks)) == 0.001
    assert chosen(tasks) != 0.001


def test_nothing_finished_is_computed_again(suite: Suite, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, tmp_path = run(suite, copied), copied
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cells").iterdir()}
    monkeypatch.setattr(AnchorReader, "scores", lambda *_: pytest.fail("a finished cell was computed again"))
    monkeypatch.setattr(combine.coterie, "build", lambda *_, **__: pytest.fail("a finished mixture was built again"))
    monkeypatch.setattr(combine.coterie, "merge", lambda *_, **__: pytest.fail("a finished merge was made again"))
    assert json.dumps(run(suite, tmp_path)) == json.dumps(found)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cells").iterdir()} == cells
    assert not list((tmp_path / "cache" / "models").glob("*"))


def test_comparisons_on_one_cache_do_not_meet(suite: Suite, tmp_path: Path) -> None:
    """Each model stands in a directory of its own; what a killed run left is removed after a day."""
    experts = combine.Experts(AnchorReader(suite.base(tmp_path, "cpu", False)), dict(suite.committed))
    old, new = tmp_path / "run-old", tmp_path / "run-new"
    for left in (old, new):
        (left / "model").mkdir(parents=True)
    os.utime(old, (time.time() - 2 * combine.DAY,) * 2)
    (way,) = combine.ways("average", 2)
    with combine.combined(way, experts, tmp_path) as make:
        make()
        (mine,) = set(tmp_path.iterdir()) - {new}
        with combine.combined(way, experts, tmp_path) as other:
            other()
            assert len(set(tmp_path.iterdir()) - {new, mine}) == 1
        assert set(tmp_path.iterdir()) == {new, mine} and (mine / "model" / "config.json").exists()
    assert set(tmp_path.iterdir()) == {new}


def test_one_model_per_task_is_asked_with_the_task_known(suite: Suite, copied: Path) -> None:
    found = run(suite, copied, "emr")
    rows = results(found, "emr")
    assert [(row["others"], row["task"], bool(row["skill"])) for row in rows] == [
        ("base", "known", True),
        ("average", "known", True),
    ]
    assert "emr" not in found["comparisons"][0]["routing"]


def test_a_killed_comparison_goes_on(suite: Suite, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads((done / "out" / "results.json").read_text())
    scores, left = AnchorReader.scores, [17]

    def dies(*args: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return scores(*args)

    monkeypatch.setattr(AnchorReader, "scores", dies)
    with pytest.raises(KeyboardInterrupt):
        run(suite, tmp_path)
    kept = len(list((tmp_path / "cache" / "cells").glob("*.json")))
    assert kept >= 17
    left[0] = 10**9
    again = run(suite, tmp_path)
    scored = [path for path in (done / "cache" / "cells").iterdir() if '["scores"' in path.read_text()]
    assert 10**9 - left[0] + 17 == len(scored)
    for one, other in zip(again["comparisons"][0]["results"], whole["comparisons"][0]["results"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize("damage", [b"", b"{", b"not json \xff", None])
def test_a_damaged_cell_is_said_and_computed_anew(damage: bytes | None, tmp_path: Path) -> None:
    said: list[str] = []
    cells = Cells(tmp_path, said.append)
    assert cells.get(("a", 1), lambda: [1.0, float("nan")])[0] == 1.0
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b"1.0", b"2.0") if damage is None else damage)
    assert cells.get(("a", 1), lambda: [3.0]) == [3.0]
    assert len(said) == 1 and "damaged" in said[0]
    assert cells.get(("a", 1), lambda: pytest.fail("computed again")) == [3.0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_method_that_fails_costs_its_own_rows(suite: Suite, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = {**GRIDS, "task_arithmetic": [{"scale": 0.7}]}
    merge = combine.coterie.merge

    def breaks(recipe: dict[str, Any], **options: Any) -> Any:
        if recipe["method"] == "task_arithmetic":
            raise RuntimeError("no convergence\nat all")
        return merge(recipe, **options)

    monkeypatch.setattr(combine.coterie, "merge", breaks)
    found = run(suite, copied, "task_arithmetic,smile", grids=grids)
    (failed,) = results(found, "task_arithmetic")
    assert failed["note"] == "failed: no convergence at all" and failed["skill"] is None
    assert results(found, "smile")[0]["skill"]
    monkeypatch.undo()
    assert results(run(suite, copied, "task_arithmetic,smile", grids=grids), "task_arithmetic")[0]["skill"]


def test_answers_that_are_no_numbers(suite: Suite, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is no number in the file of results either."""
    for path in (copied / "cache" / "cells").iterdir():
        if '"smile"' in path.read_text():
            path.unlink()
    load = combine.coterie.load

    def spoilt(path: str) -> Any:
        model = load(path)
        with torch.no_grad():
            model.encoder.layer[0].output.LayerNorm.weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(combine.coterie, "load", spoilt)
    found = run(suite, copied)
    assert {r["note"] for r in results(found, "smile")} == {
        "40 of 40 answers on first are no numbers; 40 of 40 answers on second are no numbers"
    }
    assert all(r["skill"] is None for r in results(found, "smile"))
    assert results(found, "average")[0]["skill"]
    assert "NaN" not in (copied / "out" / "results.json").read_text()


def test_a_base_whose_answers_are_no_numbers(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnchorReader, "scores", lambda self, model, task, split: np.full(len(split), np.nan))
    with pytest.raises(CoterieError, match="the base: 40 of 40 answers on first are no numbers"):
        run(suite, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["out", "cache"])
def test_a_file_in_the_way(place: str, suite: Suite, tmp_path: Path) -> None:
    suite = replace(suite, tasks=lambda **sizes: pytest.fail("there was work"))
    (tmp_path / place).write_text("mine")
    with pytest.raises(CoterieError, match=f"--{place}: .*{place} is no directory"):
        run(suite, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [place]
    assert (tmp_path / place).read_text() == "mine"


def test_a_demo_that_is_stopped_leaves_no_directory(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_check_data", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "out", False, tmp_path / "cache", settings=demo.Settings(suite, adapters={}))
    assert not (tmp_path / "out").exists()


def test_a_task_that_tells_nothing(suite: Suite, tmp_path: Path) -> None:
    first, second = suite.tasks()
    one = replace(suite, tasks=lambda **sizes: (replace(first, labels=("only",)), second))
    with pytest.raises(CoterieError, match="task 'first' has 1 class"):
        run(one, tmp_path)
    same = replace(first.test, targets=np.zeros_like(first.test.targets))
    found = run(replace(suite, tasks=lambda **sizes: (replace(first, test=same), second)), tmp_path, "average")
    assert found["comparisons"][0]["notes"][0] == (
        "the test rows of first are all of one class: any constant answer is right"
    )


def test_rows_that_are_chosen_on_are_not_tested_on(suite: Suite, tmp_path: Path) -> None:
    first, second = suite.tasks()
    shared = replace(second, validation=second.test.head(3))
    found = run(replace(suite, tasks=lambda **sizes: (first, shared)), tmp_path, "average")
    notes = [note for note in found["comparisons"][0]["notes"] if "validation rows, too" in note]
    assert notes == [
        f"3 of the {len(second.test)} test rows of second are validation rows, too: what was chosen there was chosen "
        "on them"
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ""}, "names no method"),
        ({"methods": "smlie"}, "unknown method 'smlie'; did you mean 'smile'"),
        ({"methods": "smear"}, "smear is trained and not built"),
        ({"experts": "ful"}, "small has no experts of kind 'ful'"),
        ({"seeds": 0}, "0 sets of experts"),
        ({"seeds": 2}, "have no further seeds"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str, suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=said):
        run(suite, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["full", "lora-seeds"])
def test_trained_experts_and_their_spread(kind: str, suite: Suite, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = run(suite, tmp_path, "average", experts=kind, seeds=2, tiny=True)
    assert [c["seed"] for c in found["comparisons"]] == [0, 1]
    experts = sorted((tmp_path / "cache" / "experts").iterdir())
    assert len(experts) == 4 and len({weights_sha256(path) for path in experts}) == 4
    way = next(s for s in found["summary"] if s["method"] == "average")
    values = [
        next(r for r in c["results"] if r["method"] == "average")["normalised"]["value"] for c in found["comparisons"]
    ]
    assert way["sets"] == 2
    assert way["normalised"]["mean"] == pytest.approx(np.mean(values))
    assert way["normalised"]["spread"] == pytest.approx(np.std(values, ddof=1))
    # A damaged expert is trained again, to the same weights.
    weights = next(experts[0].glob("*.safetensors"))
    good = weights.read_bytes()
    weights.write_bytes(good[:-8] + bytes(8))
    config = next(experts[1].glob("*config.json"))
    told = config.read_text()
    config.write_text(told[:20])
    run(suite, tmp_path, "average", experts=kind, seeds=2, tiny=True)
    assert weights.read_bytes() == good and config.read_text() == told


def test_routed_share_leaves_padding_out(suite: Suite, tmp_path: Path) -> None:
    import coterie

    reader = AnchorReader(suite.base(tmp_path, "cpu", False))
    recipe = {"method": "smile", "base": str(reader.base), "experts": {n: str(p) for n, p in suite.committed.items()}}
    coterie.build({**recipe, "parameters": {"rank": 4, "gate_rank": 2}}, out=tmp_path / "m")
    model, rows = coterie.load(str(tmp_path / "m")), suite.tasks()[0].test
    hits = total = 0
    for text in rows.inputs:  # one by one: nothing is padded
        with coterie.routing_trace(model) as trace, torch.no_grad():
            model(**reader.tokenizer(text, return_tensors="pt"))
        for gates in trace.values():
            if gates.shape[1] > 1:
                hits += int((gates[0].argmax(-1) == 0).sum())
                total += gates.shape[1]
    assert routed_share(reader, model, 0, rows) == pytest.approx(hits / total, abs=1e-3)


def test_keys_follow_meaning(tmp_path: Path) -> None:
    one, same, other = (tmp_path / f"{name}.py" for name in ("one", "same", "other"))
    one.write_text('"""Words."""\ndef f(x):\n    return x + 1\n')
    same.write_text("# a comment\ndef f( x ):\n    '''Other words.'''\n    return (x + 1)\n")
    other.write_text("def f(x):\n    return x + 2\n")
    assert combine.meaning(one) == combine.meaning(same) != combine.meaning(other)
    assert combine.source_key("average") != combine.source_key("ties")
