"""The page of a comparison, as a browser shows it on a wide and on a narrow screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from browser import Browser
from coterie.evaluation import tables
from coterie.evaluation.comparer import ORACLE, Comparison, Result
from coterie.evaluation.metrics import Interval

ONE, NONE = Interval(1.0, 1.0, 1.0), Interval(float("nan"), float("nan"), float("nan"))
CHOSEN = {"setting": "default and best on validation", "parameters": {"rank": 32, "gate_rank": 16, "top_k": 1}}
GAP = Interval(0.93, -1.5, 1.0)
SMILE = {"normalised": Interval(0.96, 0.9, 1.003), "recovered_gap": GAP, "skill": [0.9, 0.8], "ratio": 4.99, **CHOSEN}
RESULTS = [
    Result("base", skill=[0.4, 0.3], normalised=Interval(0.4, 0.0, 0.6), recovered_gap=Interval(-0.0, -0.0, 0.0)),
    Result(ORACLE, task="known", skill=[0.9, 0.9], normalised=ONE, recovered_gap=ONE, ratio=2.0),
    *(Result("smile", others="average", task=task, **SMILE) for task in ("not known", "known")),
    Result(
        "a_method_whose_name_is_longer_than_any_narrow_screen_is_wide",
        skill=[0.0, 0.0],
        normalised=NONE,
        recovered_gap=NONE,
    ),
    Result("regmean", note='failed: a matrix `<b>` & "another" cannot be inverted, which takes some words to tell'),
]


def comparison(results: list[Result]) -> Comparison:
    return Comparison(
        "full fine-tunes", 0, ["first", "second"], ["accuracy"] * 2, [40, 40], results,
        {"first": [0.9, 0.1], "second": [0.2, 0.9]}, {"expert": [0.9, 0.9]}, {}, None, ["one thing to know"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tables.write(folder := tmp_path_factory.mktemp("page"), "small", [comparison(RESULTS)])
    return folder / "report.html"


@pytest.mark.parametrize("width", [1200, 360])
def test_every_result_can_be_read(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width, drawn="document.readyState == 'complete'")
    assert browser.complaints() == []
    rows = browser.run("[...document.querySelectorAll('.result')].map((row) => row.innerText)")
    assert len(rows) == len(RESULTS)
    for row, result in zip(rows, RESULTS, strict=True):
        assert f"{tables.name(result)} ({result.ratio:.2f}x)" in row
        assert (result.note.replace("`", "") or tables.span(result.normalised)) in row
    # What is drawn stands where the axis says: the shares are those of the expert, at 100%.
    lines = (
        "Object.fromEntries([...document.querySelectorAll('.axis:first-child span')].map((s) => [s.innerText, mid(s)]))"
    )
    middle = "const mid = (e) => { const b = e.getBoundingClientRect(); return (b.left + b.right) / 2 };"
    axis = browser.run(f"{{{middle} {lines}}}")
    dots = browser.run(f"{{{middle} [...document.querySelectorAll('.result circle')].map(mid)}}")
    assert list(axis) == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert dots[:2] == pytest.approx([axis["40%"], axis["100%"]], abs=1)
    colours = browser.run("[...document.querySelectorAll('.result circle')].map((c) => getComputedStyle(c).fill)")
    assert colours == ["rgb(9, 105, 218)", "rgb(191, 135, 0)"] * 2
    assert browser.run("document.querySelectorAll('.result g line').length") == 4  # whiskers
    # No text is cut, small, or outside of the screen, but tables scroll in boxes of their own.
    cut = browser.run(
        """[...document.querySelectorAll('figure *, h1, h2, p, li')].filter((e) => {
            const box = e.getBoundingClientRect();
            return box.left < 0 || box.right > document.documentElement.clientWidth
                || (e instanceof HTMLElement && !e.closest('.axis')
                    && e.clientWidth && e.scrollWidth > e.clientWidth + 1);
        }).map((e) => e.outerHTML)"""
    )
    assert cut == []
    sizes = browser.run("[...document.querySelectorAll('body *')].map((e) => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 11
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # Texts of one row, and of the axis, do not lie on each other.
    over = browser.run(
        """[...document.querySelectorAll('.result, .axis .track')].filter((row) => {
            const parts = [...row.children].map((e) => [...e.getClientRects()]);
            return parts.some((one, i) => parts.slice(i + 1).some((other) => one.some((a) => other.some((b) =>
                a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1))));
        }).map((e) => e.outerHTML)"""
    )
    assert over == []


@pytest.mark.parametrize(("width", "seen"), [(1920, 9), (1280, 9), (800, 5), (400, 3)])
def test_the_scores_of_the_first_table_need_no_scrolling(browser: Browser, page: Path, width: int, seen: int) -> None:
    """And what a narrow screen has no columns for stands under the method."""
    browser.open(page, width=width, drawn="document.readyState == 'complete'")
    inside = browser.run(
        """(() => {
            const shown = [...document.querySelector('tr').children].filter((head) => head.clientWidth);
            const right = document.querySelector('.scroll').getBoundingClientRect().right;
            return shown.filter((head) => head.getBoundingClientRect().right <= right).map((head) => head.innerText);
        })()"""
    )
    assert len(inside) == seen
    assert {"method", "normalised", "recovered gap"} <= set(inside)
    smile = browser.run("document.querySelectorAll('tbody tr')[2].innerText")
    for said in (CHOSEN["setting"], tables.parameters(CHOSEN["parameters"]), "average", "not known", "96.0"):
        assert smile.count(said) == 1
    codes = browser.run("[...document.querySelectorAll('code')].map((code) => code.innerText)")
    assert "<b>" in codes and "`" not in browser.run("document.body.innerText")
    # Of every other table, too, the first number is seen.
    first = browser.run(
        "[...document.querySelectorAll('tbody .n:nth-child(2)')].map((cell) => cell.getBoundingClientRect().right)"
    )
    assert len(first) > 8 and max(first) <= width


def test_an_axis_that_goes_far_has_few_marks(browser: Browser, tmp_path: Path) -> None:
    far = Result("far", skill=[0.9, 0.9], normalised=Interval(1.0, 0.2, 34.0), recovered_gap=ONE)
    (tmp_path / "far.html").write_text(tables.page("far", [comparison([far])], []))
    browser.open(tmp_path / "far.html", width=360, drawn="document.readyState == 'complete'")
    marks = browser.run("[...document.querySelectorAll('.axis:first-child span')].map((s) => s.innerText)")
    assert marks == ["0%", "1000%", "2000%", "3000%"]


def test_the_terminal_says_no_less(page: Path) -> None:
    sheet = tables.brief(comparison(RESULTS))
    assert [row[0] for row in sheet.rows[:4]] == [
        "base", "expert of the task, task known", "smile, default = best, average",
        "smile, default = best, average, task known",
    ]  # fmt: skip
    assert sheet.rows[0][3] == "0.0 [0.0, 0.0]"
    assert RESULTS[-1].note in sheet.caption and "Nothing can be normalised" not in sheet.caption


def test_experts_without_skill_are_named() -> None:
    bare = comparison([RESULTS[0]])
    bare.ladder["expert"][1] = 0.0
    assert "the expert of second has no skill" in next(tables.sheets(bare)).caption


def test_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write(tmp_path, "small", [comparison(RESULTS)])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(before) == {"results.json", "results.csv", "results.md", "report.html"}

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        tables.write(tmp_path, "other", [comparison(RESULTS[:2])])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
