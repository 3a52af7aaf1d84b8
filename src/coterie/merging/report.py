"""What a merge did, as data and as a table: how far each tensor moved, and how far the experts agree on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

# The share of entries, by magnitude, against the majority's sign, above what unrelated deltas have.
CONFLICT_WARNING = 0.05
# A merge that moves further than this many times its experts did, and one that an expert has hardly a share in.
FAR_WARNING, LOST_WARNING = 1.5, 0.1


@dataclass
class Line:
    """One merged tensor, in numbers; sums over its entries, so that lines add up.

    Attributes:
        name: as it is written.
        shape: its shape.
        method: the merge that made it.
        squares: squared norms of the experts' deltas (before weights), of the base, and of the merged delta.
        products: inner products of the experts' deltas with the merged one.
        mass: sum of the magnitudes of the experts' weighted deltas.
        net: sum of the magnitudes of their sum.
        capped: the factor by which the norm budget shortened the merged delta.
        overlap: mean overlap of the experts' leading right singular subspaces, in a full report of a matrix.
        chance: what overlap unrelated experts would have.
    """

    name: str
    shape: list[int]
    method: str
    squares: list[float]
    products: list[float]
    mass: float
    net: float
    capped: float = 1.0
    overlap: float | None = None
    chance: float | None = None

    @property
    def path(self) -> str:
        return self.name

    @property
    def d_out(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def d_in(self) -> int:
        return prod(self.shape[1:])

    def take(self, sums: Sequence[float]) -> None:
        """Add sums in this order: squares, products, mass, net."""
        count = len(self.squares)
        self.squares = [a + b for a, b in zip(self.squares, sums[:count], strict=True)]
        self.products = [a + b for a, b in zip(self.products, sums[count:-2], strict=True)]
        self.mass, self.net = self.mass + sums[-2], self.net + sums[-1]

    def add(self, other: Line) -> None:
        """Take another tensor's sums into this one's."""
        self.take([*other.squares, *other.products, other.mass, other.net])

    @property
    def base(self) -> float:
        """|base|."""
        return sqrt(self.squares[-2])

    @property
    def merged(self) -> float:
        """|merged - base|."""
        return sqrt(self.squares[-1])

    @property
    def experts(self) -> list[float]:
        """|expert - base| for each expert."""
        return [sqrt(square) for square in self.squares[:-2]]

    @property
    def moved(self) -> float | None:
        """|merged - base| / |base|; None where there is no base."""
        return self.merged / self.base if self.base else None

    @property
    def reach(self) -> float | None:
        """|merged - base| over the mean |expert - base|; None where no expert changes the tensor."""
        mean = sum(self.experts) / max(len(self.experts), 1)
        return self.merged / mean if mean else None

    @property
    def distances(self) -> list[float]:
        """|merged - expert| for each expert."""
        pairs = zip(self.squares, self.products, strict=False)
        return [sqrt(max(self.squares[-1] + square - 2 * product, 0.0)) for square, product in pairs]

    @property
    def cosines(self) -> list[float | None]:
        """Cosine of the merged delta to each expert's; None where one of them is zero."""
        lengths = [norm * self.merged for norm in self.experts]
        return [p / length if length else None for p, length in zip(self.products, lengths, strict=True)]

    @property
    def conflict(self) -> float | None:
        """Share of the experts' entries, by magnitude, whose sign is not the majority's (by mass, as in TIES)."""
        return (1 - self.net / self.mass) / 2 if self.mass else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: what the sums say."""
        keys = ("name", "shape", "method", "capped", "overlap", "chance")
        derived = ("base", "merged", "experts", "moved", "reach", "distances", "cosines", "conflict")
        return {key: getattr(self, key) for key in (*keys, *derived)}


def total(lines: Sequence[Line], experts: int) -> Line:
    """All lines as one."""
    whole = Line("total", [], "", [0.0] * (experts + 2), [0.0] * experts, 0.0, 0.0)
    for line in lines:
        whole.add(line)
    return whole


@dataclass(repr=False)
class MergeReport:
    """The account of a merge: every tensor of every source is in it.

    Attributes:
        method, parameters, experts: as run.
        architecture: transformers class of the result.
        out: the directory, or None in memory.
        lines: one for each floating tensor that was merged.
        kept: tensor -> why it is not merged: a buffer, the head of one expert, what `others` keeps of the base.
        left_out: source -> tensor on disk -> why it is not used.
        warnings: what the user should know, a sentence each.
        parameters_written: how many parameters the result has.
        bytes_read, bytes_written: traffic of tensors.
        seconds: wall time.
        peak_memory: peak anonymous memory of the process, bytes.
    """

    method: str
    parameters: dict[str, Any]
    experts: list[str]
    architecture: str
    out: str | None = None
    lines: list[Line] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    parameters_written: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def __repr__(self) -> str:
        return (
            f"MergeReport({self.method} of {len(self.experts)} experts in {self.architecture}: {len(self.lines)} "
            f"tensors merged, {len(self.kept)} kept, {len(self.warnings)} warnings)"
        )

    @property
    def total(self) -> Line:
        """All merged tensors as one."""
        return total(self.lines, len(self.experts))

    def conclude(self) -> None:
        """Add the warnings that only the whole merge can tell."""
        whole, count = self.total, len(self.experts)
        if not self.lines:
            return
        if not any(whole.experts):
            self.warnings.append("no expert changes any tensor that is merged: this is the base")
        elif whole.base and not whole.merged:
            self.warnings.append("nothing of the experts' changes is left in the merge: this is the base")
        chance = (1 - 1 / sqrt(count)) / 2
        if whole.base and whole.conflict is not None and whole.conflict > chance + CONFLICT_WARNING:
            self.warnings.append(
                f"the experts pull in opposite directions: {whole.conflict:.0%} of their changes, by magnitude, have "
                f"another sign than the majority's (unrelated ones: {chance:.0%}); what cancels is lost to all"
            )
        if whole.base and (whole.reach or 0.0) > FAR_WARNING:
            self.warnings.append(
                f"the merge moves {whole.reach:.1f} times as far from the base as its experts did on average; "
                "a smaller scale, or `norm_budget: 1.0`, keeps it near what was trained"
            )
        for name, cosine in zip(self.experts, whole.cosines, strict=True):
            if whole.base and count > 1 and cosine is not None and cosine < LOST_WARNING:
                self.warnings.append(
                    f"{name!r} has hardly a share in the merge: the cosine of their deltas is {cosine:.2f}"
                )
        capped = [line for line in self.lines if line.capped < 1]
        if capped:
            self.warnings.append(
                f"the norm budget shortened {len(capped)} of {len(self.lines)} tensors, down to "
                f"{min(line.capped for line in capped):.2f} of their length"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = vars(self) | {"lines": [line.to_dict() for line in self.lines]}
        return {**plain, "total": self.total.to_dict() if self.lines else None}

    def table(self) -> RenderableType:
        """The report for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        gb = 1e9 if self.bytes_written > 1e9 else 1e6
        unit = "GB" if gb == 1e9 else "MB"
        made = f"{self.method} of {len(self.experts)} experts in {self.architecture}"
        head.add_row("merge", made + (f" -> {self.out}" if self.out else ""))
        head.add_row("parameters", f"{self.parameters_written:,}")
        if self.bytes_written:
            head.add_row(
                "traffic", f"{self.bytes_read / gb:.2f} {unit} read, {self.bytes_written / gb:.2f} {unit} written"
            )
            head.add_row("cost", f"{self.seconds:.1f} s, peak anonymous memory {self.peak_memory / 1e6:.0f} MB")
        parts: list[RenderableType] = [head]
        if self.lines:
            parts += [self._lines(), self._experts()]
        if self.kept or any(self.left_out.values()):
            parts.append(self._rest())
        return Group(*parts, *(Text(f"! {warning}", style="yellow") for warning in self.warnings))

    def _lines(self) -> Table:
        from ..building.report import by_kind

        title = "what moved: the merged delta against the base, and against the experts' mean delta"
        table = Table(title=title, title_justify="left", box=None)
        full = any(line.overlap is not None for line in self.lines)
        columns = ["tensors", "of them", "merge", "|delta|/|base|", "|delta|/experts'", "sign conflict"]
        for column in [*columns, "subspace overlap (chance)"] if full else columns:
            table.add_column(column, overflow="fold")
        weights = [line for line in self.lines if len(line.shape) > 1]
        rest = [line for line in self.lines if len(line.shape) <= 1]
        groups = [(pattern, members) for (pattern, _), members in by_kind(weights).items()]
        groups += [("norms, biases and other vectors", rest)] if rest else []
        for name, members in [*groups, ("all", self.lines)]:
            whole = total(members, len(self.experts))
            methods = ", ".join(sorted({line.method for line in members}))
            numbers = [
                _number(whole.moved),
                _number(whole.reach),
                "-" if whole.conflict is None else f"{whole.conflict:.1%}",
            ]
            row = [name, str(len(members)), methods, *numbers]
            overlaps = [(line.overlap, line.chance or 0.0) for line in members if line.overlap is not None]
            if full:
                means = [sum(column) / len(overlaps) for column in zip(*overlaps, strict=True)] if overlaps else []
                row.append(f"{means[0]:.3f} ({means[1]:.3f})" if means else "-")
            table.add_row(*row)
        return table

    def _experts(self) -> Table:
        table = Table(title="the experts in the merge", title_justify="left", box=None)
        for column in ("expert", "|delta|/|base|", "cosine to the merged delta", "|merged - expert|/|delta|"):
            table.add_column(column, overflow="fold")
        whole = self.total
        rows = zip(self.experts, whole.experts, whole.cosines, whole.distances, strict=True)
        for name, norm, cosine, distance in rows:
            moved = norm / whole.base if whole.base else None
            table.add_row(name, _number(moved), _number(cosine), _number(distance / norm if norm else None))
        return table

    def _rest(self) -> Table:
        table = Table(title="everything else", title_justify="left", box=None)
        for column in ("what", "tensors"):
            table.add_column(column, overflow="fold")
        for why, count in Counter(self.kept.values()).items():
            table.add_row(why, str(count))
        for source, names in self.left_out.items():
            for why, count in Counter(names.values()).items():
                table.add_row(f"{source}: {why}, left out", str(count))
        return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
