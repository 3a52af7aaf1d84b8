"""`coterie library`: a thin layer over `coterie.library`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CoterieError
from ..options import Json, Token, number, pairs, terminal

app = typer.Typer(help="Keep adapters of one base model in a library.", no_args_is_help=True)

Where = Annotated[str, typer.Argument(metavar="LIBRARY", help="The library's directory; to look at, also a Hub id.")]
Name = Annotated[str, typer.Argument(help="The expert's name in the library.")]
Description = Annotated[str | None, typer.Option(help="What the expert is for.")]
Examples = Annotated[Path | None, typer.Option(help="A file of texts of its task, one on each line, for retrieval.")]
Data = Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet: some hundred rows of the expert's own data.")]
Task = Annotated[str, typer.Option(help="causal-lm, text-classification, token-classification or seq2seq.")]
Text = Annotated[str, typer.Option(help="The column that is read.")]
Target = Annotated[str | None, typer.Option(help="The column of the class, or of the text that is wanted.")]
Label = Annotated[
    list[str] | None, typer.Option(help="A class, as in the data. Repeat it, in the order of the expert's head.")
]
MaxTokens = Annotated[int, typer.Option(help="Longer inputs are cut.", min=1)]
Moved = Annotated[str | None, typer.Option(help="Where the library's base is, if it has moved.")]


@app.command()
def create(
    directory: Annotated[Path, typer.Argument(metavar="LIBRARY", help="The directory to make.")],
    base: Annotated[str, typer.Option(help="Directory or Hub id (ID@REVISION) of the base of all its experts.")],
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Make an empty library for the experts of a base model."""
    from .store import create as run

    made = run(directory, base, token)
    about = {"path": str(directory), "base": made.base.model_dump()}
    _say(f"{directory}: an empty library of experts of {base}", about, as_json)


