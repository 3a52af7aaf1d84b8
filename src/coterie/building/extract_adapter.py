"""A LoRA adapter from a full fine-tune: each linear layer's delta, truncated, with its residual measured."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers.pytorch_utils import Conv1D

from ..errors import CoterieError
from ..experts.factorise import factorise, frobenius
from ..mixture.layer import MIXTURE_OF, widths
from ..mixture.sites import Sites, choose_sites
from ..recipe import Modules, read_recipe
from ..sources.checkpoint import is_counter
from ..sources.delta import Delta, Dense
from ..sources.experts import same
from .directory import whole_directory
from .engines import default_jobs, in_threads, one_thread
from .finish import versions
from .inputs import TASKS, Inputs, open_inputs
from .memory import PeakMemory, give_back
from .progress import progress
from .report import by_kind, spread
from .writer import ShardWriter

# Model types whose fused kernels read `out_proj.weight` itself, so that PEFT refuses to adapt it.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


@dataclass
class ExtractedLayer:
    """What became of one linear layer, or of the routed experts that one 3-D parameter holds.

    Attributes:
        path: its module path; or the parameter's name.
        d_in, d_out: its widths.
        rank: of its factors, of each expert's; 0 where fine-tuning left it alone.
        residual: `|delta - B A| / |delta|` in Frobenius norm, with the factors as they are written.
        excess: certified: before rounding, the residual is at most `1 + excess` times the least that the rank allows.
        norm: `|delta| / |W|`.
    """

    path: str
    d_in: int
    d_out: int
    rank: int = 0
    residual: float = 0.0
    excess: float = 0.0
    norm: float = 0.0


@dataclass
class Rest:
    """A module that is no linear layer of the adapter, or the bias of one, and that fine-tuning changed.

    Attributes:
        kind: bias, normalisation or vector, embedding, head, ...
        tensors: how many of its tensors changed.
        change: `|delta|` of all of them.
        norm: `|base|` of the same; 0 where the base has none.
        saved: whether the adapter holds it.
        why: why it does not, although the policy was to save it.
    """

    kind: str
    tensors: int
    change: float
    norm: float
    saved: bool
    why: str = ""


@dataclass(repr=False)
class ExtractReport:
    """The account of an extraction: every tensor of the fine-tune is in it.

    Attributes:
        base, finetuned: where they were read from.
        out: the adapter's directory.
        layers: one entry for each linear layer that could be adapted.
        rest: module path (or name of a bias) -> what became of it, for all that changed elsewhere.
        left_out: tensors on disk that the architecture does not use, with the reason.
        parameters, bytes_written: of the adapter.
        warnings: what the user should know, a sentence each.
        seconds: wall time.
        peak_memory: peak anonymous memory of the process, bytes.
    """

    base: str
    finetuned: str
    out: str
    layers: list[ExtractedLayer] = field(default_factory=list)
    rest: dict[str, Rest] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    bytes_written: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0

    def __repr__(self) -> str:
        adapted = sum(layer.rank > 0 for layer in self.layers)
        return f"ExtractReport({adapted} layers, {self.parameters:,} parameters, {len(self.warnings)} warnings)"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def kinds(self, saved: bool) -> dict[str, tuple[int, float]]:
        """Kind of what was saved, or left out -> how many tensors of it changed, and `|delta| / |base|` over them."""
        found: dict[str, list[Rest]] = {}
        for each in self.rest.values():
            if each.saved == saved:
                found.setdefault(each.kind, []).append(each)
        return {
            kind: (
                sum(r.tensors for r in members),
                _norm(r.change for r in members) / (_norm(r.norm for r in members) or 1.0),
            )
            for kind, members in found.items()
        }

    def table(self) -> RenderableType:
        """The report for a terminal."""
        head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        head.add_row("adapter", self.out)
        head.add_row("holds", f"{self.parameters:,} parameters, {self.bytes_written / 1e6:.1f} MB")
        head.add_row("took", f"{self.seconds:.1f} s, {self.peak_memory / 1e6:.0f} MB at most")
        layers = Table(title="linear layers", title_justify="left", box=None)
        for column in ("layers", "adapted", "in -> out", "rank", "|delta| / |W|", "residual"):
            layers.add_column(column, overflow="fold")
        for (pattern, shape), members in by_kind(self.layers).items():
            adapted = [layer for layer in members if layer.rank]
            ranks = sorted({layer.rank for layer in adapted})
            layers.add_row(
                pattern,
                f"{len(adapted)} of {len(members)}",
                shape,
                "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
                spread([layer.norm for layer in adapted]),
                spread([layer.residual for layer in adapted]),
            )
        rest = Table(title="changed elsewhere", title_justify="left", box=None)
        for column in ("what", "tensors", "|delta| / |base|", "adapter"):
            rest.add_column(column, overflow="fold")
        for saved in (True, False):
            for kind, (tensors, change) in self.kinds(saved).items():
                rest.add_row(kind, str(tensors), f"{change:.4f}", "saved" if saved else "left out")
        for reason, count in Counter(self.left_out.values()).items():
            rest.add_row(reason, str(count), "-", "left out")
        return Group(head, layers, rest, *(Text(f"! {w}", style="yellow") for w in self.warnings))


@dataclass(frozen=True)
class _How:
    """What a step must know beyond the sources."""

    rank: int | None
    residual: float | None
    rest: str
    head: str
    dtype: torch.dtype | None
    device: str


@dataclass(frozen=True)
class _Step:
    """A linear layer; the routed experts that a module holds in 3-D parameters; or a module of another kind."""

    path: str
    kind: str = "layer"
    tensors: tuple[str, ...] = ()
    unsaveable: str = ""


@dataclass
class _Made:
    tensors: dict[str, torch.Tensor]
    layers: list[ExtractedLayer]
    rest: dict[str, Rest]
    sha256: dict[str, dict[str, str]]


def extract(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    residual: float | None = None,
    rest: str = "leave",
    head: str = "leave",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    dtype: str | None = None,
    vocabulary: str = "error",
    architecture: str | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    force: bool = False,
    token: str | None = None,
    console: Console | None = None,
) -> ExtractReport:
    """Write a PEFT LoRA adapter of what a full fine-tune changed: `base + B A` is nearest to it, layer by layer.

    With the delta's leading singular triplets U S V^T, `B = U S^1/2` and `A = S^1/2 V^T` (alpha is the rank: scale 1).

    Args:
        base: directory or Hub id of the base model.
        finetuned: the same of the fine-tune.
        out: the adapter's directory, which appears when it is complete.
        rank: of every layer; or
        residual: the relative Frobenius residual that every layer's rank, the smallest such, must reach; in (0, 1).
        rest: what becomes of biases, norms, embeddings and all else that is no linear layer: `leave` it out, counted
            and measured, or `save` it whole (PEFT's `modules_to_save`, and its trained biases).
        head: the same for task heads and output embeddings.
        include: globs on paths of linear layers; one that names an output head has it adapted.
        exclude: globs on paths of linear layers that stay out.
        dtype: of the factors; default: the base's, tensor by tensor.
        vocabulary: `base` leaves out embeddings of another vocabulary; `error` refuses them.
        architecture: transformers class; default: the fine-tune's.
        device: where deltas are factorised.
        jobs: layers at a time; default: the cores. The output is the same.
        force: replace an existing directory that coterie wrote.
        token: Hub token.
        console: where progress is shown; None for silence.

    Raises:
        CoterieError: bad input.
    """
    started = time.monotonic()
    recipe = read_recipe({
        "method": "extract", "base": str(base), "experts": {"fine-tune": str(finetuned)}, "vocabulary": vocabulary,
        "architecture": architecture, "dtype": dtype,
        "modules": {"include": include or ["*"], "exclude": exclude or []},
    })  # fmt: skip
    how = _How(rank, residual, rest, head, getattr(torch, recipe.dtype) if recipe.dtype else None, device)
    _check(how, jobs)
    inputs = open_inputs(recipe, token, "the adapter")
    if inputs.experts[0].kind != "full fine-tune":
        raise CoterieError("is an adapter already", str(finetuned), "give a full fine-tune")
    sites = _sites(inputs)
    steps = _steps(inputs, sites)
    report = ExtractReport(str(base), str(finetuned), str(out), warnings=inputs.warnings)
    report.left_out = {f"{source}: {n}": why for source, names in inputs.left_out.items() for n, why in names.items()}
    adapted = [n for step in steps for n in _adapted(step)]
    largest = max(inputs.skeleton.tensors[name].numel() for name in adapted)
    jobs = jobs or default_jobs(largest * (4 * 4 + 8 * 5), device)
    with PeakMemory() as memory, one_thread(), whole_directory(Path(out), force, 0, inputs.folders) as folder:
        writer = ShardWriter(folder, 2**62, _names(inputs, steps))  # PEFT reads one file, whatever its size
        with progress(console) as bar, closing(in_threads(partial(_make, inputs, how), jobs, steps)) as found:
            for made in bar.track(found, total=len(steps), description="layers"):
                for name, tensor in made.tensors.items():
                    writer.add(f"base_model.model.{name}", tensor)
                    report.parameters += tensor.numel()
                report.layers += made.layers
                report.rest |= made.rest
                for source, hashes in made.sha256.items():
                    inputs.checkpoints[source].sha256.update(hashes)
        if not any(layer.rank for layer in report.layers):
            raise CoterieError(
                "it changes no linear layer of the base: this adapter would be empty",
                f"fine-tune {finetuned}",
                "check that these are the models that you mean",
            )
        writer.finish("adapter_model")
        report.bytes_written = writer.total_bytes
        _warn(report, how)
        config = _config(inputs, report)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        report.seconds, report.peak_memory = time.monotonic() - started, memory.bytes
        read = {source: dict(sorted(c.sha256.items())) for source, c in inputs.checkpoints.items()}
        provenance = {"versions": versions(), "tensors_read": read, "report": {**report.to_dict(), "out": None}}
        (folder / "extract.json").write_text(json.dumps(provenance, indent=1, ensure_ascii=False), encoding="utf-8")
        (folder / "README.md").write_text(_card(inputs, report, how), encoding="utf-8")
    return report


def _check(how: _How, jobs: int | None) -> None:
    if (how.rank is None) == (how.residual is None):
        raise CoterieError("either a rank or a residual says how good it is to be", "extract", "give one of them")
    if how.rank is not None and (not isinstance(how.rank, int) or how.rank < 1):
        raise CoterieError(f"rank is {how.rank!r}", "extract", "give a whole number >= 1")
    if how.residual is not None and not 0 < how.residual < 1:
        raise CoterieError(f"residual is {how.residual!r}", "extract", "give a number between 0 and 1")
    for name, policy in (("rest", how.rest), ("head", how.head)):
        if policy not in ("leave", "save"):
            raise CoterieError(f"{name} is {policy!r}", "extract", "known: leave, save")
    if jobs is not None and jobs < 1:
        raise CoterieError(f"jobs is {jobs}", "extract", "give a positive number")


def _sites(inputs: Inputs) -> Sites:
    """Every tensor sorted: linear layers, heads, and everything else with its kind."""
    skeleton, modules = inputs.skeleton, inputs.recipe.modules
    missing = {name for name in skeleton.tensors if name not in inputs.base and name not in skeleton.tied}
    # Where transformers gathers routed experts into one tensor, PEFT takes the experts' names for that tensor's,
    # wherever they occur: a shared expert's gate_proj cannot be adapted beside it.
    gathered = {pattern.split(".")[-2] for pattern in getattr(skeleton, "converter_of", {}) if pattern.count(".")}
    taken = [path for path, module in skeleton.model.named_modules() if path.rpartition(".")[2] in gathered]
    refused = dict.fromkeys(taken, "linear layer that PEFT takes for a routed expert")
    if getattr(skeleton.model.config, "model_type", None) in _MAMBA:
        paths = [path for path, _ in skeleton.model.named_modules() if path.rpartition(".")[2] == "out_proj"]
        refused |= dict.fromkeys(paths, "linear layer that PEFT refuses to adapt")
        inputs.warnings.append(f"{len(paths)} layers out_proj are not adapted: PEFT refuses to in models of this type")
    refused = {path: why for path, why in refused.items() if type(skeleton.module(path)) in MIXTURE_OF}
    modules = Modules(include=modules.include, exclude=[*modules.exclude, *map(escape, refused)])
    sites = choose_sites(skeleton.model, missing, modules, "base", None, skeleton.tied, inputs.warnings, needed=False)
    sites.why_dense |= {f"{path}.weight": why for path, why in refused.items()}
    if not sites.layers and not _fused(inputs, sites):
        what = f"no linear layer of {type(skeleton.model).__name__} is left to adapt"
        raise CoterieError(what, "extract", "check --include and --exclude")
    return sites


def _fused(inputs: Inputs, sites: Sites) -> list[str]:
    """The 3-D parameters that hold routed experts and that the recipe's globs choose."""
    modules, found = inputs.recipe.modules, []
    for name, why in sites.why_dense.items():
        chosen = any(fnmatchcase(name, g) for g in modules.include) and not any(
            fnmatchcase(name, g) for g in modules.exclude
        )
        several = why == "fused 3-D expert weights" and len(inputs.skeleton.tensors[name]) > 1
        if several and chosen and name.split(".")[-2].endswith("experts"):
            found.append(name)
    return found


def _adapted(step: _Step) -> list[str]:
    """The names of the tensors that a step may adapt."""
    return [f"{step.path}.weight"] if step.kind == "layer" else list(step.tensors) if step.kind == "experts" else []


def _steps(inputs: Inputs, sites: Sites) -> list[_Step]:
    """The layers; and what else there is by the modules that PEFT would save whole, outermost first."""
    skeleton, fused = inputs.skeleton, _fused(inputs, sites)
    others = [name for name in sites.others if name not in fused]
    modules = {name.rpartition(".")[0] for name in others} - {""}
    adapted = [*sites.layers, *fused]
    whole = {m for m in modules if not any(path.startswith(f"{m}.") for path in adapted)}
    outer = [m for m in whole if not any(m.startswith(f"{other}.") for other in whole)]
    owner = {n: next((m for m in outer if n.startswith(f"{m}.")), n.rpartition(".")[0]) for n in others}
    steps = [_Step(path) for path in sites.layers]
    for module in dict.fromkeys(name.rpartition(".")[0] for name in fused):
        steps.append(_Step(module, "experts", tuple(n for n in fused if n.rpartition(".")[0] == module)))
    for module in dict.fromkeys(owner.values()):
        names = tuple(n for n in owner if owner[n] == module)
        kinds = {sites.why_dense[name].partition(" (")[0] for name in names}
        kind = "head" if "output head" in kinds else ", ".join(sorted(kinds))
        inside = [path for path in adapted if path.startswith(f"{module}.")]
        why = "a bare parameter of the model" if not module else f"{inside[0]} is adapted inside it" if inside else ""
        steps.append(_Step(module, kind, names, why))
    for path in sites.heads:
        names = tuple(n for n in skeleton.tensors if n.startswith(f"{path}."))
        steps.append(_Step(path, "head", names))
    return steps


def _names(inputs: Inputs, steps: Iterable[_Step]) -> list[str]:
    """The names that an extraction writes, at most."""
    prefix = "base_model.model."
    leaves = ("lora_A.weight", "lora_B.weight", "base_layer.bias")
    layers = [f"{prefix}{name}.{leaf}" for step in steps for name in _adapted(step) for leaf in leaves]
    return layers + [f"{prefix}{name}" for step in steps for name in step.tensors]


def _make(inputs: Inputs, how: _How, step: _Step) -> _Made:
    """Run one step; it has no effect beyond what it gives back."""
    made = _Made({}, [], {}, {})
    inputs = inputs.reader()
    with torch.autocast(torch.device(how.device).type, enabled=False):
        if step.kind == "layer":
            _layer(inputs, how, step.path, made)
        elif step.kind == "experts":
            _experts(inputs, how, step, made)
        else:
            _module(inputs, how, step, made)
    made.sha256 = {source: c.sha256 for source, c in inputs.checkpoints.items() if c.sha256}
    give_back()
    return made


def _layer(inputs: Inputs, how: _How, path: str, made: _Made) -> None:
    module, expert = inputs.skeleton.module(path), inputs.experts[0]
    transposed = isinstance(module, Conv1D)
    weight = inputs.base.get(f"{path}.weight")
    d_in, d_out = widths(module)
    layer = ExtractedLayer(path, d_in, d_out)
    made.layers.append(layer)
    delta = expert.delta(path, weight, transposed)
    if delta is not None:
        delta = delta.to(how.device)
        factors = factorise(delta, how.rank or _smallest_rank(delta, how.residual or 0.0))
        root = factors.s.sqrt()
        dtype = how.dtype or weight.dtype
        # Both factors of one norm: half precision loses least so, and training goes on evenly.
        up, down = (factors.u * root).to(dtype), (root[:, None] * factors.vt).to(dtype)
        missed = torch.addmm(delta.dense(), up.float(), down.float(), alpha=-1)
        layer.rank, layer.excess, layer.norm = len(root), factors.excess, factors.norm / (frobenius(weight) or 1.0)
        layer.residual = frobenius(missed) / factors.norm
        made.tensors = {f"{path}.lora_A.weight": down.cpu(), f"{path}.lora_B.weight": up.cpu()}
    name = f"{path}.bias"
    bias = inputs.base.get(name) if name in inputs.base else None
    change = expert.bias(path, bias)
    if bias is not None and change is not None:
        saved = how.rest == "save"
        made.rest[name] = Rest("bias of a linear layer", 1, frobenius(change[None]), frobenius(bias[None]), saved)
        if saved:
            leaf = "base_layer.bias" if layer.rank else "bias"
            value = expert.value(name, bias)
            assert value is not None
            made.tensors[f"{path}.{leaf}"] = value.to(how.dtype or bias.dtype)


def _experts(inputs: Inputs, how: _How, step: _Step, made: _Made) -> None:
    """The routed experts of a module, each with factors of its own, as PEFT's `target_parameters` hold them.

    Of E experts and rank r, `lora_A` is (E r, in), expert by expert, and `lora_B` (out, r E), rank by rank. Where
    several parameters of a module are adapted, PEFT wraps the first of them innermost.
    """
    turned = getattr(inputs.skeleton.module(step.path), "is_transposed", False)  # (E, in, out)
    pairs = []
    for name in step.tensors:
        base = inputs.base.get(name)
        value = inputs.experts[0].value(name, base)
        unchanged = value is None or same(value, base)
        deltas = torch.zeros_like(base) if value is None else value.float() - base.float()
        deltas = deltas.transpose(1, 2) if turned else deltas
        count, d_out, d_in = deltas.shape
        layer = ExtractedLayer(name, d_in, d_out)
        made.layers.append(layer)
        if unchanged:
            continue
        ranks = [how.rank or _smallest_rank(Dense(d), how.residual or 0.0) for d in deltas if d.any()]
        layer.rank = min(max(ranks), d_in, d_out)
        dtype = how.dtype or base.dtype
        up, down = torch.zeros(count, d_out, layer.rank, dtype=dtype), torch.zeros(count, layer.rank, d_in, dtype=dtype)
        for index, delta in enumerate(deltas):
            factors = factorise(Dense(delta).to(how.device), layer.rank)
            root = factors.s.sqrt()
            up[index, :, : len(root)], down[index, : len(root)] = factors.u * root, root[:, None] * factors.vt
            layer.excess = max(layer.excess, factors.excess)
        norm = _frobenius(deltas)
        layer.residual, layer.norm = _frobenius(deltas - up.float() @ down.float()) / norm, norm / _frobenius(base)
        pairs.append((down.reshape(-1, d_in), up.permute(1, 2, 0).reshape(d_out, -1)))
    for depth, (down, up) in enumerate(reversed(pairs)):
        path = step.path + depth * ".base_layer"
        made.tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}


