"""Train a suite's experts: full fine-tunes and LoRA adapters of the base, on the CPU or a GPU.

Every expert is a directory in the cache, named by the content of all that made it (data, hyperparameters, base) and
written in one step when it is finished; beside it lies a checkpoint until then, so that a stopped run goes on where it
was.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers.utils import logging

from . import checkpoint
from .ladder import linear_layers
from .reader import Reader
from .suite import Recipe, Split, Suite, Task, digest, weights_sha256

RECORD = "training.json"


@dataclass(frozen=True)
class Job:
    """One expert to train.

    Args:
        task, recipe: what it learns, and how.
        base: directory of the base.
        fingerprint: sha256 of the base's weights.
        reader: makes the suite's reader from the base and a torch device.
        settings: the reader's.
    """

    task: Task
    recipe: Recipe
    base: Path
    fingerprint: str
    reader: Callable[[Path, str], Reader]
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """sha256 (hex) of all that makes the expert: the test rows do not."""
        return digest(self.task.key, asdict(self.recipe), self.fingerprint, self.settings)

    def directory(self, cache: Path) -> Path:
        return cache / "experts" / f"{self.task.name}-{self.recipe.kind}-{self.key[:16]}"

    def finished(self, cache: Path) -> bool:
        """Whether the cache holds the expert: the very weights, and a configuration that can be read."""
        config = "adapter_config.json" if self.recipe.kind == "lora" else "config.json"
        try:
            record, _ = (json.loads((self.directory(cache) / name).read_text()) for name in (RECORD, config))
        except (OSError, ValueError):
            return False
        return bool(record.get("sha256") == weights_sha256(self.directory(cache)))


def jobs(suite: Suite, tasks: tuple[Task, ...], recipe: Recipe, reader: Reader, one_seed: bool = True) -> list[Job]:
    """One training for each task.

    Args:
        suite: says how models are read.
        tasks: of the suite.
        recipe: of every expert, except for the seed.
        reader: of the base.
        one_seed: all experts have the recipe's seed; else the i-th has i more.
    """
    fingerprint = weights_sha256(reader.base)
    return [
        Job(
            task, recipe if one_seed else replace(recipe, seed=recipe.seed + i),
            reader.base, fingerprint, suite.reader, reader.settings,
        )
        for i, task in enumerate(tasks)
    ]  # fmt: skip


Report = Callable[[int, int, float], None]


def train_all(
    jobs: list[Job], cache: Path, device: str = "cpu", workers: int | None = None, report: Report | None = None
) -> list[Path]:
    """Train the experts that the cache lacks, several at a time, and return the directories of all.

    Args:
        jobs: the experts.
        cache: directory that holds them.
        device: torch device of the training.
        workers: processes; default: one for each CPU core (each with one thread), or one on a GPU.
        report: called with a job's index, its finished steps and its latest loss.
    """
    first = {job.key: i for i, job in reversed(list(enumerate(jobs)))}
    unique = [i for i in sorted(first.values()) if not jobs[i].finished(cache)]
    workers = min(len(unique), workers or (1 if device != "cpu" else (os.cpu_count() or 1)))
    say = report or (lambda index, step, loss: None)
    if workers <= 1:
        for i in unique:
            train(jobs[i], cache, device, partial(say, i))
    else:
        context = get_context("spawn")
        manager = SyncManager(ctx=context)
        manager.start(_end_with_parent)
        with manager:
            others = active_children()
            with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
                queue = manager.Queue()
                pending = {pool.submit(_train_in_worker, i, jobs[i], cache, device, queue) for i in unique}
                try:
                    while pending:
                        done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                        for _ in range(queue.qsize()):
                            try:
                                say(*queue.get_nowait())
                            except Empty:  # qsize is approximate
                                break
                        for future in done:
                            future.result()
                except BaseException:  # else the pool would wait until all is trained
                    for future in pending:
                        future.cancel()
                    for worker in active_children():
                        if worker not in others:
                            worker.terminate()
                    raise
    return [job.directory(cache) for job in jobs]


def train_shown(
    trainings: list[Job], cache: Path, device: str, console: Console, workers: int | None = None
) -> list[Path]:
    """`train_all` with a progress bar."""
    total = {job.key: job.recipe.steps for job in trainings if not job.finished(cache)}
    for directory in {job.directory(cache) for job in trainings if job.key in total}:
        if directory.exists():
            console.print(f"! {directory} is damaged: trained anew", style="yellow", soft_wrap=True)
    done = dict.fromkeys(total, 0)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"training {len(total)} experts", total=sum(total.values()), visible=bool(total))

        def report(index: int, step: int, loss: float) -> None:
            job = trainings[index]
            done[job.key] = step
            text = f"training {len(total)} experts: {job.task.name}, {job.recipe.kind}, loss {loss:.3f}"
            progress.update(bar, completed=sum(done.values()), description=text)

        return train_all(trainings, cache, device, workers, report)


def quiet() -> None:
    """No progress bars and no notes on coming changes or on heads to be selected in this process."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, message="this mixture keeps")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


