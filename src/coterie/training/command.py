"""`coterie train`."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Annotated

import typer

from ..options import Force, Json, Out, Token


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A YAML file: task, base, data (train, validation, input, target, task, labels, max_tokens), method, "
            "experts, parameters, modules, also_train, train (all, experts, routers), training (TrainingArguments), "
            "seed."
        ),
    ],
    out: Out,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of a run that was interrupted.")
    ] = False,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Train a mixture: fresh experts and routers in a model, or those of a mixture, from a recipe."""
    from rich.console import Console
    from transformers.utils import logging

    from .train import train as run

    logging.disable_progress_bar()
    try:
        report = run(recipe, out, resume=resume, force=force, token=token, quiet=as_json)
    except KeyboardInterrupt:
        left = any(out.absolute().parent.glob(f".{glob.escape(out.name)}.partial-*"))
        more = (
            "--resume goes on from its last checkpoint" if left else "before its first checkpoint, so nothing is left"
        )
        typer.echo(f"coterie: {more}", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        Console().print(report.table())