def _smallest_rank(delta: Delta, wanted: float) -> int:
    """The least rank whose best approximation leaves at most `wanted` of the delta's Frobenius norm."""
    matrix = delta.dense().double()
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    kept = energy.cumsum(0) / energy.sum()
    return min(int((kept < 1 - wanted**2).sum()) + 1, len(energy))


def _module(inputs: Inputs, how: _How, step: _Step, made: _Made) -> None:
    """A module of another kind: how far fine-tuning moved it, and its tensors where they are saved."""
    expert, changed = inputs.experts[0], Rest(step.kind, 0, 0.0, 0.0, False)
    changes, norms, values = [], [], {}
    for name in step.tensors:
        base = inputs.base.get(name) if name in inputs.base else None
        value = expert.value(name, base, any_shape=step.kind == "head")
        if value is None or (base is not None and value.shape == base.shape and same(value, base)):
            values[name] = base
            continue
        if is_counter(name):
            values[name] = value
            continue
        if not value.is_floating_point():
            raise CoterieError(
                f"integer buffer {name!r} differs from the base's", f"fine-tune {expert.location}", "use its own base"
            )
        values[name] = value
        changed.tensors += 1
        comparable = base is not None and base.shape == value.shape
        changes.append(_frobenius(value.float() - base.float() if comparable and base is not None else value))
        norms.append(_frobenius(base) if comparable and base is not None else 0.0)
    if not changed.tensors:
        return
    changed.change, changed.norm = _norm(changes), _norm(norms)
    if (how.head if step.kind == "head" else how.rest) == "save":
        lacking = next((name for name, value in values.items() if value is None), None)
        changed.why = step.unsaveable or (f"neither holds {lacking}" if lacking else "")
        changed.saved = not changed.why
    if changed.saved:
        made.tensors = {
            name: value.to(how.dtype or value.dtype) if value.is_floating_point() else value
            for name, value in values.items()
            if value is not None
        }
    made.rest[step.path or "(bare parameters)"] = changed


