"""The streaming merge: sources on disk to one dense model on disk, one tensor at a time."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..building.directory import whole_directory
from ..building.engines import default_jobs, in_threads, one_thread
from ..building.finish import copy_inputs, versions
from ..building.journal import Journal
from ..building.memory import PeakMemory
from ..building.progress import progress
from ..building.writer import ShardWriter
from ..errors import CoterieError
from ..recipe import MergeRecipe, read_merge_recipe
from ..sources.locate import hub_id
from .inputs import Opened, open_merge
from .registry import cases, is_by_pattern
from .report import Line, MergeReport
from .stack import BLOCK
from .steps import add, merge_tensor, survey_tensor

SHARD_BYTES = 5_000_000_000


@dataclass
class Made:
    """What a step gives back: tensors as they are written; and its facts, plain data that survives JSON."""

    tensors: dict[str, torch.Tensor]
    lines: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, dict[str, str]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """All but the tensors."""
        parameters = sum(t.numel() for t in self.tensors.values() if t.is_floating_point())
        rest = {key: value for key, value in vars(self).items() if key != "tensors"}
        return {**rest, "parameters": parameters}


def merge(
    recipe: Any = None,
    out: str | Path | None = None,
    *,
    force: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
    resume: bool = False,
    report: str = "short",
    token: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
    **keys: Any,
) -> MergeReport:
    """Merge experts into one dense model.

    Args:
        recipe: path of a YAML recipe, or its content as a dict; or give the recipe's keys as keywords.
        out: the directory to make; it appears only when it is complete.
        force: replace an existing directory.
        device: where merges of whole matrices work.
        jobs: tensors at a time, each on one core; the output is the same whatever their number, the memory grows with
            it. Default: as many as there are cores and half of the free memory holds.
        resume: go on after the last finished shard of a merge of this recipe that was interrupted, if there is one.
        report: "short", or "full": with the overlap of the experts' subspaces, which costs a factorisation a matrix.
        token: Hub token.
        max_shard_bytes: size of a shard.
        console: where progress is shown; None for silence.
        **keys: the recipe's keys.

    Returns:
        The account of the merge; also saved in `merge.json`.

    Raises:
        CoterieError: bad input; nothing is written.
    """
    if out is None:
        raise CoterieError("no output directory given", "merge", "give out=DIR")
    if report not in ("short", "full"):
        raise CoterieError(f"report is {report!r}", "merge", "known: short, full")
    if jobs is not None and jobs < 1:
        raise CoterieError(f"jobs is {jobs}", "merge", "give a positive number")
    given = _recipe(recipe, keys)
    out = Path(out)
    if os.path.lexists(out) and not force:
        finished = resume and (out / "merge.json").is_file()
        what = "is finished: nothing of it is left to resume" if finished else "exists already"
        raise CoterieError(what, str(out), "choose another directory, or replace it with --force (force=True)")
    started = time.monotonic()
    opened = open_merge(given, token, device, report == "full")
    jobs = jobs or default_jobs(memory_of(opened), device)
    account = MergeReport(
        opened.method.name,
        dict(opened.parameters.values),
        given.names,
        opened.architecture,
        str(out),
        warnings=opened.warnings,
        left_out=opened.left_out,
    )
    same = {"device": device, "max_shard_bytes": max_shard_bytes, "report": report}
    identity = _plain(
        {"recipe": given.model_dump(mode="json"), **same, "versions": versions(), "sources": opened.files()}
    )
    needed = opened.bytes_written()
    with (
        PeakMemory() as memory,
        one_thread(),
        whole_directory(out, force, needed, opened.folders, identity, resume) as folder,
    ):
        journal = Journal(folder, identity)
        factors = opened.method.acts_on == "factors"  # PEFT reads one file, whatever its size
        writer = ShardWriter(folder, 2**62 if factors else max_shard_bytes, opened.names(), journal)
        done = dict(journal.steps)
        ranks: dict[str, int] = {}
        with progress(console) as bar:
            task = bar.add_task("tensors", total=len(opened.steps) * (1 + _passes(opened)))
            surveys = survey_model(opened, jobs, lambda: bar.advance(task))
            todo = [step for step in opened.steps if step not in done]
            make = partial(make_step, opened, surveys)
            with closing(in_threads(make, jobs, todo)) as made:
                for step in opened.steps:
                    facts = done.get(step) or _write(writer, step, next(made))
                    _take(account, opened, facts)
                    ranks |= facts["ranks"]
                    bar.advance(task)
        writer.finish("adapter_model" if factors else "model")
        account.bytes_read = sum(c.tensors[name].bytes for c in opened.checkpoints.values() for name in c.sha256)
        account.bytes_written = writer.total_bytes
        account.seconds, account.peak_memory = time.monotonic() - started, memory.bytes
        account.warnings += _unmatched(given, [*(line.name for line in account.lines), *account.kept])
        account.conclude()
        _write_metadata(folder, opened, account, ranks)
    return account


def _recipe(recipe: Any, keys: dict[str, Any]) -> MergeRecipe:
    if recipe is not None and keys:
        raise CoterieError(f"{', '.join(keys)} given beside a recipe", "merge", "put them into the recipe")
    return read_merge_recipe(keys if recipe is None else recipe)


def _unmatched(recipe: MergeRecipe, names: list[str]) -> list[str]:
    """A sentence for each key of the recipe with globs that match no tensor."""
    settings: dict[str, Any] = {
        **recipe.parameters,
        **{f"weight of {n!r}": e.weight for n, e in recipe.experts.items()},
    }
    globs = {key: [case.filter for case in cases(value)] for key, value in settings.items() if is_by_pattern(value)}
    globs["others"] = list(recipe.others) if isinstance(recipe.others, dict) else []
    bare = {key: [g for g in found if not any(fnmatchcase(n, g) for n in names)] for key, found in globs.items()}
    return [f"{key}: no name matches {', '.join(map(repr, found))}" for key, found in bare.items() if found]


@dataclass
class MergePlan:
    """The account of a merge before it runs, from headers alone.

    Attributes:
        method, architecture, experts: as it would run.
        tensors: what becomes of them -> how many.
        bytes_read: of the sources' tensors, each once.
        passes: how often they are read.
        bytes_written: of tensors, about.
        memory: anonymous memory beyond the interpreter's own, about, in bytes.
        jobs: tensors at a time.
        warnings: a sentence each.
    """

    method: str
    architecture: str
    experts: list[str]
    tensors: dict[str, int]
    bytes_read: int
    passes: int
    bytes_written: int
    memory: int
    jobs: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return vars(self)

    def table(self) -> RenderableType:
        """The plan for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        head.add_row("plan", f"{self.method} of {len(self.experts)} experts in {self.architecture}")
        head.add_row("reads", f"{self.bytes_read / 1e9:.3f} GB" + (f", {self.passes} times" if self.passes > 1 else ""))
        head.add_row("writes", f"about {self.bytes_written / 1e9:.3f} GB")
        memory = f"about {self.memory / 1e9:.3f} GB beyond the interpreter's own, for {self.jobs} tensors at a time"
        head.add_row("memory", memory)
        for what, count in self.tensors.items():
            head.add_row(what, f"{count} tensors")
        return Group(head, *(Text(f"! {w}", style="yellow") for w in self.warnings))


