"""A drawer of fourteen adapters, and every router over it: on the experts' own tasks, and on six that none has seen.

Base and tasks are those of the suite text20 (see `coterie.evaluation.suites.text20`): MiniLM, read by frozen embeddings
of the labels. The adapters are committed, see `adapters.py`. The six tasks held out were named before anything was
measured, each for its kinship with an expert's task: airports with cities, definitions with words, dates with
languages, pronunciations with characters, quantities with numbers, foods with compounds.

    python benchmarks/library_routers.py         # trains one LoRA for all tasks (20 minutes), measures for two hours
    python benchmarks/library_routers.py --ways "arrow;smile"     # some only; goes on where it was stopped

The figures go to benchmarks/results/library_routers.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import coterie
from adapters import ADAPTERS, HELD_OUT
from coterie.building.directory import whole_directory
from coterie.building.memory import PeakMemory, anonymous_bytes, give_back
from coterie.evaluation.cells import Cells
from coterie.evaluation.combine import ROOMS, Experts, Way, combined, meaning
from coterie.evaluation.extract import expert_state
from coterie.evaluation.ladder import linear_layers
from coterie.evaluation.reader import Reader, told
from coterie.evaluation.suite import Split, Task, digest, weights_sha256
from coterie.evaluation.suites.text20 import SUITE
from coterie.evaluation.train import quiet
from coterie.options import cache_directory
from routers import RESULTS, compact, over_tokens
from timing import Variant, machine, side_by_side, versions

ROWS, LOOKED_AT, VALIDATION = 500, 100, 100  # test rows of a task; of them, whose gates are kept; to choose from
FEW, BUDGET = 16, 40  # labelled rows of a task, and weights that are tried on them, of LoraHub
MIXED = {"steps": 100, "batch": 32}  # what is learned on all tasks, with frozen experts, at the best on validation of
RATES = {"cat": (0.03, 0.3), "xlora": (1e-3, 1e-2)}
JOINT = {"steps": 1400, "batch": 32, "learning_rate": 1e-3}  # one LoRA for all tasks: a third of the experts' steps
CLUSTERS = 5


@dataclass(frozen=True)
class Contender:
    """A way to answer all tasks.

    Attributes:
        method: of the mixture; None where there is none.
        parameters: other than its defaults.
        asks: what is asked for beside the adapters: data, training.
        kind: "mixture"; what is learned over one ("mixed", on rows of all tasks; "few", on a few rows of the task that
            is tested); "clusters", a mixture of fewer experts; "base"; "joint", one LoRA for all; "best", the one
            expert that is best on all tasks' validation rows; "own", the expert of the task.
    """

    method: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    asks: str = ""
    kind: str = "mixture"


WAYS = {
    "base": Contender(kind="base"),
    "best single expert": Contender(kind="best", asks="validation rows of all tasks"),
    "uniform": Contender("uniform"),
    "multi-task LoRA": Contender(kind="joint", asks="the data of all tasks, training"),
    "expert of the task": Contender("uniform", kind="own", asks="the task"),
    "smile": Contender("smile"),
    "arrow": Contender("arrow"),
    "arrow_factors": Contender("arrow_factors"),
    "spectr": Contender("spectr"),
    "logo": Contender("logo"),
    "retriever, selection": Contender("retriever", {"combine": "selection"}, "32 texts of each task"),
    "retriever, mixture": Contender("retriever", {"combine": "mixture"}, "32 texts of each task"),
    "retriever, fusion": Contender("retriever", {"combine": "fusion"}, "32 texts of each task"),
    "nearest_example": Contender("nearest_example", {}, "32 texts of each task"),
    "task_embedding": Contender("task_embedding", {}, "32 texts of each task"),
    "average_activation": Contender("average_activation", {}, "256 texts of each task"),
    "phatgoose": Contender("phatgoose", {}, "labelled rows of each task, 100 steps each"),
    "lorahub": Contender("lorahub", {}, f"the task, {FEW} labelled rows of it", "few"),
    "cat": Contender("cat", {}, "labelled rows of all tasks, 100 steps", "mixed"),
    "xlora": Contender("xlora", {}, "labelled rows of all tasks, 100 steps", "mixed"),
    f"arrow over {CLUSTERS} merged clusters (MBC)": Contender("arrow", {}, "", "clusters"),
}
"""By the names that the tables use."""


@dataclass
class Drawer:
    """The experiment.

    Attributes:
        reader: of the base.
        tasks: those of the experts first.
        experts: the adapters.
        cache: where what is trained and what is finished is kept.
    """

    reader: Reader
    tasks: tuple[Task, ...]
    experts: Experts
    cache: Path

    @property
    def names(self) -> list[str]:
        return list(self.experts.directories)

    @property
    def own(self) -> tuple[Task, ...]:
        return self.tasks[: len(self.names)]

    @property
    def key(self) -> list[Any]:
        """What every figure depends on."""
        settings = (MIXED, RATES, JOINT, FEW, BUDGET, CLUSTERS, ROWS, LOOKED_AT, VALIDATION)
        rows = [(task.key, task.test.key) for task in self.tasks]
        return [self.experts.keys, weights_sha256(self.reader.base), self.reader.settings, rows, settings]

    def measure(self, way: Contender) -> dict[str, Any]:
        """What there is to say of a way.

        Returns:
            `accuracy` by task, None where it does not answer; `ratio` of processor time of a batch to the base's;
            `memory_mib`, the peak of anonymous memory in answering that batch over what the process held before, the
            model among it; `parameters` over the base's; `seconds` of making it, with what is learned or searched for;
            and of what routes, on LOOKED_AT rows a task:
            `gates` (tasks, experts), means over tokens and layers; `right`, for each expert's task the share of
            tokens and layers whose largest gate is its expert's (of n that are equally large, the n-th part);
            `entropy` of a token's gates in a layer, as a share of what it can be.
        """
        with ExitStack() as stack:
            start = perf_counter()
            answer, model = stack.enter_context(self.made(way))
            made, accuracy = self.trained_for(way) or perf_counter() - start, []
            for task in self.tasks:
                start = perf_counter()
                with answer(task) as ready:
                    made += perf_counter() - start
                    scores = None if ready is None else self.reader.scores(ready, task, task.test.head(ROWS))
                accuracy.append(None if scores is None else float(scores.mean()))
            routed = way.kind not in ("base", "joint", "best", "own")
            return {
                "accuracy": accuracy,
                "ratio": self.ratio(answer),
                "parameters": sum(p.numel() for p in model.parameters()) / self.base_parameters,
                "memory_mib": self.peak(answer) / 2**20,
                "seconds": made,
                **(self.look(answer, len(model.coterie.expert_names), way.kind == "clusters") if routed else {}),
            }

    @property
    def base_parameters(self) -> int:
        return sum(p.numel() for p in self.reader.model.parameters())

    @contextmanager
    def made(self, way: Contender) -> Iterator[Any]:
        """How it answers a task (a block with the model, or None), and a model of it."""
        if way.kind == "base":
            yield self.same(self.reader.model), self.reader.model
        elif way.kind == "joint":
            model = self.joint()
            yield self.same(model), model
        elif way.kind == "best":
            model = self.alone(self.best())
            yield self.same(model), model
        else:
            with self.mixture(way) as model:
                yield {"own": self.by_task, "few": self.by_few}.get(way.kind, self.same)(model), model

    @contextmanager
    def mixture(self, way: Contender) -> Iterator[Any]:
        learned = way.method if way.kind == "mixed" else None
        built = Way("uniform" if learned else way.method or "", way.parameters, "base")
        with tempfile.TemporaryDirectory() as folder:
            experts = self.clustered(Path(folder)) if way.kind == "clusters" else self.experts
            with combined(built, experts, Path(folder)) as make:
                yield self.mixed(make()[0], learned) if learned else make()[0]

    @staticmethod
    def same(model: nn.Module) -> Callable[[Task], Any]:
        return lambda task: nullcontext(model)

    def by_task(self, model: Any) -> Callable[[Task], Any]:
        @contextmanager
        def answer(task: Task) -> Iterator[Any]:
            if task not in self.own:
                yield None
                return
            with torch.no_grad(), model.coterie.route(task.name):
                yield model

        return answer

    def by_few(self, model: Any) -> Callable[[Task], Any]:
        """Weights for each task, found once."""
        found: dict[str, Any] = {}

        def answer(task: Task) -> Any:
            if task.name not in found:
                loss = partial(self.loss, task)
                found[task.name] = coterie.lorahub(model, [task.train.head(FEW)], budget=BUDGET, loss=loss)
            return nullcontext(found[task.name])

        return answer

    def loss(self, task: Task, model: Any, rows: Split) -> Tensor:
        return self.reader.loss(model, task, rows)

    def alone(self, name: str) -> nn.Module:
        """The model of one expert."""
        return self.experts.fresh(expert_state(self.reader, self.experts.directories[name]))

    def best(self) -> str:
        """The expert that does best on all the experts' tasks, on validation rows."""
        kept = {name: self.on_validation(self.alone(name)) for name in self.names}
        return max(kept, key=kept.__getitem__)

    def mixed(self, model: Any, method: str) -> Any:
        """Another method's routers over the same experts, learned on rows of all their tasks in turn."""
        tried = []
        for rate in RATES[method]:
            torch.manual_seed(0)
            routers: Any = coterie.wrap(model, coterie.MixtureConfig(method=method), train="routers")
            for module in routers.modules():
                if isinstance(module, nn.Dropout):  # the experts were trained without, too
                    module.p = 0.0
            learn(self.reader, routers, self.own, learning_rate=rate, **MIXED)
            tried.append((self.on_validation(routers.eval()), -rate, routers))
        return max(tried, key=lambda each: each[:2])[2]

    def on_validation(self, model: Any) -> float:
        """Mean accuracy on validation rows of the experts' tasks."""
        return mean(self.reader.scores(model, t, t.validation.head(VALIDATION)).mean() for t in self.own)

    @property
    def joint_place(self) -> Path:
        rank = SUITE.recipes["lora"].rank
        key = digest([task.key for task in self.own], JOINT, rank, weights_sha256(self.reader.base))
        return self.cache / "experts" / f"joint-{key[:16]}"

    def joint(self) -> nn.Module:
        """One LoRA of the experts' rank, trained on all their tasks in turn; kept in the cache."""
        from peft import LoraConfig, PeftModel, get_peft_model

        rank, base = SUITE.recipes["lora"].rank, self.reader.base_model().requires_grad_(False)
        if not self.joint_place.is_dir():
            start = perf_counter()
            torch.manual_seed(0)
            layers = linear_layers(base, self.reader.blocks)
            model: Any = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)).eval()
            learn(self.reader, model, self.own, **JOINT)
            with whole_directory(self.joint_place) as folder:
                model.save_pretrained(folder)
                (folder / "seconds.json").write_text(json.dumps(perf_counter() - start))
            base = self.reader.base_model()
        merged: nn.Module = PeftModel.from_pretrained(base, str(self.joint_place)).merge_and_unload()
        return merged.eval()

    def trained_for(self, way: Contender) -> float:
        """Seconds of a training that is kept."""
        return json.loads((self.joint_place / "seconds.json").read_text()) if way.kind == "joint" else 0.0

    def clustered(self, folder: Path) -> Experts:
        """Each cluster's mean, as an adapter."""
        drawer = coterie.library.create(folder / "drawer", self.reader.base)
        for name, place in self.experts.directories.items():
            drawer.add(name, place, base=self.reader.base)
        found = coterie.library.cluster(drawer, CLUSTERS)
        fewer = coterie.library.merge_clusters(drawer, found, folder / "fewer")
        return Experts(self.reader, {" + ".join(n): fewer[c].path for n, c in zip(found, fewer, strict=True)})

    def ratio(self, answer: Callable[[Task], Any]) -> float:
        """Processor time of one batch of 128 rows over the base's, passes alternating."""
        with self.batch(answer) as call, self.batch(self.same(self.reader.model)) as base:
            found, _ = side_by_side(
                [Variant("base", base, nullcontext), Variant("way", call, nullcontext)], 1, process_time
            )
        return found["way"]["ratio"]

    def peak(self, answer: Callable[[Task], Any]) -> int:
        """Most anonymous memory, in bytes, that answering that batch takes beside the model."""
        with self.batch(answer) as call:
            give_back()
            before = anonymous_bytes() or 0
            with PeakMemory() as peak:
                for _ in range(3):
                    call()
        return peak.bytes - before

    @contextmanager
    def batch(self, answer: Callable[[Task], Any]) -> Iterator[Callable[[], Any]]:
        """A call that answers 128 rows of the first task."""
        inputs = self.tasks[0].test.head(128).inputs
        with answer(self.tasks[0]) as model, torch.inference_mode():
            ((order, batch),) = self.reader.batches(inputs, 128)  # type: ignore[call-arg]

            def call() -> Any:
                with told(model, (inputs[row] for row in order)):
                    return model(**batch)

            yield call

    @torch.inference_mode()
    def look(self, answer: Callable[[Task], Any], experts: int, fewer: bool) -> dict[str, Any]:
        """What the gates do; see `measure`."""
        gates, right, entropies = [], [], []
        for number, task in enumerate(self.tasks):
            total, hits, entropy, seen = torch.zeros(experts), 0.0, 0.0, 0
            inputs = task.test.head(LOOKED_AT).inputs
            with answer(task) as model:
                for rows, batch in self.reader.batches(inputs):
                    with told(model, (inputs[row] for row in rows)), coterie.routing_trace(model) as trace:
                        model(**batch)
                    mask = batch["attention_mask"]
                    for found in trace.values():
                        shares = found.float().abs()
                        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
                        each = over_tokens(shares, mask)
                        total += each.mean(0)
                        seen += 1
                        entropy += float(over_tokens(torch.special.entr(shares).sum(-1, keepdim=True), mask).mean())
                        largest = found == found.amax(-1, keepdim=True)
                        own = largest[..., number : number + 1] / largest.sum(-1, keepdim=True)
                        hits += float(over_tokens(own, mask).sum() / len(rows))
            gates.append((total / seen).tolist())
            entropies.append(entropy / seen / np.log(max(experts, 2)))
            if number < len(self.names) and not fewer:
                right.append(hits / seen)
        return {"gates": gates, "right": right, "entropy": mean(entropies)}