def _frobenius(tensor: torch.Tensor) -> float:
    return frobenius(tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.flatten(1))


def _norm(parts: Iterable[float]) -> float:
    return sum(part**2 for part in parts) ** 0.5


def _warn(report: ExtractReport, how: _How) -> None:
    """Say what the adapter lacks, where that is much."""
    ours = median(layer.norm for layer in report.layers if layer.rank)
    for kind, (tensors, change) in report.kinds(saved=False).items():
        if kind == "head":
            paths = [path for path, rest in report.rest.items() if rest.kind == "head" and not rest.saved]
            report.warnings.append(
                f"{', '.join(paths)}: the fine-tune's head is left out, and the base's answers; --head save keeps it"
            )
        elif change > ours:
            report.warnings.append(
                f"{kind}: {tensors} tensors are left out that moved by {change:.3g} of their norm, the linear layers "
                f"by {ours:.3g}" + ("" if how.rest == "save" else "; --rest save keeps them")
            )
    above = [layer for layer in report.layers if how.residual is not None and layer.residual > 1.001 * how.residual]
    if above:
        report.warnings.append(
            f"{len(above)} layers are left with a residual above {how.residual}, of {above[0].path} "
            f"{above[0].residual:.3g}: the factors' dtype holds no less; --dtype float32 may"
        )
    for path, rest in report.rest.items():
        if rest.why:
            report.warnings.append(f"{path} cannot be saved in an adapter ({rest.why}) and is left out")


