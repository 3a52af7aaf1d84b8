"""A method by its name -> one model of the experts, built or merged from their files as a user would."""

from __future__ import annotations

import ast
import inspect
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import coterie

from .. import library, methods
from ..errors import CoterieError
from ..library.encoder import Encoder, account, embeddings, minilm
from ..merging import registry as merges
from ..merging.statistics import Statistics, fisher, gram
from ..merging.statistics import read as read_moments
from ..registration import Registered
from ..sources.checkpoint import headers
from ..sources.locate import locate
from ..sources.statistics import read as read_vectors
from ..sources.statistics import write as write_vectors
from .extract import WEIGHTS, expert_state
from .ladder import State, load
from .reader import TEXTS, Reader
from .suite import Task, digest, fingerprint

SCALES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
BY_VECTORS: list[dict[str, Any]] = [{}, *({"top_k": 1, "pool": pool} for pool in ("token", "sequence", "model"))]
BY_TOKEN: list[dict[str, Any]] = [
    {"rank": rank, "gate_rank": gate} for rank, gate in product((16, 32, 64), (4, 16, 32)) if gate <= rank
]
GRIDS: dict[str, list[dict[str, Any]]] = {
    "smile": [*BY_TOKEN, *({"gate_rank": gate, "pool": "model"} for gate in (4, 16, 32))],
    "average_activation": BY_VECTORS,
    "phatgoose": BY_VECTORS,
    "retriever": [{}, {"combine": "selection"}],
    "task_embedding": [{}, {"top_k": 1}],
}
"""Parameters to choose from on validation rows, by method. One without an entry chooses its `scale` from SCALES, if it
has one."""

STATISTICS_ROWS = 256
"""Training rows of each task from which Gram matrices, Fisher information and mean activations are gathered."""

EXAMPLES = 32
"""Training rows of each task whose text is embedded, for retrieval."""

FULL_RANK = 32
"""Rank of a full fine-tune's linear layers where a method would keep an adapter's own."""

GATE_ROWS, GATE_BATCH = 3200, 32
"""Training rows of each task that PHATGOOSE's gates learn from, and those of a step."""

LEFT, DAY = "run-", 24 * 60 * 60
"""How directories of models that are being run begin, and the age in seconds at which nobody is taken to run them."""

ROOMS = ("sources", "experts", "routing", "mixture", "building")
"""What makes and runs a mixture, whatever its method."""


@dataclass(frozen=True)
class Way:
    """A method with all its parameters.

    Args:
        method: its name.
        parameters: as run, the defaults filled in.
        others: what everything that is no mixture layer follows; None for a merge.
    """

    method: str
    parameters: dict[str, Any]
    others: str | None = None

    @property
    def key(self) -> list[Any]:
        """All that the result depends on beside base and experts."""
        return [self.method, self.parameters, self.others, source_key(self.method)]

    @property
    def needs_task(self) -> bool:
        """Whether it answers only where the task is known: a mixture that holds one model per task."""
        return is_mixture(self.method) and methods.get(self.method).assemble(**self.parameters).routing.score in (
            "tag",
            "task",
        )

    @property
    def needs(self) -> str | None:
        """The kind of statistics that it is told of every expert, if any."""
        if is_mixture(self.method):
            return methods.get(self.method).assemble(**self.parameters).statistics
        return merges.get(self.method).needs


