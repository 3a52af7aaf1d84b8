"""The command line: a thin layer over the public functions."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import CoterieError

app = typer.Typer(
    help="Turn a base model and its fine-tuned experts into one mixture-of-experts model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Out = Annotated[Path, typer.Option("-o", "--out", help="The directory to make; it appears only when it is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of tables.")]
Token = Annotated[str | None, typer.Option("--token", help="Hub token; default: the one `hf auth login` stored.")]


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
    from .recipe import nearest, read_recipe

    keys: dict[str, Any] = {
        "method": method, "base": base, "others": others, "architecture": architecture, "dtype": dtype,
        "vocabulary": vocabulary, "experts": _pairs(expert, "--expert") if expert else None,
        "parameters": {k: _number(v) for k, v in _pairs(set_, "--set").items()} if set_ else None,
    }  # fmt: skip
    given = {k: v for k, v in keys.items() if v is not None}
    if include or exclude:
        given["modules"] = {"include": include or ["*"], "exclude": exclude or []}
    if recipe is not None:
        merged = read_recipe(recipe).model_dump(exclude_unset=True)
        for key in ("parameters", "experts"):
            if key in given:
                given[key] = {**merged.get(key, {}), **given[key]}
        whole = read_recipe({**merged, **given})
    else:
        for key, option in (("base", "--base"), ("experts", "--expert")):
            if key not in given:
                raise CoterieError(f"{option} is missing", "build", "give a recipe, or --base and --expert NAME=SOURCE")
        whole = read_recipe({"method": "smile", **given})
    _check_device(device, nearest)
    if out is not None and os.path.lexists(out) and not force:
        raise CoterieError("exists already", str(out), "choose another directory, or replace it with --force")
    if dry_run:
        _show(plan(whole, token, jobs=jobs, device=device), as_json)
        return
    if out is None:
        raise CoterieError("no output directory given", "build", "give -o DIR")
    console = None if as_json else _console(stderr=True)
    how: dict[str, Any] = {"device": device, "jobs": jobs, "engine": engine, "resume": resume}
    how["max_shard_bytes"] = int(max_shard_gb * 1e9)
    report = run(whole, out, force=force, light=light, token=token, console=console, **how)
    _show(report, as_json)


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="A mixture directory or Hub id.")],
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what is in a mixture: experts, layers, ranks, sizes, provenance."""
    from .report.inspect import inspect as look

    _show(look(directory, token), as_json)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods, their parameters and where they were published."""
    from .methods import known

    if as_json:
        listing = [{"name": m.name, "cite": m.cite, "summary": m.summary, "parameters": m.describe()} for m in known()]
        typer.echo(json.dumps(listing, indent=1))
        return
    from rich.table import Table

    table = Table(box=None)
    for column in ("method", "what it does", "parameter", "default", "type", "meaning"):
        table.add_column(column, overflow="fold")
    for each in known():
        first = (each.name, f"{each.summary} ({each.cite})")
        for p in each.describe():
            table.add_row(*first, p["name"], str(p["default"]), p["type"], p["meaning"])
            first = ("", "")
    _console().print(table)


@app.command("extract-expert")
def extract_expert(
    directory: Annotated[str, typer.Argument(help="A mixture directory or Hub id.")],
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    out: Out,
    force: Force = False,
) -> None:
    """Give one expert as an ordinary dense model: its linear layers and head; the rest as `others` had it."""
    from transformers.utils import logging

    from .building.extract import extract_expert as run

    logging.disable_progress_bar()
    run(directory, name, out, force=force)
    _console().print(f"{name}: {out}", markup=False)


@app.command()
def convert(
    directory: Annotated[str, typer.Argument(help="A directory or Hub id with pickled weights (*.bin).")],
    out: Out,
    force: Force = False,
) -> None:
    """Rewrite pickled weights as safetensors (read with weights_only, memory-mapped)."""
    from .building.convert import convert as run

    _console().print(f"{run(directory, out, force=force)} tensors: {out}", markup=False)


@app.command()
def demo(
    out: Out = Path("coterie-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="From full fine-tunes trained here (up to an hour once).")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Where trained experts and finished cells are kept.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Run the main job on real material: eight experts of a sentence encoder, one mixture, one table."""
    from .evaluation.demo import run

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    result = run(out=out, full=full, cache=cache or home, device=device, console=_console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(result, indent=1))


def _pairs(given: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE options as a dict; the name may hold anything but '=', and occurs once."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise CoterieError(
                f"{text!r} has no '='", option, f"write NAME={'SOURCE' if option == '--expert' else 'VALUE'}"
            )
        if name in pairs:
            raise CoterieError(f"{name!r} is given twice", option, "rename one of them")
        pairs[name] = value
    return pairs


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check_device(device: str, nearest: Any) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CoterieError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]})", "--device", "use cpu"
        ) from None


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    else:
        _console().print(result.table())


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except CoterieError as error:
        sys.stderr.write(f"coterie: error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