def plan(
    recipe: Any = None, *, token: str | None = None, jobs: int | None = None, device: str = "cpu", **keys: Any
) -> MergePlan:
    """What a merge would do, from headers alone; arguments and errors as in `merge`."""
    opened = open_merge(_recipe(recipe, keys), token, device)
    jobs = jobs or default_jobs(memory_of(opened), device)
    become = Counter(opened.becomes(step) for step in opened.steps)
    sizes = {source: sum(info.bytes for info in c.tensors.values()) for source, c in opened.checkpoints.items()}
    passes = 1 + _passes(opened)
    return MergePlan(
        opened.method.name,
        opened.architecture,
        opened.recipe.names,
        dict(become),
        sum(sizes.values()),
        passes,
        opened.bytes_written(),
        jobs * memory_of(opened),
        jobs,
        opened.warnings,
    )


def memory_of(opened: Opened) -> int:
    """Anonymous memory that the work on the largest tensor takes, at most, in bytes."""
    largest = max((info.numel for info in opened.own.tensors.values()), default=0)
    experts = len(opened.places)
    if opened.method.acts_on == "elements" and not opened.through_skeleton:
        return 4 * largest + 4 * 3 * (experts + 2) * min(largest, BLOCK)
    return 4 * largest * (3 * experts + 4)


def survey_model(opened: Opened, jobs: int, advance: Callable[[], Any] = lambda: None) -> list[Any]:
    """What the passes of the method's survey sum up over the whole model, in order; nothing where it makes none.

    Args:
        opened: the sources.
        jobs: tensors at a time.
        advance: is called after each tensor of each pass.
    """
    sums: list[Any] = []
    for index in range(_passes(opened)):
        found = None
        with closing(in_threads(partial(_survey_step, opened, index, sums), jobs, opened.steps)) as made:
            for each in made:  # in their order, so that sums round as in any other run
                found = add(found, each)
                advance()
        sums = [*sums, found]
    return sums


def _passes(opened: Opened) -> int:
    """Passes over all deltas before the one that merges."""
    return len(opened.method.survey) if opened.method.survey_scope == "model" else 0


def _survey_step(opened: Opened, index: int, sums: list[Any], step: str) -> Any:
    found = None
    for stack, how in opened.stacks(step):
        if how.method is opened.method:
            found = add(found, survey_tensor(stack, how, index, sums))
    return found