def _config(inputs: Inputs, report: ExtractReport) -> dict[str, Any]:
    """What PEFT reads; what is not said here has its default there."""
    skeleton = inputs.skeleton
    ranks = {layer.path: layer.rank for layer in report.layers if layer.rank}
    linear = {path for path in ranks if path not in skeleton.tensors}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != usual}
    biased = [path for path, rest in report.rest.items() if rest.saved and rest.kind == "bias of a linear layer"]
    modules = [path for path, rest in report.rest.items() if rest.saved and path not in biased]
    tied = {name.rpartition(".")[0] for name in skeleton.tied.values()}
    location = inputs.stored.checkpoint.location
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": peft_targets(skeleton.model, linear),
        "target_parameters": sorted(set(ranks) - linear) or None,
        "modules_to_save": modules or None,
        "bias": "all" if biased else "none",
        "fan_in_fan_out": any(isinstance(skeleton.module(path), Conv1D) for path in linear),
        "ensure_weight_tying": bool(tied & set(modules)),
        "task_type": peft_task(skeleton.model, any(r.saved and r.kind == "head" for r in report.rest.values())),
        "base_model_name_or_path": location.id if location.revision else str(location.path.resolve()),
        "revision": location.revision,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def peft_targets(model: Any, adapted: set[str]) -> list[str] | str:
    """The adapted layers as PEFT looks for them: by their last names where that hits no other module, else by path."""
    others: dict[str, bool] = {}
    for path, _ in model.named_modules():
        leaf = path.rpartition(".")[2]
        others[leaf] = others.get(leaf, False) or path not in adapted
    found = {path if others[path.rpartition(".")[2]] else path.rpartition(".")[2] for path in adapted}
    strays = (path for path, _ in model.named_modules() if path not in adapted)
    whole = tuple(f".{path}" for path in found)
    if any(path.endswith(whole) for path in strays):
        return "|".join(re.escape(path) for path in sorted(adapted))
    return sorted(found)


