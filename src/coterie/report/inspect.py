"""What is in a mixture directory, from its configuration, its headers and its provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ..errors import CoterieError
from ..mixture.load import read_spec
from ..mixture.spec import MixtureSpec
from ..sources.checkpoint import Checkpoint
from ..sources.locate import locate


@dataclass
class Inspection:
    """A mixture directory in plain data.

    Attributes:
        method, parameters, architecture, experts: as built.
        sources: per expert, where it was read from, or None where no provenance is recorded.
        layers: module path -> ranks per expert (None: does not touch it), gate rank, parameters of the bank.
        heads: modules kept per expert -> the experts that have one.
        size: parameters and bytes on disk, and the parameters that the banks and the routers take.
        light: whether it needs its base to run.
        base: the base's id, revision and fingerprint.
        provenance: the recipe, versions and measurements of the build, and per source how many tensors were read, with
            one sha256 over their names and hashes; None where `mixture.json` is missing.
    """

    method: str
    parameters: dict[str, Any]
    architecture: str
    experts: list[str]
    sources: list[str | None]
    layers: dict[str, dict[str, Any]]
    heads: dict[str, list[str]]
    size: dict[str, int]
    light: bool
    base: dict[str, Any] | None
    provenance: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def table(self) -> RenderableType:
        """The inspection for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        parameters = ", ".join(f"{k} = {v}" for k, v in self.parameters.items())
        head.add_row(
            "mixture",
            f"{self.method}{f' ({parameters})' if parameters else ''} in {self.architecture}"
            + (", light" if self.light else ""),
        )
        head.add_row("base", f"{(self.base or {}).get('id', 'not recorded')}")
        bank, routers = self.size["bank_parameters"], self.size["router_parameters"]
        head.add_row(
            "size",
            f"{self.size['parameters']:,} parameters, {self.size['bytes'] / 1e6:.1f} MB; {bank:,} of them in the banks"
            + (f", {routers:,} in the routers" if routers else ""),
        )
        if self.provenance:
            made = self.provenance["versions"]
            head.add_row("built with", ", ".join(f"{k} {v}" for k, v in made.items()))
        reports = (self.provenance or {}).get("report", {}).get("layers", [])
        experts = []
        for i, name in enumerate(self.experts):
            ranks = [layer["ranks"][i] for layer in self.layers.values() if layer["ranks"][i] is not None]
            residuals = [r["residuals"][i] for r in reports if r["residuals"][i] is not None]
            experts.append(
                (
                    name,
                    self.sources[i] or "-",
                    str(len(ranks)),
                    ", ".join(sorted({str(r) for r in ranks}, key=lambda r: r.rjust(9))),
                    f"{sum(residuals) / len(residuals):.3f}" if residuals else "-",
                    ", ".join(path for path, owners in self.heads.items() if name in owners) or "shared",
                )
            )
        layers = [
            (
                path,
                ", ".join("-" if r is None else str(r) for r in layer["ranks"]),
                str(layer["gate_rank"] or "-"),
                f"{layer['parameters']:,}",
            )
            for path, layer in self.layers.items()
        ]
        return Group(
            head,
            _told(f"{len(experts)} experts", ("expert", "source", "layers", "ranks", "residual", "heads"), experts),
            _told(f"{len(layers)} mixture layers", ("layer", "ranks", "gate rank", "parameters"), layers),
        )


def _told(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of the columns that say anything."""
    told = [at for at in range(len(columns)) if any(row[at] != "-" for row in rows)]
    table = Table(title=title, title_justify="left", box=None)
    for at in told:
        table.add_column(columns[at], overflow="fold")
    for row in rows:
        table.add_row(*(row[at] for at in told))
    return table


def inspect(source: str, token: str | None = None) -> Inspection:
    """Look into a mixture directory without loading its tensors.

    Raises:
        CoterieError: not a mixture, or damaged.
    """
    location = locate(source, token)
    config = location.json("config.json") or {}
    raw = read_spec(location)
    try:
        spec = MixtureSpec.from_dict(raw)
    except (KeyError, TypeError) as error:
        raise CoterieError(f"its config.json is damaged ({error})", source, "build it again") from None
    checkpoint = Checkpoint.open(location)
    provenance = location.json("mixture.json")
    recipe = (provenance or {}).get("recipe", {})
    banks: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if ".bank." in name and info.dtype.is_floating_point:
            path = name.rpartition(".bank.")[0]
            banks[path] = banks.get(path, 0) + _numel(info.shape)
    routers = sum(
        _numel(info.shape)
        for name, info in checkpoint.tensors.items()
        if name.rpartition(".router.")[0] in banks or name.startswith("coterie_router.")
        if info.dtype.is_floating_point
    )
    memory_first = list(banks.values()) if len(banks) == len(spec.layers) else [0] * len(spec.layers)
    total = sum(_numel(info.shape) for info in checkpoint.tensors.values() if info.dtype.is_floating_point)
    layers = {}
    for position, (path, shape) in enumerate(spec.layers.items()):
        ranks: list[Any] = [None] * len(spec.experts)
        for at, expert in enumerate(shape.experts):
            ranks[expert] = shape.forms[at]
        size = banks.get(path, memory_first[position])
        layers[path] = {"ranks": ranks, "gate_rank": shape.gate_rank, "parameters": size}
    return Inspection(
        spec.method,
        spec.parameters,
        (config.get("architectures") or ["unknown"])[0],
        spec.experts,
        [recipe.get("experts", {}).get(name, {}).get("source") for name in spec.experts],
        layers,
        {path: [spec.experts[i] for i in head.owners] for path, head in spec.heads.items()},
        {
            "parameters": total,
            "bytes": sum(info.bytes for info in checkpoint.tensors.values()),
            "bank_parameters": sum(banks.values()),
            "router_parameters": routers,
        },
        bool(spec.base),
        spec.base or (provenance or {}).get("base"),
        _provenance(provenance) if provenance else None,
    )


def _provenance(recorded: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {key: recorded[key] for key in ("recipe", "versions", "report") if key in recorded}
    read = {}
    for source, hashes in recorded.get("tensors_read", {}).items():
        lines = "".join(f"{name} {sha256}\n" for name, sha256 in sorted(hashes.items()))
        read[source] = {"tensors": len(hashes), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    return {**kept, "read": read}


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for width in shape:
        total *= width
    return total
