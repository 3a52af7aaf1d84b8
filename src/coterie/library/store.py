"""The library: a directory of adapters of one base model, each under its name, with its statistics beside it.

    library.json                 the manifest: the base, and each expert's folder, source and hashes
    experts/FOLDER/              a plain PEFT adapter, as any other: adapter_config.json, adapter_model.safetensors
    experts/FOLDER/expert.json   its layers, texts and provenance
    experts/FOLDER/statistics/   what was computed of it, or put in; one safetensors file each

A folder stands before the manifest names it, and the manifest is replaced as a whole, under a lock: whoever is killed,
and whenever, the library opens, and two processes that add to it at a time both do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from torch import Tensor

from ..building.directory import sweep, whole_directory
from ..building.extract_adapter import extract
from ..building.finish import versions
from ..building.inputs import Inputs, open_inputs
from ..building.journal import LOCK as HELD
from ..building.statistics import HOW
from ..errors import CoterieError
from ..merging.statistics import Batch
from ..recipe import read_recipe
from ..sources.adapter import AdapterExpert
from ..sources.checkpoint import require_finite
from ..sources.locate import Location, locate
from ..sources.manifest import (
    ADAPTER,
    EXPERTS,
    MANIFEST,
    Base,
    Entry,
    Manifest,
    folder_of,
    hash_of,
    inside,
    read_manifest,
)
from . import statistics
from .combine import CombineReport, combine
from .encoder import Encoder, account, embeddings, texts_of
from .expert import FACTS, Expert, describe
from .index import Index
from .lineage import Lineage, base_of

if TYPE_CHECKING:
    from .vectors import Loss

LOCK = ".lock"


@dataclass(frozen=True)
class Fault:
    """What `verify` finds: a file (or folder) and what is wrong with it; the expert that it belongs to."""

    expert: str | None
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" + (f" (expert {self.expert!r})" if self.expert else "")


def create(path: str | Path, base: str | Path, token: str | None = None) -> Library:
    """Make an empty library for experts of one base model, whose tensors are hashed now.

    Args:
        path: the directory, which appears when it is complete.
        base: directory or Hub id (`id@revision`) of the base model.
        token: Hub token.

    Raises:
        CoterieError: the directory exists, or the base cannot be read.
    """
    if os.path.lexists(path):
        raise CoterieError("exists already", str(path), "choose another directory, or add to the library that is there")
    place = locate(str(base), token)
    with whole_directory(Path(path), sources=[place.path]) as folder:
        (folder / EXPERTS).mkdir()
        _write_manifest(folder, Manifest(base=base_of(str(base), place, token)))
    return Library(Location(Path(path), str(path)), token)


def open(source: str | Path, token: str | None = None, base: str | Path | None = None) -> Library:
    """Open a library: a directory, or a Hub repository (`id@revision`), of which files come when they are asked for.

    Args:
        source: where it is.
        token: Hub token.
        base: where its base is, if it has moved; only changing the library needs it.

    Raises:
        CoterieError: it is no library, its manifest is damaged, or the base is another.
    """
    return Library(locate(str(source), token, [MANIFEST]), token, base)


@dataclass
class _Draft:
    """An expert on its way into the library: the folder that it is written in, and what its entry will say."""

    folder: Path
    kind: str = "adapter"
    source: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterExpert | None = None


class Library:
    """An opened library: `library[name]`, `name in library`, `list(library)`, `len(library)`.

    The manifest is read again whenever it has changed.

    Attributes:
        place: where it is; one from the Hub can be read only.
    """

    def __init__(self, place: Location, token: str | None = None, base: str | Path | None = None):
        self.place, self._token = place, token
        self._lock = FileLock(place.path / LOCK)
        self._known: tuple[Any, Manifest] | None = None
        self._skeletons: dict[Any, Inputs] = {}
        self._fetched: set[str] = set()
        self._indexes: dict[Any, Index] = {}
        self._manifest()
        if base is not None:
            self._lineage.require(None, str(base))

    # Reading

    def _manifest(self) -> Manifest:
        stamp = self._stamp()
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, read_manifest(self.place)
        return self._known[1]

    def _stamp(self) -> Any:
        """What changes whenever the manifest does."""
        try:
            stat = (self.path / MANIFEST).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.place.path

    @property
    def base(self) -> Base:
        """The model that all its experts were tuned from."""
        return self._manifest().base

    def __len__(self) -> int:
        return len(self._manifest().experts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest().experts)

    def __contains__(self, name: object) -> bool:
        return name in self._manifest().experts

    def __getitem__(self, name: str) -> Expert:
        """The expert of that name.

        Raises:
            CoterieError: there is none (names the nearest), or its directory is missing.
        """
        entry = self._manifest().entry(name, self._where)
        self._fetch(f"{EXPERTS}/{entry.folder}/*")
        return Expert(name, entry, folder_of(self.place, name, entry))

    def _fetch(self, pattern: str) -> None:
        """Bring files of a library from the Hub."""
        if self.place.revision is not None and pattern not in self._fetched:
            locate(f"{self.place.id}@{self.place.revision}", self._token, [pattern])
            self._fetched.add(pattern)

    def entries(self) -> dict[str, Entry]:
        """What the manifest says of each expert; no other file is read."""
        return dict(self._manifest().experts)

    def __repr__(self) -> str:
        return f"Library({str(self.path)!r}, {len(self)} experts of {self.base.source})"

    @property
    def _where(self) -> str:
        return f"library {self.place.path if self.place.revision is None else self.place.id}"

    # Changing

    def add(
        self,
        name: str,
        source: str | Path,
        *,
        base: str | Path | None = None,
        rank: int | None = None,
        residual: float | None = None,
        rest: str = "leave",
        head: str = "leave",
        description: str | None = None,
        examples: Sequence[str] = (),
        device: str = "cpu",
        jobs: int | None = None,
        console: Console | None = None,
    ) -> Expert:
        """Copy an adapter into the library, or extract one from a full fine-tune; it is there whole or not at all.

        Args:
            name: its name here; any text.
            source: directory or Hub id of a PEFT adapter or a full fine-tune, or `LIBRARY#EXPERT`.
            base: the model that it was tuned from; default: the one that an adapter's configuration names, and the
                library's for a full fine-tune. It must have the library's fingerprint.
            rank: of a full fine-tune, as in `coterie.extract`, like all up to `console`; or
            residual: that its layers' ranks must reach.
            rest: whether biases, norms and embeddings are saved: `leave` or `save`.
            head: the same of task heads.
            device: where deltas are factorised.
            jobs: layers at a time.
            console: where progress is shown; None for silence.
            description: what it is for.
            examples: texts of its task.

        Raises:
            CoterieError: the name is taken; the source is missing, damaged, or of another base; a full fine-tune
                without a rank.
        """
        source = str(source)
        _check_texts(description, examples)
        with self._new(name) as draft:
            place = locate(source, self._token)
            draft.source = f"{place.id}@{place.revision}" if place.revision and "#" not in place.id else place.id
            if base is not None:
                self._lineage.require(name, str(base))
            if place.is_adapter:
                if rank is not None or residual is not None:
                    raise CoterieError("is an adapter already", source, "leave out rank and residual")
                files = [inside(place.path, file) for file in ADAPTER]
                if base is None:
                    self._lineage.require_of(name, place)
                draft.adapter = self._open(name, place)
                for file in files:
                    shutil.copyfile(file, draft.folder / file.name)
            else:
                if rank is None and residual is None:
                    raise CoterieError(
                        "is a full fine-tune, of which the library keeps an adapter", source,
                        "say its rank, or the residual to reach",
                    )  # fmt: skip
                draft.kind = "extracted"
                report = extract(
                    self._lineage.here(), source, draft.folder / "extracted", rank=rank, residual=residual, rest=rest,
                    head=head, device=device, jobs=jobs, token=self._token, console=console,
                )  # fmt: skip
                for file in (draft.folder / "extracted").iterdir():
                    file.rename(draft.folder / file.name)
                (draft.folder / "extracted").rmdir()
                draft.adapter = self._open(name, Location(draft.folder, source))
                draft.facts["warnings"] = report.warnings
            draft.facts |= {"description": description, "examples": list(examples)}
            draft.facts["provenance"] = {"rank": rank, "residual": residual} if draft.kind == "extracted" else {}
        return self[name]

    def add_all(
        self, directory: str | Path, *, base: str | Path | None = None, say: Callable[[str], None] | None = None
    ) -> list[str]:
        """Add every PEFT adapter that stands in a directory, under its own directory's name.

        Those whose names are here already are left alone, so that what was stopped goes on when it is called again; so
        it does once an adapter that cannot be added is mended, or moved elsewhere.

        Args:
            directory: that holds the adapters' directories.
            base: as in `add`, of all.
            say: told the name of each, once it is here.

        Returns:
            The names that were added, in order.

        Raises:
            CoterieError: no adapter stands there; one cannot be added: those before it are here.
        """
        if not Path(directory).is_dir():
            raise CoterieError("no such directory", str(directory), "give the directory that holds the adapters'")
        found = sorted(config.parent for config in Path(directory).glob(f"[!.]*/{ADAPTER[0]}"))
        if not found:
            raise CoterieError("holds no directory of an adapter", str(directory), "give the directory above them")
        new = [place for place in found if place.name not in self]
        for place in new:
            self.add(place.name, place, base=base)
            if say is not None:
                say(place.name)
        return [place.name for place in new]

    def combine(
        self,
        name: str,
        operation: str,
        experts: Sequence[str],
        *,
        rank: int | None = None,
        description: str | None = None,
        examples: Sequence[str] = (),
        of: Library | None = None,
        **parameters: Any,
    ) -> CombineReport:
        """Make a new expert of others by exact arithmetic of their deltas.

        Args:
            name: of the new expert.
            operation: add, subtract, scale, negate, ext-sub, or subtract-factors, which is not exact and says so.
            experts: names of those that it is applied to, in order. Tensors that they hold whole (heads) are the
                first one's.
            rank: that the result is recompressed to, layer by layer, with the residual in the report; default: it is
                exact, at the sum of the ranks.
            description: as in `add`.
            examples: as in `add`.
            of: the library that holds them, of the same base; default: this one.
            **parameters: of the operation.

        Raises:
            CoterieError: unknown names, the name is taken, or experts that cannot be combined.
        """
        _check_texts(description, examples)
        with self._new(name) as draft:
            found = [(of or self)[expert] for expert in experts]
            report = combine(operation, found, parameters, rank, self.base.source, draft.folder)
            draft.kind, draft.source = "combined", f"{operation} of {', '.join(map(repr, experts))}"
            draft.adapter = self._open(name, Location(draft.folder, name))
            weights = {expert.name: expert.entry.sha256[ADAPTER[1]] for expert in found}
            draft.facts |= {"description": description, "examples": list(examples)}
            draft.facts["provenance"] = {**report.to_dict(), "weights": weights}
        return report

    def remove(self, name: str) -> None:
        """Take an expert out; what is in the library goes, its source stays.

        Raises:
            CoterieError: there is none of that name.
        """
        self._require_writable()
        with self._lock:
            manifest = self._manifest()
            entry = manifest.entry(name, self._where)
            experts = {n: e for n, e in manifest.experts.items() if n != name}
            self._write(Manifest(base=manifest.base, experts=experts))
            _discard(self.path / EXPERTS / entry.folder)

    @contextmanager
    def _new(self, name: str) -> Iterator[_Draft]:
        """A draft that becomes the expert of that name at the end of the block, or vanishes if the block fails."""
        self._require_writable()
        _check_name(name)
        out = self.path / EXPERTS / hashlib.sha256(name.encode()).hexdigest()[:16]
        with ExitStack() as held:
            with ExitStack() as writing:
                with self._lock:
                    self._require_free(name)
                    self._sweep()
                    folder = writing.enter_context(whole_directory(out))
                draft = _Draft(folder)
                yield draft
                entry = self._seal(name, out.name, draft)
                held.enter_context(self._lock)
                self._require_free(name)
                self._sweep()
            try:
                manifest = self._manifest()
                self._write(Manifest(base=manifest.base, experts={**manifest.experts, name: entry}))
            except BaseException:
                _discard(out)
                raise

    def _sweep(self) -> None:
        """Remove what killed processes left, folders that the manifest does not name; the lock must be held."""
        named = {entry.folder for entry in self._manifest().experts.values()}
        sweep(self.path / EXPERTS)
        with os.scandir(self.path / EXPERTS) as found:
            for folder in found:
                if folder.name not in named and ".partial-" not in folder.name:
                    _discard(Path(folder))

    @cached_property
    def _versions(self) -> dict[str, str]:
        return versions()

    def _seal(self, name: str, folder: str, draft: _Draft) -> Entry:
        """Write `expert.json`, and hash what is in the folder."""
        adapter = draft.adapter
        assert adapter is not None
        facts: dict[str, Any] = {"name": name, "base": {"id": self.base.source, "fingerprint": self.base.fingerprint}}
        facts |= {**describe(adapter), **draft.facts, "versions": self._versions}
        description = facts.pop("description")
        (draft.folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        paths = adapter.adapted
        ranks = [layer["rank"] for layer in facts["layers"].values()]
        return Entry(
            folder=folder, kind=draft.kind, source=draft.source, description=description,  # type: ignore[arg-type]
            sha256={f.name: hash_of(f) for f in sorted(draft.folder.iterdir()) if f.is_file() and f.name != HELD},
            targets=sorted({path.rpartition(".")[2] for path in paths}),
            modules=len(paths),
            ranks=[min(ranks), max(ranks)] if ranks else [],
            alpha=adapter.config["lora_alpha"],
            parameters=sum(info.numel for info in adapter.checkpoint.tensors.values()),
        )  # fmt: skip

    def _write(self, manifest: Manifest) -> None:
        _write_manifest(self.path, manifest)
        self._known = self._stamp(), manifest
        self._indexes.clear()

    def _require_writable(self) -> None:
        if self.place.revision is not None:
            raise CoterieError("comes from the Hub and can be read only", self._where, "copy it to a directory")
        if not os.access(self.path, os.W_OK):
            raise CoterieError("cannot be written", self._where, "copy it to a directory of your own")

    def _require_free(self, name: str) -> None:
        if name in self:
            raise CoterieError(f"holds an expert {name!r} already", self._where, "choose another name, or remove it")

    # The base

    @cached_property
    def _lineage(self) -> Lineage:
        return Lineage(self.base, self._where, self._token)

    def _open(self, name: str, place: Location) -> AdapterExpert:
        """An adapter read against the architecture of its task; every tensor is looked at once.

        Raises:
            CoterieError: it does not fit the base, or holds what is not finite.
        """
        task = (place.json(ADAPTER[0]) or {}).get("task_type")
        if task not in self._skeletons:
            recipe = {"method": "library", "base": self._lineage.here(), "experts": {name: str(place.path)}}
            self._skeletons[task] = open_inputs(read_recipe(recipe), self._token)
        found = AdapterExpert(name, place, self._skeletons[task].skeleton)  # type: ignore[arg-type]
        if not found.adapted:
            raise CoterieError("it adapts no layer", f"expert {name!r} ({place.path})", "check that it was trained")
        for disk in found.checkpoint.tensors:
            found.checkpoint.read(disk)
        return found

    # Checking

    def verify(self, names: Sequence[str] | None = None) -> list[Fault]:
        """Hash every file again: what is missing, changed, or leads out of its directory; nothing where all is well.

        Args:
            names: of experts; default: all.

        Raises:
            CoterieError: an unknown name.
        """
        entries = self.entries() if names is None else {n: self._manifest().entry(n, self._where) for n in names}
        faults = [fault for name, entry in entries.items() for fault in self._verify(name, entry)]
        if names is None and self.place.revision is None:
            named = {entry.folder for entry in self.entries().values()}
            for folder in sorted((self.path / EXPERTS).iterdir()):
                if folder.name not in named and not folder.name.startswith("."):
                    faults.append(Fault(None, str(folder), "belongs to no expert: what a killed process left"))
        return faults

    def _verify(self, name: str, entry: Entry) -> Iterator[Fault]:
        try:
            folder = self[name].path
        except CoterieError as error:
            yield Fault(name, entry.folder, error.what)
            return
        for file, sha256 in entry.sha256.items():
            try:
                if hash_of(inside(folder, file)) != sha256:
                    yield Fault(name, str(folder / file), "was changed since it was added")
            except CoterieError as error:
                yield Fault(name, str(error.where), error.what)
        for path in sorted((folder / statistics.FOLDER).glob("*.safetensors")):
            try:
                statistics.read(path)
            except CoterieError as error:
                yield Fault(name, str(path), error.what)

    # Statistics

    def statistics(self, name: str, kind: str) -> dict[str, Tensor]:
        """Statistics of an expert: of its weights, computed when first asked for, or as they were put in.

        Args:
            name: the expert.
            kind: for each adapted layer `prototype` (in,), `sigma` (r,) or `gram` (r, r); or what was put in: `gate`
                and `activation` (in,); `description`, `examples` or `task`, (n, d) under the name "embedding".

        Returns:
            Module path of the expert's architecture -> tensor. `Skeleton.in_memory` finds the same layer in another
            class of the same family.

        Raises:
            CoterieError: nobody put it in; the expert is no plain pair of factors; a file was changed.
        """
        expert = self[name]
        file = statistics.file_of(expert.path, kind)
        weights = expert.entry.sha256[ADAPTER[1]]
        if os.path.lexists(file):
            tensors, facts = statistics.read(file)
            if facts.get("weights") == weights:
                return tensors
        if kind not in statistics.OF_WEIGHTS:
            mend = HOW.get(kind, f"put them in with put; what is computed: {', '.join(statistics.OF_WEIGHTS)}")
            raise CoterieError(f"has no {kind!r} statistics", f"expert {name!r}", mend)
        expert.require_factors()
        compute = statistics.OF_WEIGHTS[kind]
        tensors = {path: compute(expert.factors(path)) for path in expert.layers}
        if self.place.revision is None:
            with suppress(PermissionError):  # somebody else's library can be read
                statistics.write(file, tensors, {"kind": kind, "weights": weights})
        return tensors

    def put(self, name: str, kind: str, tensors: Mapping[str, Tensor], **facts: str) -> None:
        """Keep statistics that were made from data.

        Args:
            name: the expert.
            kind: `gate` or `activation`, (in,) for layers of the expert; or a name of your own, with any tensors.
            tensors: module path -> tensor.
            **facts: of what they were made; kept in the file.

        Raises:
            CoterieError: a kind that is computed from weights; vectors that do not fit the expert's layers.
        """
        self._require_writable()
        expert = self[name]
        if kind in statistics.OF_WEIGHTS:
            raise CoterieError(f"{kind!r} is computed from the weights", f"expert {name!r}", "ask for it")
        for path, tensor in tensors.items():
            require_finite(tensor, path, f"{kind} of expert {name!r}")
            if kind in statistics.OF_INPUTS:
                layer = expert.layers.get(path)
                wanted = layer and [layer.shape[1]]
                if wanted is None or list(tensor.shape) != wanted:
                    raise CoterieError(
                        f"{kind} of {path!r} has shape {list(tensor.shape)}, and the layer asks for {wanted}",
                        f"expert {name!r}", "give one vector as wide as the input of a layer that it adapts",
                    )  # fmt: skip
        weights = expert.entry.sha256[ADAPTER[1]]
        file = statistics.file_of(expert.path, kind)
        statistics.write(file, tensors, {**facts, "kind": kind, "weights": weights})
        self._indexes.clear()

    def train_gates(
        self,
        name: str,
        model: Any,
        batches: Iterable[Any],
        *,
        steps: int = 100,
        learning_rate: float = 5e-3,
        loss: Loss | None = None,
    ) -> None:
        """Train an expert's gates on its own data, for PHATGOOSE, and keep them as its `gate` statistics.

        Args:
            name: the expert.
            model: the base, with the head that the expert was trained with; stays as it is.
            batches: keyword arguments of its forward, with labels; where they are fewer than steps, they come again.
            steps: of AdamW, everything but the gates frozen.
            learning_rate: after a warm-up of 6% of the steps.
            loss: (model, batch) -> the batch's mean loss, of batches in any form; None: the model's own.

        Raises:
            CoterieError: no batches, no labels, or a model that lacks layers (or the head) of the expert's base.
        """
        from .vectors import train_gates

        self._require_writable()
        gates = train_gates(model, self[name], batches, steps, learning_rate, loss)
        self.put(name, "gate", gates, steps=str(steps), learning_rate=str(learning_rate))

    def average_activation(self, name: str, model: Any, batches: Iterable[Batch]) -> None:
        """Keep the mean of what an expert's layers read of its own data as its `activation` statistics.

        Args and errors as of `train_gates`; no labels are needed.
        """
        from .vectors import average_activation

        self._require_writable()
        self.put(name, "activation", average_activation(model, self[name], batches))

    def embed(self, encoder: Encoder, kind: str = "description", names: Sequence[str] | None = None) -> int:
        """Embed what experts are for, where that has not been done with these texts and this encoder.

        Args:
            encoder: texts -> (n, d) vectors; `SentenceEncoder()` is MiniLM.
            kind: of the `description`, of each of the `examples`, or of the `task`: the examples' mean.
            names: of experts; default: all that have such texts.

        Returns:
            How many experts were embedded.

        Raises:
            CoterieError: an expert that is named has no such texts, or no expert has.
        """
        if not len(self):
            raise CoterieError("holds no experts", self._where, "add some")
        todo = {n: texts_of(kind, self[n].entry.description, self[n].examples) for n in (names or self)}
        lacking = [name for name, texts in todo.items() if not texts]
        if len(lacking) == len(todo) or (names and lacking):
            what = "examples" if kind != "description" else "description"
            raise CoterieError(
                f"has no {what} to embed",
                f"expert {lacking[0]!r}" if lacking else self._where,
                f"remove it, and add it again with its {what}",
            )
        made = 0
        for name, texts in todo.items():
            facts, expert = account(encoder, texts), self[name]
            file = statistics.file_of(expert.path, kind)
            old = statistics.read(file)[1] if file.is_file() else {}
            if texts and old | facts != old:
                self.put(name, kind, {"embedding": embeddings(encoder, kind, texts)}, **facts)
                made += 1
        return made

    def index(self, kind: str = "description", exact: bool | None = None) -> Index:
        """The vectors that `embed` made of all experts, for retrieval; kept until something changes here."""
        entries, key = self.entries(), (kind, exact, self._known and self._known[0])
        if key not in self._indexes:
            self._fetch(f"{EXPERTS}/*/{statistics.FOLDER}/{kind}.safetensors")
            rows, owners, encoders = [], [], set()
            for name, entry in entries.items():
                file = statistics.file_of(folder_of(self.place, name, entry), kind)
                tensors, facts = statistics.read(file) if os.path.lexists(file) else ({}, {})
                if facts.get("weights") == entry.sha256[ADAPTER[1]] and "embedding" in tensors:
                    rows.append(tensors["embedding"].numpy())
                    owners += [name] * len(rows[-1])
                    encoders.add((facts.get("encoder"), rows[-1].shape[1]))
            if not rows:
                raise CoterieError(f"no expert has an embedding of its {kind}", self._where, "call embed first")
            if len(encoders) > 1:
                raise CoterieError(f"embeddings of {kind} are by several encoders", self._where, "embed all by one")
            self._indexes = {key: Index(np.concatenate(rows), owners, exact)}
        return self._indexes[key]

    def nearest(
        self, vector: Any, k: int = 1, kind: str = "description", exact: bool | None = None
    ) -> list[tuple[str, float]]:
        """The `k` experts whose embeddings are nearest to a vector, and the cosines, the nearest first.

        Args:
            vector: (d,) by the encoder that the experts were embedded with.
            k: how many; all experts where there are fewer.
            kind: which embeddings; of several an expert has (`examples`), its nearest counts.
            exact: whether all are looked at; default: as long as there are few.
        """
        return self.index(kind, exact).nearest(vector, k)


def _discard(folder: Path) -> None:
    """Remove a directory, or a link in its place."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        raise CoterieError(f"expert name {name!r} is empty or holds control characters", "library", "choose another")


def _check_texts(description: str | None, examples: Sequence[str]) -> None:
    if isinstance(examples, str) or not all(isinstance(t, str) and t.strip() for t in examples):
        raise CoterieError("examples are no list of texts", "library", "give one or more texts that are not empty")
    if description is not None and not description.strip():
        raise CoterieError("the description is empty", "library", "leave it out, or say what the expert is for")
    if any(unicodedata.category(c) == "Cs" for text in (description or "", *examples) for c in text):
        raise CoterieError("a description or an example is not sound Unicode", "library", "mend its encoding")


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest; whoever reads it sees the old one or the new one."""
    staged = folder / f".{MANIFEST}"
    with staged.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, folder / MANIFEST)