def learn(reader: Reader, model: Any, tasks: Sequence[Task], steps: int, batch: int, learning_rate: float) -> None:
    """Train what is trainable in a model on the tasks in turn: AdamW, a warm-up over 6% of the steps, then a cosine."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.06, cycle_momentum=False
    )
    rng = np.random.default_rng(0)
    for step in range(steps):
        task = tasks[step % len(tasks)]
        loss = reader.loss(model, task, task.train.take(rng.choice(len(task.train), batch, replace=False)))
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def code_version() -> str:
    """A fingerprint of the code that a figure depends on."""
    root = Path(coterie.__file__).parent
    rooms = (*ROOMS, "library", "methods", "training")
    files = [path for room in rooms for path in sorted((root / room).rglob("*.py"))]
    return digest([meaning(path) for path in [Path(__file__), root / "evaluation" / "combine.py", *files]])


def drawer(cache: Path) -> Drawer:
    """The experiment."""
    tasks = SUITE.tasks(test=ROWS)
    ordered = sorted(tasks, key=lambda task: task.name in HELD_OUT)  # stable: the suite's order otherwise
    own = {task.name: task for task in tasks if task.name not in HELD_OUT}
    reader = SUITE.reader(SUITE.base(cache, "cpu", False), "cpu")
    return Drawer(reader, tuple(ordered), Experts(reader, {name: ADAPTERS / name for name in own}, own), cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="all", help=f"some of: {'; '.join(WAYS)} (with semicolons between)")
    parser.add_argument("--cache", type=Path, default=cache_directory())
    parser.add_argument("--out", type=Path, help="default: results/library_routers.json; of some ways, build/")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cells = Cells(options.cache / "drawer", lambda text: print(f"! {text}", file=sys.stderr))
    unknown = set(chosen := list(WAYS) if options.ways == "all" else options.ways.split(";")) - set(WAYS)
    if unknown:
        parser.error(f"unknown: {'; '.join(unknown)}; known: {'; '.join(WAYS)}")
    name = "library_routers.json"
    out = options.out or (RESULTS / name if options.ways == "all" else Path("build") / name)
    out.parent.mkdir(parents=True, exist_ok=True)
    experiment = drawer(options.cache)
    result: dict[str, Any] = {
        "tasks": [task.name for task in experiment.tasks], "held_out": len(HELD_OUT), "rows": ROWS,
        "settings": {"mixed": MIXED, "rates": RATES, "joint": JOINT, "few": FEW, "budget": BUDGET}, "ways": {},
        "versions": versions("torch", "transformers", "peft"), "machine": machine(),
    }  # fmt: skip
    code = code_version()

    def found(way: Contender, measured: bool) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            if not measured:
                raise LookupError
            return experiment.measure(way)

        key = (*experiment.key, way.method, way.parameters, way.kind, code)
        return {"asks": way.asks, **cells.get(key, compute)}

    kept: dict[str, Any] = {}
    for name, way in WAYS.items():
        with suppress(LookupError):
            kept[name] = found(way, False)
    for name in chosen:
        kept[name] = found(WAYS[name], True)
        own, held = np.split(np.array(kept[name]["accuracy"], dtype=float), [-len(HELD_OUT)])
        print(f"{name}: {100 * own.mean():.1f}, held out {100 * held.mean():.1f}", flush=True)
        result["ways"] = {each: kept[each] for each in WAYS if each in kept}
        out.write_text(compact(result) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
