"""The command line: a thin layer over the public functions."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .building import commands
from .errors import CoterieError
from .evaluation.commands import compare, demo, evaluate
from .library.commands import app as library
from .options import Cache, Force, Json, Token, cache_directory, check_device, number, pairs, show, terminal
from .training.command import train

app = typer.Typer(
    help="Turn a base model and its fine-tuned experts into one mixture-of-experts model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(library, name="library")
app.command()(train)


# Of each command that takes a recipe: the options without which it needs one, and its method by default.
_NEEDED = {
    "build": ({"base": "--base", "experts": "--expert NAME=SOURCE"}, "smile"),
    "merge": ({"experts": "--expert NAME=SOURCE"}, "task_arithmetic"),
}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"coterie {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def build(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file; the options below override it or stand alone.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The directory to make.")] = None,
    method: Annotated[
        str | None, typer.Option(help="The method; `coterie methods` lists them. Default: smile.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Directory or Hub id (ID@REVISION) of the base model.")] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="NAME=SOURCE of an expert: a fine-tune or a PEFT adapter. Repeat it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of a method parameter. Repeat it.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob on module paths that may become mixture layers.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob on module paths that stay dense.")] = None,
    others: Annotated[
        str | None, typer.Option(help="What everything else follows: base, average or per_expert.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="transformers class of the mixture.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the base's.")] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="base: keep the base's rows where vocabularies differ.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where deltas are factorised: cpu, cuda, ...")] = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(help="Layers at a time; memory grows with it, the output is the same. Default: the cores."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the layers as tasks of a Ray cluster.")] = "local",
    max_shard_gb: Annotated[
        float, typer.Option("--max-shard-gb", min=1e-6, help="Size of a shard, and of what `--resume` goes on after.")
    ] = 5.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on after the last finished shard of a build that was interrupted, if it left any. "
            "Without this, what it left is removed.",
        ),
    ] = False,
    light: Annotated[bool, typer.Option("--light", help="Write only what is not the base's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")] = False,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Build a mixture: `coterie build RECIPE -o DIR`, or `coterie build --base B --expert NAME=SOURCE ... -o DIR`."""
    from .building.build import build as run
    from .building.build import plan
    from .recipe import read_recipe

    keys: dict[str, Any] = {
        "method": method, "base": base, "others": others, "architecture": architecture, "dtype": dtype,
        "vocabulary": vocabulary, "experts": pairs(expert, "--expert") if expert else None,
        "parameters": {k: number(v) for k, v in pairs(set_, "--set").items()} if set_ else None,
    }  # fmt: skip
    given = {k: v for k, v in keys.items() if v is not None}
    if include or exclude:
        given["modules"] = {"include": include or ["*"], "exclude": exclude or []}
    whole = _overridden(recipe, given, read_recipe, "build")
    check_device(device)
    if dry_run:
        show(plan(whole, token, jobs=jobs, device=device), as_json)
        return
    out = _require_free(out, force, resume, "build")
    console = None if as_json else terminal(stderr=True)
    how: dict[str, Any] = {"device": device, "jobs": jobs, "engine": engine, "resume": resume}
    how["max_shard_bytes"] = int(max_shard_gb * 1e9)
    report = run(whole, out, force=force, light=light, token=token, console=console, **how)
    show(report, as_json)


