"""The page, as a file and as a browser shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import coterie
from browser import Browser
from builds import write_sources
from coterie.cli import main
from coterie.errors import CoterieError
from coterie.report.charts import Layers
from coterie.report.look import look_inside
from coterie.report.page import _texts
from coterie.report.routing import Example, RoutingRecord, TaskRouting
from coterie.report.subspaces import LayerSpaces
from coterie.report.texts import ROWS, read_texts
from zoo import VOCAB, base_model, fine_tune, inputs, save


def _figures(page: str) -> list[dict]:
    return _data(page)["figures"]


def _data(page: str) -> dict:
    found = re.search(r'id="report">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Three experts of a small BERT, with a tokenizer of a hundred words."""
    folder = tmp_path_factory.mktemp("page")
    recipe = write_sources(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", pad_token="w0", eos_token="w2")
    tokenizer.save_pretrained(folder / "base")
    coterie.build(recipe, out=folder / "mixture")
    return folder / "mixture"


@pytest.fixture(scope="module")
def reports(mixture: Path) -> dict[str, Path]:
    """The page without data, and the page with two tasks, one of whose expert is known."""
    lines = mixture.parent / "lines.txt"
    lines.write_text("\n".join(" ".join(f"w{i * j % VOCAB}" for j in range(1, 3 + i)) for i in range(1, 9)))
    bare, full = mixture.parent / "bare.html", mixture.parent / "full.html"
    look_inside(str(mixture), bare)
    look_inside(str(mixture), full, [f"tuned={lines}", "w5 w6 </script> w7 w8 w9"])
    return {"bare": bare, "full": full}


@pytest.mark.parametrize("pool", ["prompt", "model"])
def test_texts_are_prompts(pool: str, mixture: Path, tmp_path: Path):
    """To a language model whose routers decide by those."""
    base = base_model("llama")
    for name, model in {"base": base, "a": fine_tune(base, 1), "b": fine_tune(base, 2)}.items():
        save(model, tmp_path / name)
    PreTrainedTokenizerFast.from_pretrained(mixture).save_pretrained(tmp_path / "base")
    experts = {name: str(tmp_path / name) for name in "ab"}
    made = {"base": str(tmp_path / "base"), "experts": experts, "out": tmp_path / "mixture"}
    coterie.build(method="smile", parameters={"pool": pool, "gate_rank": 2}, **made)
    look_inside(str(tmp_path / "mixture"), tmp_path / "page.html", ["a=w5 w6 w7", "b=w8"])
    routing = next(f for f in _figures((tmp_path / "page.html").read_text()) if f["key"] == "where")
    assert routing["data"]


def test_the_page_says_what_the_build_measured(reports: dict[str, Path], mixture: Path):
    page = reports["bare"].read_text(encoding="utf-8")
    account = json.loads((mixture / "mixture.json").read_text())["report"]
    energy = next(each for each in _figures(page) if each["key"] == "energy")["data"][0]
    for path, row in zip(energy["y"], energy["z"], strict=True):
        built = next(layer for layer in account["layers"] if layer["path"] == path)
        for got, residual in zip(row, built["residuals"], strict=True):
            assert got == (None if residual is None else pytest.approx(1 - residual**2, rel=5e-3))
    assert f"{account['ratio']:.2f}×" in page
    assert {"energy", "norms", "spectrum", "overlap", "overlap_depth", "spaces"} == {f["key"] for f in _figures(page)}
    assert "<h2>The routing</h2>" not in page


def test_figures_are_what_plotly_takes(reports: dict[str, Path]):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    figures = _figures(reports["full"].read_text(encoding="utf-8"))
    assert len(figures) == 13
    for figure in figures:
        graph_objects.Figure(data=figure["data"], layout=figure["layout"])  # raises on what it does not know
        for view in figure["views"]:
            for key, values in view.items():
                assert len(values) == len(figure["data"])
                for trace, value in zip(figure["data"], values, strict=True):
                    graph_objects.Figure(data=[{**trace, key: value}])


def test_views_are_the_chosen_layers(reports: dict[str, Path]):
    data = _data(reports["full"].read_text(encoding="utf-8"))
    who = next(figure for figure in data["figures"] if figure["key"] == "who")
    assert len(who["views"]) == len(data["views"])
    single = {
        members[0]: view["z"][0] for members, view in zip(data["views"], who["views"], strict=True) if len(members) == 1
    }
    assert set(single) == set(range(len(data["paths"])))
    for members, view in zip(data["views"], who["views"], strict=True):
        for task, row in enumerate(view["z"][0]):
            for expert, value in enumerate(row):
                mean = sum(single[i][task][expert] for i in members) / len(members)
                assert value == pytest.approx(mean, abs=5e-3)


def test_texts(tmp_path: Path):
    long = tmp_path / "long.txt"
    long.write_text("\n".join(str(i) for i in range(1000)) + "\n\n")
    found = read_texts([str(long), f"a={long}", f"a={long}", "b=some text", "x = y", "more"], ["a", "b"])
    assert [(each.task, each.expert) for each in found] == [
        ("long", None), ("a", "a"), ("a", "a"), ("b", "b"), ("texts", None),
    ]  # fmt: skip
    assert len(found[0].lines) == ROWS
    assert found[0].lines[-1] > "990"  # spread over the file
    assert found[3].lines == ["some text"]
    assert found[4].lines == ["x = y", "more"]


def test_a_name_that_comes_again_is_another_task(mixture: Path, tmp_path: Path):
    batch = {"input_ids": torch.tensor([[1, 5, 6, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    look_inside(str(mixture), tmp_path / "page.html", ["tuned=w3 w4"], [("tuned", "tuned", [batch])] * 2)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in page for name in ("tuned", "tuned (2)", "tuned (3)"))


def _byte_level() -> Tokenizer:
    """GPT-2's kind."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "Ġa", "Ã©"])}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ã", "©")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def _word_piece() -> Tokenizer:
    """BERT's kind."""
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(["[UNK]", "é", "sing", "##ing"])}))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return made


def _sentence_piece() -> Tokenizer:
    """Llama-2's kind: what the vocabulary lacks is written in bytes."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "▁", "a", "▁a", "é", "<0x0A>"])}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(spaces)
    return made


@pytest.mark.parametrize(
    ("made", "text", "pieces"),
    [
        (_byte_level(), "é a\n\tâ", ["é", " a", "↵", "⇥", "Ã", "¢"]),
        (_word_piece(), "é singing", ["é", "sing", "##ing"]),
        (_sentence_piece(), "a é\n", [" a", " ", "é", "↵"]),
    ],
    ids=["byte-level", "WordPiece", "sentencepiece"],
)
def test_pieces_can_be_read(made: Tokenizer, text: str, pieces: list[str]):
    tokenizer, one = PreTrainedTokenizerFast(tokenizer_object=made), torch.ones(1, 1)
    ids = tokenizer(text)["input_ids"]
    example = Example(ids, torch.ones(1, len(ids), 1))
    task = TaskRouting("task", None, 1, len(ids), one, one[0], one[0], one[0], [example])
    record = RoutingRecord(["layer"], ["expert"], one.bool(), [task], one, one)
    (shown,) = _texts(record, tokenizer, Layers([LayerSpaces("layer", 1, 1, [0], 1, [[1.0]], None, 0.0)]))
    assert [token["piece"] for token in shown["tokens"]] == pieces


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("z={file}", "no expert 'z'.*known: a, b"),
        ("a={empty}", "holds no text"),
        ("{binary}", "cannot be read"),
        ("a=mistyped.txt", "no such file"),
        ("mistyped.txt", "--text mistyped.txt: no such file"),
        ("folder/mistyped.jsonl", "no such file"),
    ],
)
def test_bad_texts(tmp_path: Path, given: str, said: str):
    names = {"file": b"text", "empty": b"\n \n", "binary": b"\xff\xfe\x00"}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CoterieError, match=said):
        read_texts([given.format(**{name: tmp_path / name for name in names})], ["a", "b"])


def test_the_command(mixture: Path, tmp_path: Path, capsys, monkeypatch):
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["coterie", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().err

    page = tmp_path / "page.html"
    for _ in range(2):  # a page of ours is replaced
        code, said = run("inspect", str(mixture), "--html", str(page), "--text", "tuned=w3 w4")
        assert code == 0 and str(page) in said.replace("\n", "")
    assert "<h2>The routing</h2>" in page.read_text(encoding="utf-8")
    code, said = run("inspect", str(mixture), "--text", "w3 w4")
    assert (code, said.count("\n")) == (2, 1)
    assert "--html" in said
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_trained_mixture_shows_no_empty_columns(tmp_path: Path, capsys, monkeypatch):
    """Nothing was measured in a build that did not happen; its routers have weights of their own."""
    model = coterie.wrap(base_model("bert"), coterie.MixtureConfig(experts=3, parameters={"rank": 2}))
    model.save_pretrained(tmp_path / "made")
    routers = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    page = tmp_path / "page.html"
    for more in ([], ["--html", str(page)]):
        monkeypatch.setattr("sys.argv", ["coterie", "inspect", str(tmp_path / "made"), *more])
        with pytest.raises(SystemExit):
            main()
    said = capsys.readouterr().out
    assert f"{routers:,} in the routers" in said
    assert all(column not in said for column in ("gate rank", "residual", "source"))
    assert "energy kept" not in page.read_text()


def test_nothing_else_is_replaced(mixture: Path, tmp_path: Path):
    precious = tmp_path / "notes.html"
    precious.write_text("mine")
    for out in (precious, tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(CoterieError):
            look_inside(str(mixture), out)
    assert precious.read_text() == "mine"


def test_a_page_that_cannot_be_written_leaves_nothing(mixture: Path, tmp_path: Path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CoterieError, match="no space left"):
        look_inside(mixture, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_no_tokenizer_and_no_text_model(tmp_path: Path):
    base = base_model("vit")
    save(base, tmp_path / "base")
    save(fine_tune(base, 1), tmp_path / "a")
    experts = {"a": str(tmp_path / "a")}
    coterie.build(
        method="smile", base=str(tmp_path / "base"), experts=experts, parameters={"rank": 2}, out=tmp_path / "m"
    )
    with pytest.raises(CoterieError, match="has no tokenizer"):
        look_inside(str(tmp_path / "m"), tmp_path / "page.html", ["a text"])
    assert not (tmp_path / "page.html").exists()
    tasks = [("pictures", "a", [inputs("vit")])]
    look_inside(str(tmp_path / "m"), tmp_path / "page.html", tasks=tasks)  # one expert: nothing to decide or compare
    keys = {figure["key"] for figure in _figures((tmp_path / "page.html").read_text(encoding="utf-8"))}
    assert {"who", "where"} <= keys
    assert not {"overlap", "margin", "committee", "accuracy"} & keys


def test_hundreds_of_layers_stay_readable(tmp_path: Path):
    """A model of 280 mixture layers: each axis of layers names their seven kinds, and the page stays small."""
    base = base_model("llama", num_hidden_layers=40)
    experts = {f"e{seed}": str(save(fine_tune(base, seed), tmp_path / f"e{seed}")) for seed in (1, 2)}
    coterie.build(
        method="smile", base=str(save(base, tmp_path / "base")), experts=experts, out=tmp_path / "mixture",
        parameters={"rank": 4, "gate_rank": 2},
    )  # fmt: skip
    look_inside(str(tmp_path / "mixture"), tmp_path / "page.html", tasks=[("task", "e1", [inputs("llama", batch=2)])])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(_data(page)["paths"]) == 280 and len(_data(page)["kinds"]) == 7
    for figure in _figures(page):
        for name, axis in figure["layout"].items():
            if "axis" in name and "tickvals" in axis:
                assert len(axis["tickvals"]) <= 7, (figure["key"], name)
    own = len(json.dumps(_data(page)))
    assert own < 2_000_000


@pytest.mark.parametrize("which", ["bare", "full"])
def test_every_figure_is_drawn(browser: Browser, reports: dict[str, Path], which: str):
    browser.open(reports[which])
    assert browser.complaints() == []
    keys = [figure["key"] for figure in _figures(reports[which].read_text(encoding="utf-8"))]
    marks = "(div) => div.querySelectorAll('.heatmaplayer image, .scatterlayer .js-line, .barlayer .point').length"
    drawn = browser.run(
        f"Object.fromEntries([...document.querySelectorAll('.plot')].map((d) => [d.dataset.key, ({marks})(d)]))"
    )
    assert list(drawn) == keys
    assert all(drawn.values()), drawn
    sentences = browser.run("[...document.querySelectorAll('figure .seen')].map((p) => p.innerText)")
    assert len(sentences) == len(keys)
    assert all(re.search(r"\d", sentence) for sentence in sentences), sentences


def test_marks_of_a_logarithmic_axis_are_values(browser: Browser, reports: dict[str, Path]):
    """No bare digits of a decade; some, and few, over one decade as over five."""
    browser.open(reports["bare"])
    for low, high in ((-1.3, -0.1), (-2, 0), (-4, 1)):
        browser.run(f"Plotly.relayout(plots.get('spectrum'), {{'yaxis.range': [{low}, {high}]}}).then(() => 0)")
        marks = browser.run("[...plots.get('spectrum').querySelectorAll('.ytick text')].map((t) => +t.textContent)")
        assert 2 <= len(set(marks)) == len(marks) <= 10
        assert 10**low <= min(marks) and max(marks) <= 10**high


def test_what_is_chosen_is_shown(browser: Browser, reports: dict[str, Path]):
    browser.open(reports["full"])
    data = _data(reports["full"].read_text(encoding="utf-8"))
    last = len(data["views"]) - 1
    (member,) = data["views"][last]
    browser.run(f"layer.value = {last}, layer.dispatchEvent(new Event('change'))")
    who = next(figure for figure in data["figures"] if figure["key"] == "who")
    assert browser.run("plots.get('who').data[0].z") == who["views"][last]["z"][0]
    assert browser.run("document.querySelector('.shown').innerText") == data["paths"][member]
    colours = browser.run("[...document.querySelectorAll('.token')].map((t) => t.dataset.expert)")
    expected = []
    for text in data["texts"]:
        for token in text["tokens"]:
            gates = token["gates"][member]
            expected.append("" if gates is None else data["experts"][gates if isinstance(gates, int) else gates[0]])
    assert colours == expected
    where = next(figure for figure in data["figures"] if figure["key"] == "where")
    browser.run(
        "{const c = document.querySelector('#figure-where select'); c.value = 1; c.dispatchEvent(new Event('change'))}"
    )
    assert browser.run("plots.get('where').data[0].z") == where["views"][1]["z"][0]
    browser.run("plots.get('where').emit('plotly_click', {points: [{y: report.paths[0]}]})")
    assert browser.run("report.views[layer.value]") == [0]
    assert browser.complaints() == []


def test_a_token_tells_its_gates(browser: Browser, reports: dict[str, Path]):
    browser.open(reports["full"])
    assert browser.run("document.getElementById('tip').hidden")
    browser.run("document.querySelector('.token').dispatchEvent(new PointerEvent('pointerenter'))")
    said = browser.run("document.getElementById('tip').innerText")
    assert "%" in said
    kinds = browser.run("document.querySelectorAll('#tip .strip').length")
    assert kinds == len(_data(reports["full"].read_text(encoding="utf-8"))["kinds"])
    browser.run("document.querySelector('.token').dispatchEvent(new PointerEvent('pointerleave'))")
    assert browser.run("document.getElementById('tip').hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_scrolling_sideways(browser: Browser, reports: dict[str, Path], scheme: str):
    browser.open(reports["full"], width=360, height=740, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    right = browser.run(
        "Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.getBoundingClientRect().right))"
    )
    assert right <= 360
    # Every heat map has its scale, with marks, above its cells; every link of the bar is seen.
    scales = browser.run(
        """report.figures.filter((figure) => figure.data[0].type === 'heatmap').map(({ key }) => {
            const div = plots.get(key), marks = [...div.querySelectorAll('.colorbar .cbaxis text')];
            const cells = div.querySelector('.heatmaplayer').getBoundingClientRect();
            return marks.length > 1 && marks.every((mark) => mark.getBoundingClientRect().bottom <= cells.top + 1);
        })"""
    )
    assert len(scales) > 5 and all(scales)
    assert browser.run("[...document.querySelectorAll('.links a')].every((link) => link.getClientRects().length)")
    assert browser.complaints() == []


def test_it_prints(browser: Browser, reports: dict[str, Path]):
    browser.open(reports["full"])
    browser.send("Page.printToPDF")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert set(browser.run("[...plots.values()].map((div) => div._fullLayout.width)")) == {680}
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert 680 not in browser.run("[...plots.values()].map((div) => div._fullLayout.width)")
    assert browser.complaints() == []