def _end_with_parent() -> None:
    """This process ends when the one that started it does, however that ended, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _train_in_worker(index: int, job: Job, cache: Path, device: str, queue: Any) -> None:
    quiet()
    torch.set_num_threads(1)
    # Second moments underflow once the loss is near zero, and slow the CPU down. The setting is the process's.
    torch.set_flush_denormal(True)
    train(job, cache, device, lambda step, loss: queue.put((index, step, loss)))


def train(job: Job, cache: Path, device: str = "cpu", report: Callable[[int, float], None] | None = None) -> Path:
    """Train one expert and write its directory (a transformers or PEFT directory with `training.json`).

    Args:
        job: the expert.
        cache: directory that holds the experts.
        device: torch device.
        report: called every 20 steps with the number of finished steps and the mean loss since the last call.
    """
    torch.manual_seed(job.recipe.seed)
    reader = job.reader(job.base, device)
    model = _trainable(reader, job.recipe)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=job.recipe.learning_rate, weight_decay=0.01)
    file = job.directory(cache).with_name(f".{job.directory(cache).name}.safetensors")
    state: tuple[int, list[dict[str, float]], list[float]] = checkpoint.resume(file, parameters, optimizer) or (
        0,
        [],
        [],
    )
    done, curve, losses = state
    factor = _warm_cosine(job.recipe.steps)
    batches = islice(_batches(reader, job.task.train, job.recipe), done, None)
    for step, rows in enumerate(batches, start=done + 1):
        for group in optimizer.param_groups:
            group["lr"] = job.recipe.learning_rate * factor(step - 1)
        loss = reader.loss(model, job.task, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        losses = [*losses[-49:], loss.item()]
        if report and step % 20 == 0:
            report(step, float(np.mean(losses[-20:])))
        if step % max(1, job.recipe.steps // 8) == 0:
            score = reader.scores(model, job.task, job.task.validation).mean()
            curve.append({"step": step, "loss": float(np.mean(losses)), "validation": float(score)})
        if step % checkpoint.EVERY == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(file, parameters, optimizer, (step, curve, losses))
    record = {
        "task": job.task.name, "task_sha256": job.task.key, "recipe": asdict(job.recipe), "base": job.fingerprint,
        "dropout": 0.0, **job.settings, "trainable": sum(p.numel() for p in parameters.values()), "curve": curve,
    }  # fmt: skip
    directory = _write(model, record, job.directory(cache))
    file.unlink(missing_ok=True)
    return directory


def _trainable(reader: Reader, recipe: Recipe) -> Any:
    """The base with gradients where the recipe trains. It stays in eval mode: experts are trained without dropout."""
    model = reader.base_model().requires_grad_(False)
    if recipe.kind == "lora":
        from peft import LoraConfig, get_peft_model

        layers = linear_layers(model, reader.blocks)
        return get_peft_model(model, LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=layers)).eval()
    model.get_submodule(reader.blocks).requires_grad_(True)
    return model


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(0.06 * steps))
    return lambda step: min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(0, step - warmup) / (steps - warmup))))


def _batches(reader: Reader, split: Split, recipe: Recipe) -> Iterator[Split]:
    """`steps` batches; each epoch in a new order, sorted by size within chunks of 16 batches."""
    sizes = reader.sizes(split.inputs)
    rng = np.random.default_rng(recipe.seed)
    size, left = min(recipe.batch, len(sizes)), recipe.steps
    while left:
        order = rng.permutation(len(sizes))
        chunks = [order[i : i + 16 * size] for i in range(0, len(order), 16 * size)]
        ordered = np.concatenate([chunk[np.argsort(sizes[chunk], kind="stable")] for chunk in chunks])
        batches = [ordered[i : i + size] for i in range(0, len(ordered) - size + 1, size)]
        for index in rng.permutation(len(batches))[:left]:
            left -= 1
            yield split.take(batches[index])


def _write(model: Any, record: dict[str, Any], directory: Path) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory.parent))
    try:
        model.save_pretrained(unfinished)
        record["sha256"] = weights_sha256(unfinished)
        (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)  # what is there is damaged, or another process just wrote the same
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