@app.command()
def merge(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file; the options below override it or stand alone.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The directory to make.")] = None,
    mergekit: Annotated[Path | None, typer.Option(help="Instead of a recipe: a configuration of mergekit's.")] = None,
    method: Annotated[
        str | None, typer.Option(help="The method; `coterie methods` lists them. Default: task_arithmetic.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Directory or Hub id (ID@REVISION) of the base model; averages need none.")
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="NAME=SOURCE of an expert: a fine-tune or a PEFT adapter. Repeat it.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of a method parameter. Repeat it.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Glob on paths of linear layers, for methods that merge matrices.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Glob on paths of linear layers that they leave out.")
    ] = None,
    others: Annotated[
        str | None, typer.Option(help="What other tensors than linear layers' follow: average, base or a method.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="The expert whose task head the result takes.")] = None,
    norm_budget: Annotated[
        float | None, typer.Option(help="Most that a tensor may move, as a multiple of the experts' mean delta.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of methods that draw random numbers. Default: 0.")] = None,
    architecture: Annotated[str | None, typer.Option(help="transformers class of the result.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the base's.")] = None,
    vocabulary: Annotated[
        str | None, typer.Option(help="Where tokenizers differ: error, the base's tokens, or the union of all.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where merges of whole matrices work: cpu, cuda, ...")] = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(help="Tensors at a time; memory grows with it, the output is the same. Default: the cores."),
    ] = None,
    report: Annotated[
        str, typer.Option(help="short, or full: with the overlap of the experts' subspaces, which takes its time.")
    ] = "short",
    max_shard_gb: Annotated[
        float, typer.Option("--max-shard-gb", min=1e-6, help="Size of a shard, and of what `--resume` goes on after.")
    ] = 5.0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on after the last finished shard of a merge that was interrupted, if any."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")] = False,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Merge experts into a dense model: `coterie merge RECIPE -o DIR`, or with `--base B --expert NAME=SOURCE ...`."""
    from .merging.merge import merge as run
    from .merging.merge import plan
    from .recipe import read_merge_recipe

    keys: dict[str, Any] = {
        "method": method, "base": base, "others": others, "head": head, "norm_budget": norm_budget, "seed": seed,
        "architecture": architecture, "dtype": dtype, "vocabulary": vocabulary,
        "experts": pairs(expert, "--expert") if expert else None,
        "parameters": {k: number(v) for k, v in pairs(set_, "--set").items()} if set_ else None,
    }  # fmt: skip
    given = {k: v for k, v in keys.items() if v is not None}
    if include or exclude:
        given["modules"] = {"include": include or ["*"], "exclude": exclude or []}
    whole: Any = recipe
    if mergekit is not None:
        from .merging.mergekit import read_mergekit

        if recipe is not None:
            raise CoterieError("a recipe is given beside it", "--mergekit", "give one of them")
        whole, notes = read_mergekit(mergekit, token)
        for note in notes:
            terminal(stderr=True).print(f"! {note}", style="yellow", markup=False)
    whole = _overridden(whole, given, read_merge_recipe, "merge")
    if device != "cpu":
        check_device(device)
    if dry_run:
        show(plan(whole, token=token, jobs=jobs, device=device), as_json)
        return
    out = _require_free(out, force, resume, "merge")
    how: dict[str, Any] = {"device": device, "jobs": jobs, "resume": resume, "report": report, "token": token}
    how["max_shard_bytes"] = int(max_shard_gb * 1e9)
    show(run(whole, out, force=force, console=None if as_json else terminal(stderr=True), **how), as_json)


@app.command()
def statistics(
    model: Annotated[str, typer.Argument(help="The expert: a full model's directory or Hub id (ID@REVISION).")],
    data: Annotated[Path, typer.Option("--data", help="Texts of its task, .jsonl or .csv; no labels are needed.")],
    kind: Annotated[str, typer.Option("--kind", help="gram (for regmean) or fisher.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The safetensors file to make.")],
    text: Annotated[str, typer.Option(help="The column of the texts.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many texts, from the first. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text, at most.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    token: Token = None,
) -> None:
    """Gather what the merges fisher and regmean need of an expert, from texts of its task."""
    from transformers.utils import logging

    from .merging.statistics import gather

    logging.disable_progress_bar()
    if kind not in ("fisher", "gram"):
        raise CoterieError(f"kind is {kind!r}", "--kind", "known: fisher, gram")
    check_device(device)
    found = gather(
        model, data, "gram" if kind == "gram" else "fisher", out, text=text, limit=limit, batch_size=batch_size,
        max_length=max_length, device=device, force=force, token=token,
    )  # fmt: skip
    terminal().print(f"{found.summary()}: {out}", markup=False)


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="A mixture directory or Hub id.")],
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page of figures instead: one file that needs no network.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="With --html, route these texts: FILE (a text on each line), EXPERT=FILE where the expert made for "
            "them is known, or a text itself. Repeat it."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="With --html, route a suite's test rows: its name, or your own YAML.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Test rows of each task of the suite.")] = 256,
    cache: Cache = None,
    base: Annotated[str | None, typer.Option(help="Of a light mixture: where its base is, if it has moved.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what is in a mixture: experts, layers, ranks, sizes, provenance; as a page, also its weights and routing."""
    from .report.inspect import inspect as look

    if html is None:
        if text or suite:
            option = "--text" if text else "--suite"
            raise CoterieError(f"{option} needs a page to show its routing on", "inspect", "add --html report.html")
        show(look(directory, token), as_json)
        return
    from transformers.utils import logging

    from .mixture.load import read_spec
    from .mixture.spec import MixtureSpec
    from .report.look import look_inside
    from .sources.locate import locate

    if (text or suite) and MixtureSpec.from_dict(read_spec(locate(directory, token))).routing.score == "tag":
        raise CoterieError(
            "it routes nothing by itself: its expert is named (`model.coterie.route`)",
            directory,
            f"leave out {'--text' if text else '--suite'}",
        )
    logging.disable_progress_bar()
    console = terminal(stderr=True)
    with console.status("looking inside") as status:
        tasks: Any = []
        if suite:
            from .evaluation.evaluate import routed_tasks

            config = locate(directory, token).json("config.json") or {}
            tasks = routed_tasks(suite, config, look(directory, token).experts, rows, cache or cache_directory())
        look_inside(
            directory, html, text or [], tasks, token=token, base=base,
            tell=lambda what: status.update(f"looking at {what}"),
        )  # fmt: skip
    console.print(f"report: {html}", markup=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this one only.")] = None, as_json: Json = False
) -> None:
    """List the methods, their parameters and where they were published: of what is built, trained, and merged."""
    from .merging.registry import known as merges
    from .methods import known as mixtures
    from .recipe import nearest

    kinds: dict[str, list[Any]] = {
        "mixture": [method for method in mixtures() if not method.trained],
        "trained mixture": [method for method in mixtures() if method.trained],
        "merge": merges(),
    }
    commands = {"mixture": "build", "trained mixture": "train", "merge": "merge"}
    if name is not None:
        names = [each.name for found in kinds.values() for each in found]
        if name not in names:
            raise CoterieError(f"unknown method {name!r}", "methods", nearest(name, names))
        kinds = {kind: found for kind, all_ in kinds.items() if (found := [m for m in all_ if m.name == name])}
    if as_json:
        listing = [
            {"name": m.name, "kind": kind, "cite": m.cite, "summary": m.summary, "parameters": m.describe()}
            for kind, found in kinds.items()
            for m in found
        ]
        typer.echo(json.dumps(listing, indent=1))
        return
    from rich.table import Table

    for kind, found in kinds.items():
        table = Table(box=None, title=f"{kind}s: `coterie {commands[kind]}`", title_justify="left")
        for column in ("method", "what it does", "parameter", "default", "type", "meaning"):
            table.add_column(column, overflow="fold")
        for each in found:
            first = (each.name, f"{each.summary} ({each.cite})")
            for p in each.describe() or [dict.fromkeys(("name", "default", "type", "meaning"), "")]:
                table.add_row(*first, p["name"], str(p["default"]), p["type"], p["meaning"])
                first = ("", "")
        terminal().print(table)


