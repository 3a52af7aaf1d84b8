"""Every command and every block of code in the documentation runs, as it stands there; what sentences name is there.

A page's blocks run in order, in one directory where the names that the pages use lead to tiny models. Commands of
coterie run in this process, the others are checked for what they name. Python blocks of a page share one namespace. A
YAML block with a title is a file of that name.
"""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import sys
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from typer.main import get_command

from coterie.cli import app
from coterie.options import cache_directory
from zoo import base_model, fine_tune, make_adapter, save

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What would take hours or another machine; each is run in a smaller form here, or by the test that is named.
SHORTENED = {
    r"^coterie compare (.*)$": r"coterie compare \1 --tiny",
    r"^coterie demo.*$": "",  # tests/evaluation
    r"^ray start.*$": "",  # tests/test_build_ray.py
    r"^ACCELERATE_USE_CPU=true .*$": "",  # tests/training/test_trainer.py
    r"--engine ray": "--engine local",  # tests/test_build_ray.py
}


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: info string and content."""
    return [(t.info.strip(), t.content) for t in MarkdownIt().parse(page.read_text()) if t.type == "fence"]


def commands(content: str) -> list[str]:
    """The commands of a shell block, continued lines joined, comments gone."""
    lines = re.sub(r"\\\n\s*", " ", content).splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*$", "", each).strip() for each in lines) if line]


@pytest.fixture(scope="session")
def drawer(tmp_path_factory):
    """Tiny models under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    base = base_model("bert", hidden_size=48)
    save(base, folder / "bert-base-uncased")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "a", "film", "you", "are"]
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "bert-base-uncased")
    for seed, name in enumerate(("you/bert-sst2", "you/bert-emotion"), start=1):
        save(fine_tune(base, seed, everything=True), folder / name)
        tokenizer.save_pretrained(folder / name)
    make_adapter(folder / "bert-base-uncased", folder / "adapters/toxicity", 3, arch="bert")
    make_adapter(folder / "bert-base-uncased", folder / "adapters/irony", 4, arch="bert")
    (folder / "old-checkpoint").mkdir()
    torch.save(base.state_dict(), folder / "old-checkpoint/pytorch_model.bin")
    base.config.save_pretrained(folder / "old-checkpoint")
    rows = [{"text": "what a film", "label": i % 3} for i in range(12)]
    for name in ("sentiment", "sentiment-validation"):
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    names = ("calm", "glad", "sad")
    lines = [json.dumps({"text": r["text"], "label": names[r["label"]]}) for r in rows]
    for name in ("emotion", "emotion-validation"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name in ("reviews", "comments"):
        (folder / f"{name}.txt").write_text("what a film\nyou are\n")
    save(base_model("llama"), folder / "Qwen/Qwen3-0.6B")
    tokenizer.__class__(str(folder / "vocab.txt"), eos_token="[SEP]").save_pretrained(folder / "Qwen/Qwen3-0.6B")
    recipe = {"method": "smile", "base": "bert-base-uncased", "parameters": {"rank": 4, "gate_rank": 2}}
    recipe["experts"] = {"sentiment": "you/bert-sst2", "toxicity": "adapters/toxicity"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """What the pages' commands keep, and find again; nothing of another day's."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(drawer, cache, tmp_path, monkeypatch):
    """A working directory of its own that holds the drawer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for entry in drawer.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: Path, content: str) -> None:
    """Put a page's file in the place of the drawer's."""
    file.unlink(missing_ok=True)
    file.write_text(content)


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern, short in SHORTENED.items():
        line = re.sub(pattern, short, line)
    line = re.sub(r"\bDIR\b", lambda _: tempfile.mkdtemp(dir=".") + "/new", line)  # a new one each time
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words:
        return
    program = words[0]
    if program == "coterie":
        from coterie.cli import main

        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, line
    elif program in ("make", "python"):
        check_names(line)
    elif program == "pip":
        check_extras(line)
    else:
        raise AssertionError(f"nobody knows how to check {line!r}")


def check_extras(line: str) -> None:
    """What is installed by name is this project or one of its extras."""
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"coterie\[([a-z-]+)\]", line):
        assert re.search(rf"^{extra} = \[", project, re.M), line