def make_step(opened: Opened, surveys: list[Any], step: str) -> Made:
    """Merge the tensors of one step; it has no effect beyond what it gives back."""
    made = Made({})
    if opened.method.acts_on == "factors":
        from .adapters import make_adapter_step

        factors = make_adapter_step(opened, step)
        made.tensors, made.sha256 = factors.tensors, factors.sha256
        if factors.line is None:
            made.kept[step] = "held whole by the adapters"
        else:
            made.lines.append(vars(factors.line))
            made.ranks[step] = factors.rank
        return made
    with torch.no_grad(), torch.autocast(torch.device(opened.device).type, enabled=False):
        for stack, how in opened.stacks(step, made.sha256):
            merged = merge_tensor(stack, how, surveys if how.method is opened.method else [])
            made.tensors[stack.name] = merged.tensor
            if merged.line is not None:
                made.lines.append(vars(merged.line))
            else:
                made.kept[stack.name] = merged.kept
    return made


def _write(writer: ShardWriter, step: str, made: Made) -> dict[str, Any]:
    for name, tensor in made.tensors.items():
        writer.add(name, tensor)
    facts = made.facts()
    writer.note([step, facts])
    return facts


def _take(account: MergeReport, opened: Opened, facts: dict[str, Any]) -> None:
    """Put a step's facts into the report and the account of what was read."""
    account.lines += [Line(**line) for line in facts["lines"]]
    account.kept |= facts["kept"]
    account.parameters_written += facts["parameters"]
    for source, hashes in facts["sha256"].items():
        opened.checkpoints[source].sha256.update(hashes)


def _plain(data: Any) -> Any:
    return json.loads(json.dumps(data))


def _write_metadata(folder: Path, opened: Opened, account: MergeReport, ranks: dict[str, int]) -> None:
    """Everything of the directory but its weights."""
    if opened.method.acts_on == "factors":
        from .adapters import configs, write_config

        ranks = {path: rank for path, rank in ranks.items() if rank}
        write_config(folder, configs(opened), opened.recipe.base, ranks, list(account.kept))
    else:
        copy_inputs(opened.reference.path, folder)
        if opened.vocabulary is not None:
            opened.vocabulary.write(folder)
        config = opened.config
        if opened.recipe.dtype:
            config.pop("torch_dtype", None)
            config["dtype"] = opened.recipe.dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    provenance = {
        "recipe": opened.recipe.model_dump(mode="json"),
        "cite": opened.method.cite,
        "versions": versions(),
        "sources": {
            source: {"id": c.location.id, "revision": c.location.revision} for source, c in opened.checkpoints.items()
        },
        "tensors_read": {source: dict(sorted(c.sha256.items())) for source, c in opened.checkpoints.items()},
        "report": {**account.to_dict(), "out": None},
    }
    # On one line: with indents, Python writes it itself, which takes longer than to merge thousands of small tensors.
    (folder / "merge.json").write_text(json.dumps(provenance, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(card(opened, account), encoding="utf-8")


def card(opened: Opened, account: MergeReport) -> str:
    """The model card, with Hub metadata."""
    import yaml

    adapter = opened.method.acts_on == "factors"
    ids = [opened.recipe.base, *(() if adapter else (e.source for e in opened.recipe.experts.values()))]
    hub = list(dict.fromkeys(found for source in ids if source and (found := hub_id(source))))
    library, relation = ("peft", "adapter") if adapter else ("transformers", "merge")
    meta: dict[str, Any] = {"library_name": library, "tags": ["coterie", "merge", account.method]}
    if hub:
        meta |= {"base_model": hub, "base_model_relation": relation}
    parameters = ", ".join(f"{k} = {v}" for k, v in account.parameters.items()) or "no parameters"
    rows = "\n".join(
        f"| `{json.dumps(name, ensure_ascii=False)[1:-1]}` | {_number(cosine)} |"
        for name, cosine in zip(account.experts, account.total.cosines, strict=True)
    )
    notes = "".join(f"\n- {warning}" for warning in account.warnings)
    made = f"A LoRA adapter for `{account.architecture}`," if adapter else f"A `{account.architecture}`"
    return f"""---
{yaml.safe_dump(meta, sort_keys=False).strip()}
---

# {len(account.experts)} experts, merged by {account.method}

{made} of {account.parameters_written:,} parameters: {opened.method.summary}
({parameters}; {opened.method.cite}.)
Made with [coterie](https://pypi.org/project/coterie/); `merge.json` records every source and how far each tensor moved.

| expert | cosine of its delta to the merged one |
|---|---|
{rows}
{f"{chr(10)}What the merge noted:{chr(10)}{notes}{chr(10)}" if notes else ""}"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
