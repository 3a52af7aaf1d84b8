"""The streaming build: sources on disk to a mixture directory on disk, one layer at a time."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import CoterieError
from ..recipe import Recipe, read_recipe
from .directory import whole_directory
from .engines import ENGINES, default_jobs, in_threads, on_ray, one_thread
from .finish import versions, write_metadata
from .journal import Journal
from .memory import PeakMemory
from .plan import Plan, make_plan
from .prepare import Prepared, prepare
from .progress import progress
from .report import BuildReport
from .steps import Facts, Options, Step, make
from .stream import Engine, Stream
from .writer import ShardWriter

SHARD_BYTES = 5_000_000_000


def _recipe(recipe: Any, keys: dict[str, Any]) -> Recipe:
    if recipe is not None and keys:
        raise CoterieError(f"{', '.join(keys)} given beside a recipe", "build", "put them into the recipe")
    return read_recipe(keys if recipe is None else recipe)


def plan(
    recipe: Any = None, token: str | None = None, *, jobs: int | None = None, device: str = "cpu", **keys: Any
) -> Plan:
    """What a build would do, from headers alone: layers, ranks, parameters, memory, traffic.

    Args and errors as in `build`.
    """
    ready = prepare(_recipe(recipe, keys), token)
    return _plan(ready, jobs, device)


def _plan(ready: Prepared, jobs: int | None, device: str) -> Plan:
    if jobs is not None and jobs < 1:
        raise CoterieError(f"jobs is {jobs}", "build", "give a positive number")
    found = make_plan(ready.inputs, ready.method.name, ready.mixture, ready.sites, list(ready.inputs.warnings))
    found.jobs = jobs or default_jobs(found.layer_memory, device)
    return found


def build(
    recipe: Any = None,
    out: str | Path | None = None,
    *,
    force: bool = False,
    light: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
    engine: str = "local",
    resume: bool = False,
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
        jobs: layers at a time, each on one core; the output is the same whatever their number, the memory grows with
            it. Default: as many as there are cores and half of the free memory holds; on Ray, the cluster's cores.
        engine: "local" (threads of this process) or "ray" (tasks of a Ray cluster).
        resume: go on after the last finished shard of a build of this recipe that was interrupted, if there is one.
            Without it, what an interrupted build left is removed.
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
    if engine not in ENGINES:
        raise CoterieError(f"unknown engine {engine!r}", "build", f"known: {', '.join(ENGINES)}")
    how: dict[str, Any] = {"light": light, "device": device, "jobs": jobs, "engine": engine, "resume": resume}
    how |= {"token": token, "max_shard_bytes": max_shard_bytes, "console": console}
    return write(prepare(given, token), out, force, **how)


def write(
    ready: Prepared,
    out: Path,
    force: bool,
    *,
    light: bool,
    device: str,
    jobs: int | None,
    engine: str,
    resume: bool,
    token: str | None,
    max_shard_bytes: int,
    console: Console | None,
) -> BuildReport:
    """Run a prepared build; arguments, result and errors as of `build`."""
    started, given, inputs = time.monotonic(), ready.inputs.recipe, ready.inputs
    expected = _plan(ready, jobs, device)
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
    options = Options(getattr(torch, given.dtype) if given.dtype else None, light, device)
    run: Engine
    if engine == "ray":
        run = partial(on_ray, ready, options, jobs, token)
    else:
        run = partial(in_threads, partial(make, ready, options), expected.jobs)
    needed = 0 if light else expected.bytes_written_low
    same = {"light": light, "device": device, "max_shard_bytes": max_shard_bytes}
    identity = _plain(
        {"recipe": given.model_dump(mode="json"), **same, "versions": versions(), "sources": inputs.files()}
        | ({"statistics": ready.statistics.digests} if ready.statistics else {})
    )
    with (
        PeakMemory() as memory,
        one_thread(),
        whole_directory(out, force, needed, inputs.folders, identity, resume) as folder,
    ):
        journal = Journal(folder, identity)
        writer = ShardWriter(folder, max_shard_bytes, expected.tensor_names(len(given.experts)), journal)
        done = {Step(*step): Facts.from_dict(facts) for step, facts in journal.steps}
        stream = Stream(ready, writer, report, run, done)
        with progress(console) as bar:
            task = bar.add_task("layers", total=stream.steps)
            stream.run(lambda: bar.advance(task))
        writer.finish()
        report.bytes_read = sum(c.tensors[name].bytes for c in inputs.checkpoints.values() for name in c.sha256)
        report.bytes_written, report.mixture_parameters = writer.total_bytes, stream.parameters
        report.seconds, report.peak_memory = time.monotonic() - started, memory.bytes
        report.conclude()
        write_metadata(folder, inputs, stream.spec, report, options.dtype, light)
    return report


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data))
