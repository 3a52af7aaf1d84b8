"""Learned routers side by side: one frozen base, one mixture of tasks, every method at matched active compute.

What the two experiments share: `domains.py` (images under six shifts) and `tasks.py` (eight tasks over texts). Each
method trains its experts and routers with the Hugging Face Trainer on all tasks at once, at a few learning rates of
which the validation rows of the first seed choose one; test rows choose nothing. [The paper's shape: Muqeeth et al.
2024, arXiv:2306.03745, section 4.]

A run (method, learning rate, seed) is a cell that is kept by its content, so that a stopped grid goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cache as cached
from functools import cached_property
from inspect import signature
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

import coterie
from coterie.building.memory import PeakMemory, anonymous_bytes, give_back
from coterie.evaluation.cells import Cells
from coterie.evaluation.ladder import blocks_of, linear_layers
from coterie.evaluation.suite import digest
from coterie.evaluation.train import quiet
from timing import machine, versions

RESULTS = Path(__file__).parent / "results"


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of all tasks together.

    Args:
        columns: name -> (N, ...) tensor; with `labels` (N,) int64 and `task_ids` (N,) int64.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}

    def digest(self) -> str:
        """sha256 (hex) of every column."""
        total = hashlib.sha256()
        for name, column in sorted(self.columns.items()):
            total.update(f"{name} {column.dtype} {tuple(column.shape)}".encode() + column.numpy().tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Experiment:
    """What every method is trained and tested on.

    Attributes:
        tasks: their names; a row's task id is its place here.
        train, validation, test: rows of all tasks.
        classes: (tasks, classes) bool: the classes that a row of the task may have.
        base: makes a fresh copy of the base, an ordinary model whose output has `loss` and `logits` (B, classes).
        sites: globs on the paths of the linear layers that get experts.
        head: the module that is trained beside the experts; None where nothing is.
        rank: of one expert.
        tokens: of an input.
        settings: what else decides the outcome (steps, batch, the base's fingerprint), as JSON values.
        about: what the data is, for the reader.
    """

    tasks: tuple[str, ...]
    train: Rows
    validation: Rows
    test: Rows
    classes: Tensor
    base: Callable[[], PreTrainedModel]
    sites: tuple[str, ...]
    head: str | None
    rank: int
    tokens: int
    settings: dict[str, Any]
    about: str

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of everything that a run depends on but its method, rate and seed."""
        rows = [split.digest() for split in (self.train, self.validation, self.test)]
        return digest(self.tasks, rows, self.sites, self.head, self.rank, self.settings)


@dataclass(frozen=True)
class Contender:
    """A method with its size.

    Attributes:
        method: a registered method, or "lora" and "rslora" for PEFT's.
        experts: how many.
        rank: of each, as a multiple of the experiment's.
        parameters: further ones of the method.
        matched: whether its active compute in use is that of one expert.
    """

    method: str
    experts: int
    rank: int = 1
    parameters: dict[str, Any] = field(default_factory=dict)
    matched: bool = True

    def put_into(self, model: PreTrainedModel, experiment: Experiment, seed: int) -> nn.Module:
        """The base with this method's experts, and only what is to be trained trainable."""
        sites = [
            name
            for name in linear_layers(model, blocks_of(model))
            if any(fnmatch(name, pattern) for pattern in experiment.sites)
        ]
        if self.method in ("lora", "rslora"):
            from peft import LoraConfig, get_peft_model

            # alpha is one expert's rank for both: LoRA's scale is alpha / rank, rsLoRA's alpha / sqrt(rank).
            adapter = LoraConfig(
                r=self.rank * experiment.rank, lora_alpha=experiment.rank, use_rslora=self.method == "rslora",
                target_modules=sites, modules_to_save=[experiment.head] if experiment.head else None,
            )  # fmt: skip
            torch.manual_seed(seed)
            return get_peft_model(model, adapter)
        return coterie.wrap(
            model,
            coterie.MixtureConfig(
                method=self.method,
                experts=self.experts,
                parameters={"rank": self.rank * experiment.rank, **self.parameters},
                modules={"include": sites, "exclude": []},
                also_train=[f"{experiment.head}.*"] if experiment.head else [],
                seed=seed,
            ),
        )


def contenders(experiment: Experiment) -> dict[str, Contender]:
    """Every method by the name that the tables use, with one expert for each task; routers decide by example."""
    tasks, steps = len(experiment.tasks), experiment.settings["steps"]
    return {
        "smear": Contender("smear", tasks),
        "smear_2x": Contender("smear", 2 * tasks),
        "tag": Contender("tag", tasks),
        "hash": Contender("hash", tasks),
        "switch": Contender("switch", tasks, parameters={"pool": "sequence", "expert_dropout": 0.1}),
        # The paper's temperature falls from 10 to 0.5 in the first third of its 100,000 steps.
        "st_gumbel": Contender("st_gumbel", tasks, parameters={"anneal": 10 / steps}),
        "reinforce": Contender("reinforce", tasks),
        "dselect_k": Contender("dselect_k", tasks),
        "soft_moe": Contender("soft_moe", tasks, parameters={"slots": max(1, round(experiment.tokens / tasks))}),
        "adamix": Contender("adamix", tasks),
        "poly": Contender("poly", tasks, parameters={"tasks": tasks}),
        "mhr": Contender("mhr", tasks, parameters={"tasks": tasks}),
        "ensemble": Contender("ensemble", tasks, matched=False),
        "single": Contender("single", 1),
        "single_wide": Contender("single", 1, rank=tasks, matched=False),
        "lora": Contender("lora", 1, rank=tasks, matched=False),
        "rslora": Contender("rslora", 1, rank=tasks, matched=False),
    }


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        make: (cache, steps) -> the experiment; a function of a module, so that a worker process can call it, that keeps
            what it made.
        cache: directory of cells and bases.
        steps: of the optimizer.
        name: of the contender.
        rate: peak learning rate of AdamW, after a warm-up over 6% of the steps, on a cosine to zero.
        seed: of the experts' start, the order of the rows and whatever the method draws.
    """

    make: Callable[[Path, int], Experiment]
    cache: Path
    steps: int
    name: str
    rate: float
    seed: int

    def cell(self, compute: Callable[[Experiment, Contender], dict[str, Any]] | None = None) -> dict[str, Any] | None:
        """What came out (see `train`), as it is kept; else what `compute` gives, kept; None without."""
        experiment = self.make(self.cache, self.steps)
        contender = contenders(experiment)[self.name]
        cells = Cells(self.cache / "routers", lambda text: print(f"! {text}", file=sys.stderr))
        key = (experiment.key, asdict(contender), self.rate, self.seed)

        def computed() -> dict[str, Any]:
            if compute is None:
                raise LookupError
            return compute(experiment, contender)

        try:
            return cells.get(key, computed)
        except LookupError:
            return None

    def finish(self) -> str:
        """Train, unless it is kept; what there is to say of it."""
        try:
            cell = self.cell(lambda e, contender: train(e, contender, self.rate, self.seed))
        except Exception as error:  # one method's failure must not cost a night of the others
            return f"FAILED: {type(error).__name__}: {error}"
        assert cell is not None
        return f"validation {cell['validation']:.4f}, test {mean(cell['accuracy']):.4f}, {cell['step_ms']:.0f} ms/step"


class _Steps(TrainerCallback):
    """Processor time of each step: forward, backward and update, without fetching the rows."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(process_time() - self._start)


def train(experiment: Experiment, contender: Contender, rate: float, seed: int) -> dict[str, Any]:
    """Train one contender and test it.

    Returns:
        `accuracy` by task on test rows; `validation`, the mean over tasks; `gates` on test rows (see `evaluate`);
        `trainable` parameters; `step_ms`, the median step's processor time; `memory_mib`, the peak of
        anonymous memory in training over what the process held before; the mean training `loss`; `code`.
    """
    give_back()
    steps = experiment.settings["steps"]
    before = anonymous_bytes() or 0
    clock = _Steps()
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as folder:
        model = contender.put_into(experiment.base(), experiment, seed)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=experiment.settings["batch"],
                learning_rate=rate, lr_scheduler_type="cosine",
                warmup_steps=max(1, round(0.06 * steps)), weight_decay=0.0, max_grad_norm=1.0, seed=seed,
                logging_strategy="no", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=experiment.train,
            callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    validation, _ = evaluate(model, experiment, experiment.validation)
    accuracy, gates = evaluate(model, experiment, experiment.test)
    return {
        "accuracy": accuracy,
        "validation": mean(validation),
        "gates": gates,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_ms": 1e3 * median(clock.seconds),
        "memory_mib": (peak.bytes - before) / 2**20,
        "loss": loss,
        "code": code_version(),
    }


@torch.inference_mode()
def evaluate(model: Any, experiment: Experiment, rows: Rows) -> tuple[list[float], dict[str, list[list[float]]]]:
    """Accuracy by task, and mean gates by task: layer -> (tasks, experts), of the layers that route."""
    model.eval()
    told = "task_ids" in signature(model.forward).parameters
    routed = hasattr(model, "coterie") and len(model.coterie.expert_names) > 1
    task_ids, labels = rows.columns["task_ids"], rows.columns["labels"]
    right: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    tracing: AbstractContextManager[dict[str, Tensor]] = coterie.routing_trace(model) if routed else nullcontext({})
    with tracing as trace:
        for start in range(0, len(rows), 256):
            batch = {name: column[start : start + 256] for name, column in rows.columns.items() if name != "labels"}
            tasks = batch["task_ids"] if told else batch.pop("task_ids")
            logits = model(**batch).logits.masked_fill(~experiment.classes[tasks], -torch.inf)
            right.append(logits.argmax(-1) == labels[start : start + 256])
            for layer, gates in trace.items():
                total = sums.setdefault(layer, torch.zeros(len(experiment.tasks), gates.shape[-1]))
                total.index_add_(0, tasks, over_tokens(gates.float(), batch.get("attention_mask")))
    counts = torch.bincount(task_ids, minlength=len(experiment.tasks))
    found = torch.zeros(len(counts)).index_add_(0, task_ids, torch.cat(right).float()) / counts
    return found.tolist(), {layer: (total / counts.unsqueeze(1)).tolist() for layer, total in sums.items()}


def over_tokens(gates: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1 or T, E) -> (B, E): the mean over the tokens that are no padding."""
    if mask is None or gates.shape[1] != mask.shape[1]:
        return gates.mean(1)
    weights = mask.unsqueeze(-1).to(gates.dtype)
    return (gates * weights).sum(1) / weights.sum(1)


@cached
def code_version() -> str:
    """A fingerprint of the code of mixtures and of the code that trains them."""
    here = Path(__file__).resolve()
    total = hashlib.sha256(here.read_bytes())
    for room in ("experts", "methods", "mixture", "routing", "training"):
        for path in sorted((here.parents[1] / "src" / "coterie" / room).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def _alone() -> None:
    """What a process that trains needs: one thread, and no slow arithmetic of numbers near zero."""
    quiet()
    logging.set_verbosity_error()  # the report of what a checkpoint holds besides
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@dataclass(frozen=True)
class Grid:
    """Methods x seeds of one experiment.

    Attributes:
        make, cache, steps: as in `Run`.
        rates: learning rates; the first seed's validation rows choose one for each method, which is better than its
            neighbours.
        seeds: how many.
    """

    make: Callable[[Path, int], Experiment]
    cache: Path
    steps: int
    rates: tuple[float, ...]
    seeds: int

    def run(self, name: str, rate: float, seed: int) -> Run:
        return Run(self.make, self.cache, self.steps, name, rate, seed)

    def scores(self, name: str) -> dict[float, float]:
        """Rate -> the first seed's validation accuracy, of the rates that were tried."""
        cells = {rate: self.run(name, rate, 0).cell() for rate in sorted(self.rates)}
        return {rate: cell["validation"] for rate, cell in cells.items() if cell is not None}

    def further(self, name: str) -> float | None:
        """The next rate to try: the middle one, then the neighbours of the best until both were tried."""
        scores, rates = self.scores(name), sorted(self.rates)
        if not scores:
            return rates[len(rates) // 2]
        at = rates.index(max(scores, key=scores.__getitem__))
        return next((rate for rate in rates[max(at - 1, 0) : at + 2] if rate not in scores), None)

    def rate(self, name: str) -> float | None:
        """The method's learning rate; None where a rate is still to be tried."""
        scores = self.scores(name)
        return None if self.further(name) is not None else max(scores, key=scores.__getitem__)

    def finish(self, names: Iterable[str], jobs: int) -> None:
        """Train what is not kept, several at a time, and say how it went."""
        names, asked = list(names), set[Run]()
        for _ in self.rates:
            nexts = {self.run(name, rate, 0) for name in names if (rate := self.further(name)) is not None}
            new = nexts - asked  # a failure is not tried again
            self._all(sorted(new, key=lambda run: names.index(run.name)), jobs)
            asked |= nexts
        chosen = {name: rate for name in names if (rate := self.rate(name)) is not None}
        self._all([self.run(name, rate, seed) for seed in range(1, self.seeds) for name, rate in chosen.items()], jobs)

    def _all(self, runs: list[Run], jobs: int) -> None:
        with ExitStack() as stack:
            if jobs > 1:
                pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_alone)
                outcomes = stack.enter_context(pool).map(Run.finish, runs)
            else:
                outcomes = map(Run.finish, runs)
            for run, outcome in zip(runs, outcomes, strict=True):
                print(f"{run.name}, rate {run.rate:g}, seed {run.seed}: {outcome}", flush=True)

    def result(self) -> dict[str, Any]:
        """What is kept of the grid, as JSON values; a method is left out until its learning rate is chosen."""
        experiment = self.make(self.cache, self.steps)
        base, _ = evaluate(experiment.base(), experiment, experiment.test)
        methods = {}
        for name, contender in contenders(experiment).items():
            rate = self.rate(name)
            if rate is None:
                continue
            cells = [self.run(name, rate, seed).cell() for seed in range(self.seeds)]
            kept = [cell for cell in cells if cell is not None]
            methods[name] = {
                **asdict(contender),
                "rank": contender.rank * experiment.rank,
                "rate": rate,
                "validation": {f"{each:g}": score for each, score in self.scores(name).items()},
                "trainable": kept[0]["trainable"],
                "step_ms": median(cell["step_ms"] for cell in kept),
                "memory_mib": median(cell["memory_mib"] for cell in kept),
                "accuracy": [cell["accuracy"] for cell in kept],
                "specialisation": [specialisation(cell["gates"]) for cell in kept] if kept[0]["gates"] else None,
                "gates": kept[0]["gates"],
                "code": sorted({cell["code"] for cell in kept}),
            }
        rows = {split: len(getattr(experiment, split)) for split in ("train", "validation", "test")}
        return {
            "about": experiment.about,
            "tasks": experiment.tasks,
            "rows": rows,
            "settings": {**experiment.settings, "sites": experiment.sites, "rates": self.rates},
            "base": base,
            "methods": methods,
            "versions": versions("torch", "transformers", "peft", "accelerate"),
            "machine": machine(),
        }


def specialisation(gates: dict[str, list[list[float]]]) -> float:
    """How much an expert says about the task: mutual information of the two, as a share of what it can be.

    0: every task spreads over the experts alike; 1: every task has experts of its own. Mean over layers; tasks weigh
    alike.

    Args:
        gates: layer -> (tasks, experts).
    """

    def entropy(shares: Tensor) -> Tensor:
        return torch.special.entr(shares).sum(-1)

    found = []
    for layer in gates.values():
        shares = torch.tensor(layer, dtype=torch.float64)
        shares = shares / shares.sum(1, keepdim=True)
        information = entropy(shares.mean(0)) - entropy(shares).mean()
        found.append(float(information) / math.log(min(shares.shape)))
    return mean(found)


def main(
    name: str,
    about: str | None,
    make: Callable[[Path, int], Experiment],
    steps: int,
    rates: Iterable[float],
    methods: Iterable[str] = (),
) -> None:
    """The command line of an experiment.

    Args:
        name: of the file in `results/`.
        about: the script's own text.
        make: see `Run`.
        steps, rates: the defaults.
        methods: the default; none: all.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(methods) or "all", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in rates), help="to choose from")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each with one thread")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--out", type=Path, help=f"default: results/{name}.json; of other steps, build/{name}.json")
    options = parser.parse_args()
    _alone()
    chosen = tuple(float(rate) for rate in options.rates.split(","))
    grid = Grid(make, options.cache, options.steps, chosen, options.seeds)
    experiment = make(options.cache, options.steps)
    print(experiment.about, flush=True)
    known = list(contenders(experiment))
    names = known if options.methods == "all" else options.methods.split(",")
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    grid.finish(names, options.jobs)
    result = grid.result()
    if len({code for method in result["methods"].values() for code in method["code"]}) > 1:
        print(f"! some runs were made by other code than the present: {options.cache / 'routers'}", file=sys.stderr)
    out = options.out or (RESULTS if options.steps == steps else Path("build")) / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(compact(result) + "\n")
    print(f"written: {out}")


def compact(value: Any) -> str:
    """JSON with one line for each innermost list, numbers at four digits."""
    rounded = json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(rounded, indent=1))
