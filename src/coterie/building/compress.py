"""A fine-tune in a few percent of its size (ComPEFT, Yadav et al. 2023, arXiv:2311.13171, section 2)."""

from __future__ import annotations

import json
import math
import shutil
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table

from ..errors import CoterieError
from ..recipe import read_recipe
from ..sources.compressed import BITS, FACTS, bound, encode
from ..sources.experts import FullExpert, same
from ..sources.names import View
from .directory import whole_directory
from .engines import default_jobs, in_threads, one_thread
from .finish import copy_inputs, versions
from .inputs import Inputs, head_paths, open_inputs
from .memory import PeakMemory, give_back
from .progress import progress
from .writer import ShardWriter


@dataclass
class CompressedTensor:
    """What became of one tensor.

    Attributes:
        name: on disk.
        numel: its elements.
        kept: how many of them differ from the base's; None where it is stored whole.
        bytes: what it takes now.
        bound: what its signs and positions take at least.
        energy, missed: squares of the Frobenius norms of its delta, and of what that lost.
    """

    name: str
    numel: int
    kept: int | None
    bytes: int
    bound: float = 0.0
    energy: float = 0.0
    missed: float = 0.0


@dataclass(repr=False)
class CompressReport:
    """The account of a compression.

    Attributes:
        expert, base: where they were read from.
        out: the directory.
        density, scale: as asked for.
        tensors: each tensor of the fine-tune.
        bytes_before: the tensors of the fine-tune, as they are stored.
        bytes_after: what is written.
        warnings: what the user should know, a sentence each.
        seconds: wall time.
        peak_memory: peak anonymous memory of the process, bytes.
    """

    expert: str
    base: str
    out: str
    density: float
    scale: float
    tensors: list[CompressedTensor] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0

    def __repr__(self) -> str:
        return f"CompressReport({self.bytes_before:,} -> {self.bytes_after:,} bytes, residual {self.residual:.3f})"

    @property
    def ratio(self) -> float:
        """How many times smaller it is."""
        return self.bytes_before / max(self.bytes_after, 1)

    @property
    def residual(self) -> float:
        """`|delta - kept| / |delta|` over all tensors that are compressed."""
        energy = sum(t.energy for t in self.tensors)
        return (sum(t.missed for t in self.tensors) / energy) ** 0.5 if energy else 0.0

    @property
    def bound(self) -> float:
        """Bytes that signs and positions take at least, were each position as likely as any other."""
        return sum(t.bound for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "residual": self.residual, "bound": self.bound}

    def table(self) -> RenderableType:
        """The report for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        coded, whole = ([t for t in self.tensors if (t.kept is None) == is_whole] for is_whole in (False, True))
        bits, numel = 8 * sum(t.bytes for t in coded), sum(t.numel for t in coded)
        head.add_row("compressed", self.out)
        head.add_row("bytes", f"{self.bytes_before:,} -> {self.bytes_after:,}, {self.ratio:.1f} times smaller")
        head.add_row(
            "code",
            f"{bits / max(numel, 1):.3f} bits per element of {len(coded)} tensors; at least "
            f"{8 * self.bound / max(numel, 1):.3f} are needed",
        )
        head.add_row("whole", f"{len(whole)} tensors, {sum(t.bytes for t in whole):,} bytes")
        head.add_row("residual", f"{self.residual:.3f} of the delta's norm")
        for warning in self.warnings:
            head.add_row("!", warning, style="yellow")
        return head


@dataclass
class _Made:
    tensors: dict[str, torch.Tensor]
    line: CompressedTensor
    fact: dict[str, Any] | None = None


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    density: float = 0.1,
    scale: float = 1.0,
    architecture: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    token: str | None = None,
    console: Console | None = None,
) -> CompressReport:
    """Write a fine-tune as the signs of its delta's largest elements, which build and merge read like any other expert.

    Of each tensor's delta tau the `density` largest magnitudes are kept, and become `scale * std(tau) * sign(tau)`.
    Task heads, tensors that the base lacks or has in another shape, and integers are stored whole.

    Args:
        base: directory or Hub id of the base model; it is needed again wherever the expert is read.
        expert: the same of the full fine-tune.
        out: the directory to make.
        density: fraction of each tensor's elements to keep, in (0, 1].
        scale: the paper's alpha, to be chosen on validation data; large models take about 1.
        architecture: transformers class; default: the fine-tune's.
        jobs: tensors at a time; default: the cores.
        force: replace an existing directory that coterie wrote.
        token: Hub token.
        console: where progress is shown; None for silence.

    Raises:
        CoterieError: bad input.
    """
    started = time.monotonic()
    if not 0 < density <= 1:
        raise CoterieError(f"density is {density!r}", "compress", "give a number above 0, at most 1")
    if not 0 < scale < math.inf:
        raise CoterieError(f"scale is {scale!r}", "compress", "give a positive number")
    if jobs is not None and jobs < 1:
        raise CoterieError(f"jobs is {jobs}", "compress", "give a positive number")
    recipe = {
        "method": "compress",
        "base": str(base),
        "experts": {"fine-tune": str(expert)},
        "architecture": architecture,
    }
    inputs = open_inputs(read_recipe(recipe), token, "what is built of it")
    source = inputs.experts[0]
    if not isinstance(source, FullExpert) or not isinstance(source.view, View):
        raise CoterieError("is an adapter, which is small already", str(expert), "give a full fine-tune")
    stored = source.view.checkpoint
    location = inputs.stored.checkpoint.location
    report = CompressReport(str(expert), str(base), str(out), density, scale, warnings=inputs.warnings)
    names = [name for name in stored.tensors if name not in source.left_out]
    largest = max(stored.tensors[name].numel for name in names)
    parts = [f"{name}/{part}" for name in names for part in ("low", "high", "signs")]
    jobs = jobs or default_jobs(32 * largest, "cpu")
    facts: dict[str, Any] = {}
    with PeakMemory() as memory, one_thread(), whole_directory(Path(out), force, 0, inputs.folders) as folder:
        writer = ShardWriter(folder, 2**62, parts)
        make = partial(_make, inputs, _partners(inputs, names), density, scale)
        with progress(console) as bar, closing(in_threads(make, jobs, names)) as found:
            for made in bar.track(found, total=len(names), description="tensors"):
                for name, tensor in made.tensors.items():
                    writer.add(name, tensor)
                report.tensors.append(made.line)
                if made.fact is not None:
                    facts[made.line.name] = made.fact
        writer.finish(Path(BITS).stem)
        shutil.copyfile(stored.location.path / "config.json", folder / "config.json")
        copy_inputs(stored.location.path, folder)
        report.bytes_before = sum(stored.tensors[name].bytes for name in names)
        report.bytes_after = writer.total_bytes
        report.seconds, report.peak_memory = time.monotonic() - started, memory.bytes
        named = location.id if location.revision else str(location.path.resolve())
        written = {
            "base": {"id": named, "revision": location.revision},
            "tensors": facts,
            "versions": versions(),
            "report": {**report.to_dict(), "out": None, "tensors": None},
        }
        (folder / FACTS).write_text(json.dumps(written, indent=1, ensure_ascii=False), encoding="utf-8")
    return report


def _partners(inputs: Inputs, names: list[str]) -> dict[str, str]:
    """The base's names on disk for the fine-tune's: the same, or that of the same tensor in memory; none for heads."""
    base, skeleton = inputs.stored.checkpoint.tensors, inputs.stored.skeleton
    in_memory, heads = {skeleton.in_memory(name): name for name in base}, head_paths(skeleton)
    body = [name for name in names if skeleton.in_memory(name)[0].rpartition(".")[0] not in heads]
    partners = {name: name if name in base else in_memory.get(skeleton.in_memory(name)) for name in body}
    return {name: partner for name, partner in partners.items() if partner is not None}


def _make(inputs: Inputs, partners: dict[str, str], density: float, scale: float, name: str) -> _Made:
    """One tensor, coded or whole."""
    inputs = inputs.reader()
    value = inputs.checkpoints["expert fine-tune"].read(name)
    base = inputs.stored.checkpoint.read(partners[name]) if name in partners else None
    made = _Made({name: value}, CompressedTensor(name, value.numel(), None, value.numel() * value.element_size()))
    if base is not None and base.shape == value.shape and value.is_floating_point():
        tau = torch.zeros(value.numel()) if same(value, base) else (value.float() - base.float()).flatten()
        spread = float(tau.std(correction=0)) if len(tau) else 0.0
        if spread > 0 or not tau.any():
            positions = _largest(tau.abs(), max(1, round(density * len(tau)))) if spread > 0 else tau[:0].long()
            kept, size = tau[positions], scale * spread
            bits = encode(positions.numpy(), (kept < 0).numpy())
            parts = {"low": bits.low, "high": bits.high, "signs": bits.signs}
            made.tensors = {f"{name}/{part}": torch.from_numpy(array) for part, array in parts.items()}
            energy = float(tau.square().sum(dtype=torch.float64))
            missed = energy - 2 * size * float(kept.abs().sum(dtype=torch.float64)) + len(kept) * size**2
            needed = bound(len(tau), len(kept)) / 8
            made.line = CompressedTensor(name, len(tau), len(kept), bits.bytes, needed, energy, max(missed, 0.0))
            made.fact = {
                "shape": list(value.shape),
                "base": partners[name],
                "sha256": inputs.stored.checkpoint.sha256[partners[name]],
                "count": bits.count,
                "width": bits.width,
                "value": size,
            }
    give_back()
    return made


def _largest(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k largest, ascending, of equal ones the first; zeros are left out."""
    smallest = magnitudes.kthvalue(len(magnitudes) - k + 1).values
    above = (magnitudes > smallest).nonzero().squeeze(1)
    equal = (magnitudes == smallest).nonzero().squeeze(1)[: k - len(above)]
    return above if smallest == 0 else torch.cat([above, equal]).sort().values