def peft_task(model: Any, heads: bool) -> str | None:
    """PEFT's name for what the model does; none where its class for that would ask for a head that is left out."""
    import transformers

    for task, auto in TASKS.items():
        classes = getattr(transformers, auto)._model_mapping.get(type(model.config), ())
        if task != "FEATURE_EXTRACTION" and type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            return task if heads or task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None
    return None


def _card(inputs: Inputs, report: ExtractReport, how: _How) -> str:
    """The model card, with Hub metadata."""
    location = inputs.stored.checkpoint.location
    named = f"base_model: {location.id}\n" if location.revision else ""
    adapted = [layer for layer in report.layers if layer.rank]
    wanted = f"rank {how.rank}" if how.rank else f"relative residual {how.residual}"
    notes = "".join(f"\n- {w}" for w in report.warnings)
    return f"""---
library_name: peft
{named}tags: [coterie, lora]
---

# A LoRA adapter extracted from a full fine-tune

{len(adapted)} linear layers, {wanted}: their deltas' leading singular directions, with a relative residual of
{spread([layer.residual for layer in adapted])} (median, range). `extract.json` records every layer and every source.
Extracted with [coterie](https://pypi.org/project/coterie/).
{f"{chr(10)}What it noted:{chr(10)}{notes}{chr(10)}" if notes else ""}"""