app.command()(commands.extract)
app.command("extract-expert")(commands.extract_expert)
for command in (commands.add, commands.remove, commands.compress, commands.convert, compare):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(demo)


def _overridden(recipe: Any, given: dict[str, Any], read: Any, command: str) -> Any:
    """A recipe with the options that were given, or one of the options alone."""
    if recipe is None:
        required, method = _NEEDED[command]
        missing = [option for key, option in required.items() if key not in given]
        if missing:
            raise CoterieError(
                f"{missing[0].split()[0]} is missing", command, f"give a recipe, or {' and '.join(required.values())}"
            )
        return read({"method": method, **given})
    merged = read(recipe).model_dump(exclude_unset=True)
    if "experts" in given:  # another source, and all else that the recipe says of the expert
        known = merged["experts"]
        given["experts"] = {n: {**known.get(n, {}), "source": source} for n, source in given["experts"].items()}
    for key in ("parameters", "experts"):
        if key in given:
            given[key] = {**merged.get(key, {}), **given[key]}
    return read({**merged, **given})


def _require_free(out: Path | None, force: bool, resume: bool, command: str) -> Path:
    """The output directory, where nothing is in the way."""
    if out is None:
        raise CoterieError("no output directory given", command, "give -o DIR")
    if os.path.lexists(out) and not force:
        if resume and any((out / file).is_file() for file in ("mixture.json", "merge.json")):
            raise CoterieError("is finished: nothing of it is left to resume", str(out), "replace it with --force")
        raise CoterieError("exists already", str(out), "choose another directory, or replace it with --force")
    return out


STOPPED, TERMINATED = 130, 143  # by Ctrl-C and by SIGTERM, as typer and shells say it


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def end(*_: object) -> None:
        sys.exit(TERMINATED)  # so that what was begun is cleaned up

    before = signal.signal(signal.SIGTERM, end)
    try:
        app()
    except CoterieError as error:
        sys.stderr.write(f"coterie: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except SystemExit as ended:
        if ended.code in (STOPPED, TERMINATED):
            sys.stderr.write("coterie: stopped\n")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
