"""The streaming build: sources on disk to a mixture directory on disk, one layer at a time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import CoterieError
from ..recipe import Recipe, read_recipe
from .finish import write_metadata
from .memory import PeakMemory, map_large_blocks
from .plan import Plan, make_plan
from .prepare import prepare
from .report import BuildReport
from .stream import Stream
from .writer import ShardWriter, whole_directory

SHARD_BYTES = 5_000_000_000


def _recipe(recipe: Any, keys: dict[str, Any]) -> Recipe:
    if recipe is not None and keys:
        raise CoterieError(f"{', '.join(keys)} given beside a recipe", "build", "put them into the recipe")
    return read_recipe(keys if recipe is None else recipe)


def plan(recipe: Any = None, token: str | None = None, **keys: Any) -> Plan:
    """What a build would do, from headers alone: layers, ranks, parameters, memory, traffic.

    Args and errors as in `build`.
    """
    ready = prepare(_recipe(recipe, keys), token)
    return make_plan(ready.inputs, ready.method.name, ready.mixture, ready.sites, ready.inputs.warnings)


def build(
    recipe: Any = None,
    out: str | Path | None = None,
    *,
    force: bool = False,
    light: bool = False,
    device: str = "cpu",
    token: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
    **keys: Any,
) -> BuildReport:
    """Build a mixture directory.

    Args:
        recipe: path of a YAML recipe, or its content as a dict; or give the recipe's keys as keywords.
        out: the directory to make; it appears only when it is complete.
        force: replace an existing directory.
        light: write only what is not the base's; `coterie.load` then reads both.
        device: where deltas are factorised.
        token: Hub token.
        max_shard_bytes: size of a shard.
        console: where progress is shown; None for silence.
        **keys: the recipe's keys.

    Returns:
        The account of the build; also saved in `mixture.json`.

    Raises:
        CoterieError: bad input; nothing is written.
    """
    if out is None:
        raise CoterieError("no output directory given", "build", "give out=DIR")
    given = _recipe(recipe, keys)
    out = Path(out)
    if os.path.lexists(out) and not force:
        raise CoterieError(
            "exists already", str(out), "choose another directory, or replace it with --force (force=True)"
        )
    started = time.monotonic()
    map_large_blocks()
    ready = prepare(given, token)
    inputs, sites = ready.inputs, ready.sites
    expected = make_plan(inputs, ready.method.name, ready.mixture, sites, [])
    report = BuildReport(
        ready.method.name,
        ready.parameters,
        given.names,
        type(inputs.skeleton.model).__name__,
        str(out),
        base_parameters=expected.base_parameters,
        warnings=inputs.warnings,
        left_out=inputs.left_out,
    )
    dtype = getattr(torch, given.dtype) if given.dtype else None
    needed = 0 if light else expected.bytes_written_low
    with PeakMemory() as memory, whole_directory(out, force, needed, inputs.folders) as folder:
        writer = ShardWriter(folder, max_shard_bytes, expected.tensor_names(len(given.experts)))
        stream = Stream(ready, writer, report, dtype, light, device)
        with _progress(console) as progress:
            task = progress.add_task("layers", total=stream.steps)
            stream.run(lambda: progress.advance(task))
        writer.finish()
        report.bytes_read = sum(checkpoint.bytes_read for checkpoint in inputs.checkpoints.values())
        report.bytes_written, report.mixture_parameters = writer.total_bytes, stream.parameters
        report.seconds, report.peak_memory = time.monotonic() - started, memory.bytes
        report.conclude()
        write_metadata(folder, inputs, stream.spec, report, dtype, light)
    return report


def _progress(console: Console | None) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console or Console(quiet=True), disable=console is None, transient=True)