def check_names(line: str) -> None:
    """What a command names is there: target, script, module or subcommand, its options, and the part after `--only`.

    Words in capitals and ellipses stand for anything.
    """
    program, *words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+|\.\.\.|…", word)]
    if words[:2] == ["-m", "coterie"]:
        program, words = "coterie", words[2:]
    if program == "make":
        known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {word for word in words if "=" not in word} <= known, line
        return
    if program == "coterie":
        command = get_command(app)
        while words and words[0][0] != "-" and (commands := getattr(command, "commands", None)):
            assert words[0] in commands, line
            command = commands[words.pop(0)]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    else:
        module = find_spec(words[1]) if words[0] == "-m" else None
        script = Path(module.origin or "") if module else ROOT / words[0]
        assert script.is_file() and "__main__" in script.read_text(), line
        words = words[2:] if module else words[1:]
        taken = options(script)
        known = set(taken)
        for option, part in pairwise(words):
            assert option != "--only" or taken.get(option) is None or part in taken[option], line
    assert {word.partition("=")[0] for word in words if word[0] == "-"} <= known | {"--help"}, line


def options(script: Path) -> dict[str, set[str] | None]:
    """The options that a script adds to its parser, and what can be chosen: None is anything."""
    tree = ast.parse(script.read_text())
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    found: dict[str, set[str] | None] = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".add_argument"):
            given = [node for each in call.keywords if each.arg == "choices" for node in ast.walk(each.value)]
            given += [key for node in given for key in getattr(named.get(getattr(node, "id", "")), "keys", [])]
            choices = {node.value for node in given if isinstance(node, ast.Constant)}
            found |= {ast.literal_eval(name): choices or None for name in call.args}
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_commands_in_sentences_name_what_is_there(page):
    for paragraph in MarkdownIt().parse(page.read_text()):
        for code in paragraph.children or []:
            line = " ".join(code.content.split())
            if code.type == "code_inline" and re.match(r"(python (benchmarks/|-m coterie)|make |coterie )", line):
                check_names(line)


@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "coterie nothing",
        "coterie library nothing",
        "coterie build --nothing",
        "python -m coterie build --nothing=1",
        "python -m coterie.nothing",
        "python -m coterie.errors",
        "python benchmarks/nothing.py",
        "python benchmarks/cells.py",
        "python benchmarks/sweeps.py --nothing",
        "python benchmarks/sweeps.py --only nothing",
        "python benchmarks/suites.py --only nothing",
    ],
)
def test_what_is_not_there_is_found(line):
    with pytest.raises(AssertionError):
        check_names(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page, here, monkeypatch):
    namespace: dict[str, object] = {}
    for info, content in blocks(page):
        language, _, rest = info.partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        if language == "yaml":
            yaml.safe_load(content)
            if title:
                write(here / title[1], content)
        elif language == "bash":
            for line in commands(content):
                run_command(line, monkeypatch)
        elif language == "python":
            script = here / "block.py"
            script.write_text(content)
            namespace |= runpy.run_path(str(script), namespace)
        elif title:
            write(here / title[1], content)
        else:
            assert not language, f"a block in {language!r} that nobody runs"


def test_nothing_is_served_from_an_earlier_day(here, tmp_path_factory):
    assert cache_directory().is_relative_to(tmp_path_factory.getbasetemp())


def test_no_code_hides_in_indented_blocks():
    """An indented block would be shown as code and never run."""
    for page in PAGES:
        for token in MarkdownIt().parse(page.read_text()):
            if token.type == "code_block":
                assert not re.search(r"^\s*(coterie|python|pip|import) ", token.content, re.M), token.content


def test_shell_lines_are_understood():
    assert commands("a --b \\\n    c  # why\n\n# only a comment\nd") == ["a --b  c", "d"]
    with pytest.raises(AssertionError, match="nobody knows"):
        run_command("rm -rf x", pytest.MonkeyPatch())


def test_the_site_builds_strictly(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build.build(config)
    assert (tmp_path / "site/methods/index.html").read_text().count("smile") > 1
    assert not os.listdir(ROOT).count("site")
