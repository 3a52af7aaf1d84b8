"""The suites' benchmark, as small as it can be: gates and methods are measured and reach the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent


@pytest.mark.slow
def test_gates_and_methods_reach_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT.parent / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "evaluation"))
    for package in ("peft", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    import small

    import suites
    import suites_page

    suite = small.encoder_suite(tmp_path / "suite")
    tasks = suite.tasks()
    suite = replace(suite, tasks=lambda test: tuple(replace(task, test=task.test.head(test)) for task in tasks))
    part = suites.Part(
        "small", "full", ("average", "smile"), ("smile", suites.VOTED, "average_activation"), rows=16, validation_rows=8
    )
    parts = {"one": part, "three": replace(part, seeds=2), "ungated": replace(part, gated=False)}
    monkeypatch.setattr(suites, "find_suite", lambda name: suite)
    monkeypatch.setattr(suites, "PARTS", parts)
    monkeypatch.setattr(suites_page, "PARTS", parts)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    given = ["suites.py", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "suites.json")]
    monkeypatch.setattr(sys, "argv", given)
    suites.main()
    result = json.loads((tmp_path / "suites.json").read_text())
    assert set(result) == set(parts) and "gates" not in result["ungated"]
    assert len(result["three"]["comparisons"]) == 2
    assert {each["method"] for each in result["one"]["summary"]} >= {"base", "average", "smile"}

    for name in ("smile", "average_activation"):
        result["one"]["routers"][name] = {"stale": True}
    (tmp_path / "suites.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", [*given, "--only", "one", "--routers", "smile"])
    suites.main()
    result = json.loads((tmp_path / "suites.json").read_text())
    assert result["one"]["routers"].pop("average_activation") == {"stale": True}
    assert result["one"]["routers"]["smile"]["recovered_gap"] and result["one"]["gates"] and set(result) == set(parts)
    result["one"]["routers"]["average_activation"] = result["three"]["routers"]["average_activation"]
    (tmp_path / "suites.json").write_text(json.dumps(result))

    page = tmp_path / "suites.md"
    page.write_text(
        "above\n" + "".join(f"<!-- {name} -->\nstale\n<!-- end -->\n" for name in ("gates", "parts")) + "last"
    )
    (tmp_path / "choosing.md").write_text("<!-- suites -->\nstale\n<!-- end -->\n")
    suites_page.render(tmp_path, page)
    for name, row in zip(parts, (tmp_path / "choosing.md").read_text().splitlines()[4:7], strict=True):
        cells = row.strip("| ").split(" | ")
        assert cells[0] == name and cells.count("–") == 6 and cells[6] != "–"
        found = result[name]["routers"]["average_activation"]
        assert cells[8] == f"{100 * found['recovered_gap']['value']:.1f}" and found["parameters"]["rank"] == 32
    text = page.read_text()
    assert "stale" not in text and text.startswith("above") and text.endswith("last")
    assert all(f"## {name}" in text for name in parts)
    assert text.count("| one |") == 1 and "| ungated |" not in text  # the gates' table
    published = {row.split(" | ")[0]: row for row in suites_page.beside_published(result["three"]).splitlines()}
    assert "66.5 | 43.5" in published["| average"] and "88.2 | 95.0" in published["| smile"]
    assert " ± " in text and (tmp_path / "suites" / "methods.svg").exists()