@dataclass
class Experts:
    """The experts of a comparison, in the order of their tasks.

    Args:
        reader: of the base.
        directories: name -> full fine-tune or adapter.
        tasks: by the experts' names, whose training rows the merges that need statistics are given.
        warn: told of a file of vectors that is damaged, and so made anew.
        gathered: file of statistics -> the seconds that it took to gather them.
    """

    reader: Reader
    directories: dict[str, Path]
    tasks: dict[str, Task] = field(default_factory=dict)
    warn: Callable[[str], None] = lambda text: None
    gathered: dict[Path, float] = field(default_factory=dict, repr=False)
    _kept: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def keys(self) -> dict[str, str]:
        """What every expert is, by name."""
        return {name: fingerprint(path) for name, path in self.directories.items()}

    @cached_property
    def base(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.reader.model.state_dict().items()}

    def state(self, name: str) -> dict[str, Tensor]:
        """The base's tensors as they are in the expert."""
        if name not in self._kept:
            self._kept[name] = expert_state(self.reader, self.directories[name])
        return self._kept[name]

    def fresh(self, state: State) -> nn.Module:
        """A model with these tensors."""
        return load(self.reader.base_model(), state)

    @cached_property
    def encoder(self) -> Encoder:
        """By which routers that retrieve know inputs."""
        return getattr(self.reader, "encoder", None) or minilm()

    def statistics(self, name: str, kind: str, folder: Path) -> Path:
        """A file of what a merge or a router needs to know of an expert, from rows that it was trained on.

        Args:
            name: of the expert.
            kind: "gram" or "fisher", of a merge; "task" or "examples", embeddings, "gate" or "activation".
            folder: where the file is, or is made.

        Raises:
            CoterieError: the task has no training rows.
        """
        data = [self.tasks[name].key, fingerprint(self.reader.base), self.reader.settings, meaning(Path(__file__))]
        data.append(meaning(Path(inspect.getfile(type(self.reader)))))
        if kind in ("task", "examples"):
            data.append(account(self.encoder, []))
        file = folder / f"{digest(self.keys[name], kind, *data)[:16]}.safetensors"
        if self._sound(file, kind):
            return file
        if not len(self.tasks[name].train):
            raise CoterieError(
                f"has no train rows, of which its {kind!r} statistics are made", f"task {name!r}", "give some"
            )
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        if kind in ("gram", "fisher"):
            self._moments(name, kind).write(file, force=True)
        else:
            found, facts = self._vectors(name, kind), {"kind": kind}
            if kind in ("task", "examples"):
                facts |= {"encoder": account(self.encoder, [])["encoder"]}
            write_vectors(file, found, facts | {"seconds": str(time.perf_counter() - started)})
        self.gathered[file] = time.perf_counter() - started
        return file

    def _sound(self, file: Path, kind: str) -> bool:
        """Whether a file of statistics is there and undamaged."""
        if not file.exists():
            return False
        try:
            if kind in ("gram", "fisher"):
                read_moments(file)
            else:
                self.gathered[file] = float(read_vectors(file)[1]["seconds"])
        except CoterieError:
            self.warn(f"{file} is damaged; what it held is computed anew")
            return False
        return True

    def _moments(self, name: str, kind: str) -> Statistics:
        task, model = self.tasks[name], self.fresh(self.state(name))
        rows = task.train.head(STATISTICS_ROWS).inputs
        if kind == "gram":
            return gram(model, (batch for _, batch in self.reader.batches(rows)))
        single = (rows[i : i + 1] for i in range(len(rows)))
        batches = (batch for row in single for _, batch in self.reader.batches(row))
        return fisher(model, batches, logits=partial(self.reader.logits, task))

    def _vectors(self, name: str, kind: str) -> dict[str, Tensor]:
        """Embeddings of the task's inputs; or vectors of the expert in a library of its own, trained or gathered there,
        of a full fine-tune its adapter's."""
        task, reader, expert = self.tasks[name], self.reader, self.directories[name]
        if kind in ("task", "examples"):
            inputs = list(task.train.head(EXAMPLES).inputs)
            if not hasattr(reader, "encoder") and not all(isinstance(each, str) for each in inputs):
                raise CoterieError("its inputs are no texts, by which the method retrieves", f"task {name!r}", TEXTS)
            return {"embedding": embeddings(self.encoder, kind, inputs)}
        with tempfile.TemporaryDirectory() as folder:
            alone = library.create(Path(folder) / "library", reader.base)
            alone.add(name, expert, base=reader.base, rank=None if locate(str(expert)).is_adapter else FULL_RANK)
            if kind == "gate":
                starts = range(0, min(len(task.train), GATE_ROWS), GATE_BATCH)
                batches = [task.train.take(np.arange(i, min(i + GATE_BATCH, len(task.train)))) for i in starts]
                alone.train_gates(name, reader.base_model(), batches, loss=lambda m, rows: reader.loss(m, task, rows))
            else:
                rows = task.train.head(STATISTICS_ROWS).inputs
                alone.average_activation(name, reader.base_model(), [batch for _, batch in reader.batches(rows)])
            return alone.statistics(name, kind)

    @property
    def parameters(self) -> int:
        """How many numbers all experts are: fine-tunes as many as the base each, adapters their own beside one base."""
        base = sum(parameter.numel() for parameter in self.reader.model.parameters())
        files = [directory / WEIGHTS for directory in self.directories.values()]
        adapters = [sum(tensor.numel for _, tensor in headers(file)) for file in files if file.exists()]
        return base * (len(files) - len(adapters) + bool(adapters)) + sum(adapters)

    def rank(self) -> int | None:
        """The largest rank of the experts, if all are LoRA adapters."""
        from ..sources.locate import Location

        configs = [Location(path, str(path)).json("adapter_config.json") for path in self.directories.values()]
        return max(int(config["r"]) for config in configs if config) if all(configs) else None


def known() -> list[str]:
    """Every method that makes one model of experts: the mixtures that are built, then the merges."""
    return [m.name for m in methods.known() if not m.trained] + [m.name for m in merges.known()]


def is_mixture(name: str) -> bool:
    return name in {m.name for m in methods.known()}


def find(name: str) -> Registered:
    """The mixture method or merge of that name.

    Raises:
        CoterieError: there is none; names the nearest.
    """
    if name not in known():
        from ..recipe import nearest

        if is_mixture(name):
            raise CoterieError(
                f"{name} is trained and not built", "--methods", "name methods that are built of given experts"
            )

        raise CoterieError(f"unknown method {name!r}", "--methods", nearest(name, known()))
    return methods.get(name) if is_mixture(name) else merges.get(name)


