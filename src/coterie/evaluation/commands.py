"""`coterie compare`, `coterie eval` and `coterie demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..options import Cache, Json, Out, cache_directory, check_device, terminal


def compare(
    suite: Annotated[str, typer.Argument(help="text8, text20, vision8, lm4, a group (text8:control), or a YAML.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Directory of the results; files of their names in it are replaced.")
    ],
    methods: Annotated[
        str, typer.Option(help="Mixtures and merges by name, with commas between, or all (which takes hours).")
    ] = "average,task_arithmetic,ties,tsv_m,smile",
    experts: Annotated[
        str | None,
        typer.Option(help="full, lora (one seed for all), lora-seeds (a seed each), or committed: the suite's own."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Sets of experts to train.")] = 1,
    rows: Annotated[int | None, typer.Option(min=1, help="Test rows of each task, at most.")] = None,
    validation_rows: Annotated[
        int, typer.Option(min=1, help="Rows of each task that parameters are chosen on, at most.")
    ] = 200,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few rows and steps, to see that all of it runs.")] = False,
    cache: Cache = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Combine a suite's experts in every way, and write what each keeps of their skill and what it costs."""
    from .compare import compare as run

    check_device(device)
    result = run(
        suite, methods, out, experts=experts, seeds=seeds, rows=rows, validation_rows=validation_rows, tiny=tiny,
        cache=cache or cache_directory(), device=device, console=terminal(stderr=as_json),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        terminal().print(f"results.json, .csv, .md and report.html: {out}", markup=False, soft_wrap=True)


def evaluate(
    sources: Annotated[
        list[str], typer.Argument(help="SUITE (a name or a YAML), then models; with --lm-eval, models only.")
    ],
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", help="A task of lm-evaluation-harness, or its YAML. Repeat it.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Test rows of each task, at most.")] = None,
    cache: Cache = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Evaluate models on a suite: `coterie eval SUITE [MODEL]...`; without models, its base and its experts."""
    check_device(device)
    if lm_eval:
        from .harness import lm_eval as harness
        from .harness import sheet

        result = harness(sources, lm_eval, device=device, limit=rows)
    else:
        from .evaluate import evaluate as run
        from .evaluate import sheet

        result = run(sources[0], sources[1:], rows=rows, cache=cache or cache_directory(), device=device)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        terminal().print(sheet(result).rich())


def demo(
    out: Out = Path("coterie-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="From full fine-tunes trained here (up to an hour once).")
    ] = False,
    cache: Cache = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Run the main job on real material: eight experts of a sentence encoder, one mixture, one table."""
    from .demo import run

    check_device(device)
    result = run(out=out, full=full, cache=cache or cache_directory(), device=device, console=terminal(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(result, indent=1))