@app.command()
def add(
    library: Where,
    name: Name,
    source: Annotated[str, typer.Argument(help="Directory or Hub id of a PEFT adapter or a full fine-tune.")],
    base: Annotated[
        str | None, typer.Option(help="Its base, where the adapter does not say where that is; it is compared.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of a full fine-tune: rank of every layer.")] = None,
    residual: Annotated[
        float | None, typer.Option(help="Instead: every layer's rank is the least that leaves this share of its delta.")
    ] = None,
    rest: Annotated[str, typer.Option(help="Of a full fine-tune: leave or save biases, norms, embeddings.")] = "leave",
    head: Annotated[str, typer.Option(help="Of a full fine-tune: leave or save task heads.")] = "leave",
    description: Description = None,
    examples: Examples = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Copy an adapter into a library, or extract one from a full fine-tune."""
    from .store import open

    made = open(library, token).add(
        name, source, base=base, rank=rank, residual=residual, rest=rest, head=head, description=description,
        examples=_lines(examples), console=None if as_json else terminal(stderr=True),
    )  # fmt: skip
    _say(f"{name}: {made.entry.modules} modules, {made.path}", made.to_dict(), as_json)


@app.command("add-all")
def add_all(
    library: Where,
    directory: Annotated[Path, typer.Argument(help="The directory that holds the adapters' directories.")],
    base: Annotated[
        str | None, typer.Option(help="Their base, where adapters do not say where that is; it is compared.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy every adapter of a directory into a library, under its directory's name; known names are left alone."""
    from .store import open

    def say(name: str) -> None:
        if not as_json:
            _say(f"{name}: added", None)

    added = open(library).add_all(directory, base=base, say=say)
    _say(f"{len(added)} experts were added", {"added": added}, as_json)


@app.command()
def remove(library: Where, name: Name, as_json: Json = False) -> None:
    """Take an expert out of a library."""
    from .store import open

    open(library).remove(name)
    _say(f"{name}: removed", {"removed": name}, as_json)


@app.command("list")
def list_(library: Where, token: Token = None, as_json: Json = False) -> None:
    """List a library's experts; nothing is read but its manifest."""
    from rich.table import Table

    from ..sources.locate import locate
    from ..sources.manifest import MANIFEST, read_manifest, span

    entries = read_manifest(locate(str(library), token, [MANIFEST])).experts
    if as_json:
        _json({n: e.model_dump() for n, e in entries.items()})
        return
    table = Table(box=None)
    for column in ("expert", "kind", "modules", "rank", "alpha", "parameters", "for", "source"):
        table.add_column(column, overflow="fold")
    for name, e in entries.items():
        targets = f"{e.modules}: {', '.join(e.targets)}"
        row = (name, e.kind, targets, span(e.ranks), f"{e.alpha:g}", f"{e.parameters:,}", e.description or "", e.source)
        table.add_row(*map(_plain, row))
    _print(table)


@app.command()
def show(library: Where, name: Name, token: Token = None, as_json: Json = False) -> None:
    """Show one expert: source, hashes, layers, provenance, statistics."""
    from .store import open

    about = open(library, token)[name].to_dict()
    if as_json:
        _json(about)
        return
    from rich.table import Table

    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key in ("name", "kind", "source", "path", "description", "architecture", "alpha", "parameters"):
        head.add_row(key, _plain(about[key] if about[key] is not None else "-"))
    head.add_row("base", _plain(f"{about['base']['id']} ({about['base']['fingerprint'][:12]})"))
    for key in ("examples", "statistics", "saved"):
        head.add_row(key, _plain(", ".join(about[key]) or "-"))
    for file, sha256 in about["sha256"].items():
        head.add_row(_plain(file), sha256)
    layers = Table(box=None)
    for column in ("layer", "in -> out", "rank", "scale"):
        layers.add_column(column, overflow="fold")
    for path, layer in about["layers"].items():
        layers.add_row(path, f"{layer['shape'][1]} -> {layer['shape'][0]}", str(layer["rank"]), f"{layer['scale']:g}")
    _print(head, layers)


@app.command()
def verify(library: Where, as_json: Json = False) -> None:
    """Hash every file again; the first that is missing or was changed ends in an error that names it."""
    from .store import open

    found = open(library)
    faults = found.verify()
    if as_json:
        _json([vars(fault) for fault in faults])
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        where = faults[0].file if faults[0].expert is None else f"expert {faults[0].expert!r}: {faults[0].file}"
        raise CoterieError(f"{faults[0].what}{more}", where, "remove it, and add it again")
    if not as_json:
        _say(f"{len(found)} experts: every file is as it was added", None)


@app.command()
def combine(
    library: Where,
    operation: Annotated[str, typer.Argument(help="add, subtract, scale, negate, ext-sub or subtract-factors.")],
    experts: Annotated[list[str], typer.Argument(help="What it is applied to, in order.")],
    name: Annotated[str, typer.Option("--name", "-n", help="Of the new expert.")],
    rank: Annotated[
        int | None, typer.Option(help="Recompress every layer to this rank; what that leaves out is measured.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a parameter. Repeat it.")] = None,
    base: Moved = None,
    description: Description = None,
    examples: Examples = None,
    as_json: Json = False,
) -> None:
    """Make a new expert of others by arithmetic of their deltas: `library combine LIB subtract TASK GENERAL`."""
    from .store import open

    given: dict[str, Any] = {key: number(value) for key, value in pairs(set_ or [], "--set").items()}
    report = open(library, base=base).combine(
        name, operation, experts, rank=rank, description=description, examples=_lines(examples), **given
    )
    _say(f"{name}: {report.summary()}", report.to_dict(), as_json)


@app.command("train-gates")
def train_gates(
    library: Where,
    name: Name,
    data: Data,
    task: Task = "causal-lm",
    text: Text = "text",
    target: Target = None,
    label: Label = None,
    max_tokens: MaxTokens = 128,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.", min=1)] = 32,
    steps: Annotated[int, typer.Option(help="Of the optimiser.", min=1)] = 100,
    learning_rate: Annotated[float, typer.Option(help="After a warm-up of 6% of the steps.", min=0)] = 5e-3,
    base: Moved = None,
    as_json: Json = False,
) -> None:
    """Train an expert's gates on rows of its own data, everything else frozen: what `phatgoose` is built of."""
    from .data import read
    from .store import open

    opened = open(library, base=base)
    opened[name]
    model, batches = read(base or opened.base.source, task, data, text, target, label, max_tokens, batch_size)
    opened.train_gates(name, model, batches, steps=steps, learning_rate=learning_rate)
    _say(f"{name}: gates of {len(opened[name].layers)} layers, {steps} steps", {"gate": name, "steps": steps}, as_json)


@app.command("average-activation")
def average_activation(
    library: Where,
    name: Name,
    data: Data,
    task: Task = "causal-lm",
    text: Text = "text",
    target: Target = None,
    label: Label = None,
    max_tokens: MaxTokens = 128,
    base: Moved = None,
    as_json: Json = False,
) -> None:
    """Average what an expert's layers read of its own data: what `average_activation` is built of."""
    from .data import read
    from .store import open

    opened = open(library, base=base)
    opened[name]
    opened.average_activation(
        name, *read(base or opened.base.source, task, data, text, target, label, max_tokens, batch_size=32)
    )
    _say(f"{name}: activations of {len(opened[name].layers)} layers", {"activation": name}, as_json)


@app.command()
def embed(
    library: Where,
    kind: Annotated[
        str, typer.Option(help="Of the description; of each of the examples; of the task: the examples' mean.")
    ] = "task",
    as_json: Json = False,
) -> None:
    """Embed what experts are for, by MiniLM: what `retriever`, `nearest_example`, `task_embedding` are built of."""
    from .encoder import minilm
    from .store import open

    made = open(library).embed(minilm(), kind)
    _say(f"{made} experts were embedded; what had been before was left", {"embedded": made}, as_json)


@app.command()
def operations(as_json: Json = False) -> None:
    """List the operations of `combine` and their parameters."""
    from .operations import known

    listing = [{"name": o.name, "cite": o.cite, "summary": o.summary, "parameters": o.describe()} for o in known()]
    if as_json:
        _json(listing)
        return
    from rich.table import Table

    table = Table(box=None)
    for column in ("operation", "what it does", "parameter", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for o in known():
        p = (o.describe() or [dict.fromkeys(("name", "default", "meaning"), "")])[0]
        row = (o.name, f"{o.summary} ({o.cite})", p["name"], str(p["default"]), p["meaning"])
        table.add_row(*map(_plain, row))
    _print(table)


@app.command("cluster")
def cluster_(
    library: Where,
    clusters: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    keep: Annotated[float, typer.Option(help="Share of an expert's parameters, the largest, that is compared.")] = 0.2,
    dimensions: Annotated[int, typer.Option(min=1, help="That they are compared in.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the clustering.")] = 42,
    merge: Annotated[
        Path | None, typer.Option(help="Make a library with one expert for each cluster, the mean of its experts.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="With --merge: recompress every layer to this rank.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Group experts that are alike (MBC): what to retrain together, or to merge."""
    from .clusters import cluster, merge_clusters
    from .store import open

    opened = open(library, token)
    found = cluster(opened, clusters, keep=keep, dimensions=dimensions, seed=seed)
    if merge is not None:
        merge_clusters(opened, found, merge, rank=rank)
    lines = [f"cluster {number}: {', '.join(names)}" for number, names in enumerate(found)]
    _say("\n".join(lines), {"clusters": found, "merged": None if merge is None else str(merge)}, as_json)


def _lines(file: Path | None) -> list[str]:
    """The lines of a file of texts that are not empty."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CoterieError(f"cannot be read ({error})", str(file), "give a text file") from None
    return [line for line in lines if line.strip()]


def _plain(text: Any) -> Any:
    """Text that holds no markup."""
    from rich.text import Text

    return Text(str(text))


def _print(*parts: Any) -> None:
    terminal().print(*parts, sep="\n")


def _json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))


def _say(text: str, result: Any, as_json: bool = False) -> None:
    if as_json:
        _json(result)
    else:
        terminal().print(text, markup=False, soft_wrap=True)