def ways(name: str, experts: int, grid: list[dict[str, Any]] | None = None, adapters: bool = True) -> list[Way]:
    """The method with its defaults, then with each other parameters to choose from.

    Args:
        name: of the method.
        experts: how many there are; as many answer at most.
        grid: the parameters to choose from; default: as `GRIDS` has them.
        adapters: whether the experts are; of full fine-tunes, whose rank is full, `FULL_RANK` is kept by default.
    """
    method = find(name)
    if grid is None:
        grid = GRIDS.get(name, [{"scale": scale} for scale in SCALES] if "scale" in method.defaults else [])
    others, defaults = "base" if is_mixture(name) else None, dict(method.defaults)
    if "top_k" in defaults:
        defaults["top_k"] = min(defaults["top_k"], experts)
    if defaults.get("rank") == "full" and not adapters:
        defaults["rank"] = FULL_RANK
    found: list[Way] = []
    for parameters in ({}, *grid):
        way = Way(name, {**defaults, **parameters}, others)
        found += [way] if way not in found else []
    return found


@contextmanager
def combined(way: Way, experts: Experts, folder: Path) -> Iterator[Callable[[], tuple[nn.Module, dict[str, Any]]]]:
    """Gives a function that makes, at its first call, the model and the record of its making.

    The record: `seconds` of making it from files, those of gathering the statistics that it needs among them (as long
    as it took when they are kept from before); `parameters`, and for a mixture `overlap` of the gate subspaces (with
    `chance`) and the build's `warnings`.

    Args:
        way: method and parameters.
        experts: what is combined.
        folder: where a directory of its own stands for the time of the block; vectors that routers hold of an expert's
            data are kept in it, by the code that makes them.
    """
    stack = ExitStack()

    @cache
    def make() -> tuple[nn.Module, dict[str, Any]]:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_left(folder)
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(None, LEFT, folder, ignore_cleanup_errors=True)))
        out, vectors = own / "model", folder / "vectors" / source_key(way.method)[:16]
        given = recipe(way, experts, vectors if is_mixture(way.method) else own / "statistics")
        record: dict[str, Any] = {"warnings": [], "overlap": None, "chance": None}
        if is_mixture(way.method):
            report: Any = coterie.build(given, out=out)
            record |= {"warnings": report.warnings}
            if report.overlap:
                record["overlap"], record["chance"] = report.overlap
            model: nn.Module = coterie.load(str(out)).to(experts.reader.device)
        else:
            report = coterie.merge(given, out=out)
            model = experts.fresh(expert_state(experts.reader, out))
        gathering = sum(experts.gathered[Path(e["statistics"])] for e in given["experts"].values() if way.needs)
        record |= {"seconds": gathering + report.seconds, "parameters": sum(p.numel() for p in model.parameters())}
        return model, record

    with stack:
        yield make


def _remove_left(folder: Path) -> None:
    """Remove the directories of models whose run was killed."""
    for left in folder.glob(f"{LEFT}*"):
        with suppress(FileNotFoundError):  # another process has removed it
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)


def recipe(way: Way, experts: Experts, folder: Path | None = None) -> dict[str, Any]:
    """The recipe that makes the same from files; `folder` is where statistics are kept that it needs."""
    sources: dict[str, Any] = {name: str(path) for name, path in experts.directories.items()}
    if way.needs and folder:
        sources = {
            n: {"source": s, "statistics": str(experts.statistics(n, way.needs, folder))} for n, s in sources.items()
        }
    whole: dict[str, Any] = {
        "method": way.method, "base": str(experts.reader.base), "experts": sources, "parameters": way.parameters,
    }  # fmt: skip
    if way.others:
        whole["others"] = way.others
    if not is_mixture(way.method) and hasattr(experts.reader, "head_names"):
        whole["head"] = next(iter(sources))  # every task is read through its own expert's head in any case
    return whole


@cache
def source_key(method: str) -> str:
    """sha256 (hex) of the code that determines what a method makes, whatever else changes.

    That is its own file and the files of its room that it imports; and for a merge, what reads the sources and merges a
    tensor; for a mixture, the rooms that build and run it, and what gathers what its routers hold of the tasks' data.
    """
    root = Path(coterie.__file__).parent
    own = Path(inspect.getfile(find(method).function))
    data: list[Any] = []
    if is_mixture(method):
        engine = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
        if methods.get(method).assemble(**methods.get(method).defaults).statistics is not None:
            engine += [*sorted((root / "library").rglob("*.py")), root / "training" / "wrap.py"]
            data = [STATISTICS_ROWS, EXAMPLES, FULL_RANK, GATE_ROWS, GATE_BATCH]
    else:
        engine = sorted(
            {f for name in ("steps", "inputs") for f in _with_imports(root / "merging" / f"{name}.py", set())}
        )
    return digest([meaning(path) for path in [*sorted(_with_imports(own, set())), *engine]], *data)


def _with_imports(path: Path, seen: set[Path]) -> set[Path]:
    """`seen`, the file and those of its own room that it imports, all the way; what registers or reports changes no
    result."""
    seen.add(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                file = path.with_name(f"{name}.py")
                if file.exists() and file.stem not in ("registry", "report") and file not in seen:
                    _with_imports(file, seen)
    return seen


@cache
def meaning(path: Path) -> str:
    """A source file without comments, layout and docstrings, which change no result."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)
