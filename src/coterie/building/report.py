"""What a build did, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..experts.fit import LayerReport

# Gate subspaces of unrelated experts overlap as chance has it; LoRA adapters from one seed at .35 against .02.
OVERLAP_WARNING = 0.2


@dataclass
class Followed:
    """A tensor outside the mixture layers: why it stays dense, which experts change it, which policy it follows."""

    why: str
    policy: str
    changed_by: list[str] = field(default_factory=list)


@dataclass(repr=False)
class BuildReport:
    """The account of a build: every tensor of every source is in it.

    Attributes:
        method, parameters, experts: as run.
        architecture: transformers class of the mixture.
        out: the directory, or None in memory.
        base_parameters: parameters of the base architecture.
        mixture_parameters: parameters of the mixture.
        layers: one report per mixture layer.
        others: tensor name -> what it follows.
        heads: modules kept per expert -> the experts that have one.
        left_out: source -> tensor on disk -> why it is not used.
        dense_layers: linear layers that could be mixture layers and that no expert changes.
        warnings: what the user should know, a sentence each.
        bytes_read, bytes_written: traffic of tensors.
        seconds: wall time.
        peak_memory: peak anonymous memory of the process, bytes.
    """

    method: str
    parameters: dict[str, Any]
    experts: list[str]
    architecture: str
    out: str | None = None
    base_parameters: int = 0
    mixture_parameters: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    others: dict[str, Followed] = field(default_factory=dict)
    heads: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    dense_layers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def __repr__(self) -> str:
        return (
            f"BuildReport({self.method} of {len(self.experts)} experts in {self.architecture}: "
            f"{len(self.layers)} mixture layers, {self.ratio:.3f} x the base, {len(self.warnings)} warnings)"
        )

    @property
    def ratio(self) -> float:
        """Parameters of the mixture over those of the base."""
        return self.mixture_parameters / max(self.base_parameters, 1)

    @property
    def overlap(self) -> tuple[float, float] | None:
        """(mean overlap of the experts' gate subspaces over layers, what chance would give); None with one expert, or
        without such subspaces."""
        pairs = [(each.overlap, each.chance) for each in self.layers if each.overlap is not None and each.gate_rank]
        if not pairs:
            return None
        return sum(p[0] for p in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs)

    def conclude(self) -> None:
        """Add the warnings that only the whole build can tell."""
        overlap = self.overlap
        if overlap and overlap[0] > max(OVERLAP_WARNING, 3 * overlap[1]):
            self.warnings.append(
                f"these experts are hard to tell apart: their gate subspaces overlap by {overlap[0]:.2f} (chance: "
                f"{overlap[1]:.2f}), as LoRA adapters trained from one seed do, and SMILE then sends many tokens to "
                "the wrong expert; measure it against averaging, or route by a known task"
            )
        touched = Counter(i for layer in self.layers for i, rank in enumerate(layer.ranks) if rank is not None)
        partial = [name for i, name in enumerate(self.experts) if touched[i] < len(self.layers)]
        if partial and not any("mask" in layer.ranks for layer in self.layers):
            counts = ", ".join(f"{n}: {touched[self.experts.index(n)]}" for n in partial)
            self.warnings.append(
                f"experts touch different layers ({counts} "
                f"of {len(self.layers)}): where one does not, the others' deltas serve its tokens"
            )
        kept = {name: f for name, f in self.others.items() if f.policy == "base" and f.changed_by}
        for name, followed in kept.items():
            if followed.why.startswith(("output head", "tied to")):
                self.warnings.append(
                    f"{', '.join(followed.changed_by)} changed the output head {name}, and the mixture has the base's"
                )
        if kept:
            self.warnings.append(
                f"{len(kept)} tensors that experts change follow the base (`coterie inspect DIR --json` lists them"
                " under `others`); `others: average` or `per_expert` (for a known task) keeps more of them"
            )
        for source, names in self.left_out.items():
            biases = sum(why.startswith("bias of") for why in names.values())
            if biases:
                self.warnings.append(f"{source}: {biases} biases are left out, for no score can choose them")
        wanted = self.parameters.get("rank")
        asked = max(wanted if isinstance(wanted, int) else 0, 0)
        clamped = [layer for layer in self.layers if any(isinstance(r, int) and r < asked for r in layer.ranks)]
        if clamped:
            self.warnings.append(
                f"rank {asked} was clamped in {len(clamped)} of {len(self.layers)} layers, "
                "where a delta has fewer directions"
            )
        few = [
            layer
            for layer in self.layers
            if layer.overlap is not None and layer.gate_rank < self.parameters.get("gate_rank", 0)
        ]
        if few:
            self.warnings.append(
                f"gate rank {self.parameters['gate_rank']} was clamped in {len(few)} of {len(self.layers)} layers "
                f"(down to {min(layer.gate_rank for layer in few)}), the smallest rank among their experts"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "overlap": self.overlap}

    def table(self) -> RenderableType:
        """The report for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        gb = 1e9 if self.bytes_written > 1e9 else 1e6
        unit = "GB" if gb == 1e9 else "MB"
        head.add_row(
            "mixture",
            f"{self.method} of {len(self.experts)} experts in {self.architecture}"
            + (f" -> {self.out}" if self.out else ""),
        )
        head.add_row(
            "parameters", f"{self.mixture_parameters:,} ({self.ratio:.3f} x the base's {self.base_parameters:,})"
        )
        if self.bytes_written:
            head.add_row(
                "traffic", f"{self.bytes_read / gb:.2f} {unit} read, {self.bytes_written / gb:.2f} {unit} written"
            )
            head.add_row("cost", f"{self.seconds:.1f} s, peak anonymous memory {self.peak_memory / 1e6:.0f} MB")
        certified = max((excess or 0.0 for layer in self.layers for excess in layer.excess), default=0.0)
        if certified:
            head.add_row("truncation", f"certified: at most {certified:.1%} above the least error of each rank")
        if self.overlap:
            head.add_row("gate subspaces", f"overlap {self.overlap[0]:.3f} (chance {self.overlap[1]:.3f})")
        parts: list[RenderableType] = [head, self._layers(), self._rest()]
        parts += [Text(f"! {warning}", style="yellow") for warning in self.warnings]
        return Group(*parts)

    def _layers(self) -> Table:
        table = Table(title=f"{len(self.layers)} mixture layers, by kind", title_justify="left", box=None)
        for column in ("layers", "of them", "in -> out", "ranks", "gate rank", "|delta|/|W|", "residual", "parameters"):
            table.add_column(column, overflow="fold")
        for (pattern, shape), layers in by_kind(self.layers).items():
            ranks = sorted(
                {str(r) if r is not None else "-" for layer in layers for r in layer.ranks}, key=lambda r: r.rjust(9)
            )
            norms = [n for layer in layers for n in layer.norms if n is not None]
            residuals = [r for layer in layers for r in layer.residuals if r is not None]
            gates = sorted({layer.gate_rank for layer in layers})
            table.add_row(
                pattern,
                str(len(layers)),
                shape,
                ", ".join(ranks),
                ", ".join(str(gate or "-") for gate in gates),
                spread(norms),
                spread(residuals),
                f"{sum(layer.parameters for layer in layers):,}",
            )
        return table

    def _rest(self) -> Table:
        table = Table(title="everything else", title_justify="left", box=None)
        for column in ("what", "tensors", "follows", "changed by"):
            table.add_column(column, overflow="fold")
        groups: dict[tuple[str, str], list[Followed]] = {}
        for followed in self.others.values():
            groups.setdefault((followed.why, followed.policy), []).append(followed)
        for (why, policy), members in sorted(groups.items()):
            changed = sorted({name for m in members for name in m.changed_by})
            table.add_row(why, str(len(members)), policy, ", ".join(changed) or "-")
        for path, owners in self.heads.items():
            table.add_row(path, "module", "kept per expert", ", ".join(owners))
        for source, names in self.left_out.items():
            reasons = Counter(names.values())
            for reason, count in reasons.items():
                table.add_row(f"{source}: {reason}", str(count), "left out", "-")
        return table


def by_kind(layers: Sequence[Any]) -> dict[tuple[str, str], list[Any]]:
    """Layers (with `path`, `d_in`, `d_out`) grouped by (path with numbers as *, "d_in -> d_out"), in order."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for layer in layers:
        pattern = ".".join("*" if part.isdigit() else part for part in layer.path.split("."))
        groups.setdefault((pattern, f"{layer.d_in} -> {layer.d_out}"), []).append(layer)
    return groups


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})" if values else "-"
