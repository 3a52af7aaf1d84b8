"""What data-aware merges ask of each expert: Fisher information, or Gram matrices of its linear layers' inputs."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CoterieError
from ..sources.checkpoint import Checkpoint
from ..sources.locate import locate

Batch = Mapping[str, Tensor]
Kind = Literal["fisher", "gram"]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one model on one task's data.

    Attributes:
        kind: "fisher" (for the merge of that name) or "gram" (for regmean).
        tensors: name of the model's tensor in memory -> float32; a Fisher diagonal in its shape, or (in, in).
        rows: how many examples (Fisher) or unpadded tokens (Gram; of the layer that saw most) they are a mean over.
        model: the model's id or path, as it knows it.
        norm: the length of all Fisher diagonals together before they were divided by it; 1 for Gram matrices.
        fingerprint: of the checkpoint, as `fingerprint` gives it; empty for a live model.
    """

    kind: Kind
    tensors: dict[str, Tensor]
    rows: int
    model: str
    norm: float = 1.0
    fingerprint: str = ""

    def write(self, file: str | Path, force: bool = False) -> None:
        """Write a safetensors file, which appears whole or not at all.

        Raises:
            CoterieError: the file exists.
        """
        from safetensors.torch import save_file

        file = Path(file).absolute()
        require_free(file, force)
        provenance = {"kind": self.kind, "model": self.model, "rows": str(self.rows), "norm": repr(self.norm)}
        provenance["fingerprint"] = self.fingerprint
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            staged = Path(folder) / file.name
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, staged, {"format": "pt", **provenance})
            os.replace(staged, file)

    def summary(self) -> str:
        """One line for the terminal."""
        unit = "examples" if self.kind == "fisher" else "tokens"
        return f"{self.kind} of {len(self.tensors)} tensors over {self.rows} {unit} of {self.model}"


def read(file: str | Path) -> Statistics:
    """Statistics as `Statistics.write` wrote them.

    Raises:
        CoterieError: the file is missing, or was not made by coterie.
    """
    from safetensors import safe_open

    found = _provenance(file)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    kind: Kind = "gram" if found["kind"] == "gram" else "fisher"
    return Statistics(
        kind, tensors, int(found["rows"]), found["model"], float(found["norm"]), found.get("fingerprint", "")
    )


def require_kind(file: str | Path, kind: Kind) -> None:
    """Raise where a file holds no statistics of that kind."""
    found = _provenance(file)["kind"]
    if found != kind:
        raise CoterieError(
            f"holds statistics of kind {found}, and the method needs {kind}",
            str(file),
            f"make them with `coterie statistics --kind {kind}`",
        )


def require_own(file: str | Path, expert: Checkpoint) -> None:
    """Raise where a file holds the statistics of another checkpoint than the expert's; reads all of the expert."""
    found = _provenance(file)
    if found.get("fingerprint") and found["fingerprint"] != fingerprint(expert):
        raise CoterieError(
            f"holds the statistics of another checkpoint ({found['model']}) than {expert.location.path}",
            str(file),
            "give each expert its own file, or run `coterie statistics` on this expert",
        )


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over the names of a checkpoint's tensors and their values' hashes, whatever its shards."""
    for name in checkpoint.tensors:
        checkpoint.read(name)
    lines = (f"{name} {sha256}" for name, sha256 in sorted(checkpoint.sha256.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    empirical: bool = False,
    seed: int = 0,
    logits: Callable[[Any], Tensor] = lambda output: output.logits,
) -> Statistics:
    """The diagonal of the Fisher information: the mean over examples of (d log p(y | x) / d theta)^2.

    The true Fisher draws y from the model's own prediction (a class per row, a token per unpadded position, a normal
    variable of variance 1 around a single output), so it needs no labels. What is given back has length 1 over all
    tensors, as the authors' merge makes it. [Matena and Raffel 2022, arXiv:2111.09832, section 3.2 and code]

    Args:
        model: any model; in evaluation mode meanwhile.
        batches: keyword arguments of the model's forward, first dimension the examples.
        empirical: take y from the batches' `labels`: the square of the gradient of the model's own loss.
        seed: of the drawn y.
        logits: the model's output -> (1, ..., classes).

    Raises:
        CoterieError: no batches, or a model that gives neither logits nor (`empirical`) a loss.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros(tensor.shape) for name, tensor in _floating(model).items()}
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    generator, rows = torch.Generator().manual_seed(seed), 0
    with _evaluating(model), torch.enable_grad():
        for row in (row for batch in batches for row in _rows(batch, model)):
            output = model(**row)
            try:
                value = output.loss if empirical else _drawn(logits(output), row, problem, generator)
            except AttributeError:
                value = None
            if value is None:
                wanted = "loss: give batches with labels" if empirical else "logits: say what they are with `logits`"
                raise CoterieError(f"its output has no {wanted}", type(model).__name__)
            for name, gradient in zip(
                named, torch.autograd.grad(value, [*named.values()], allow_unused=True), strict=True
            ):
                if gradient is not None:
                    sums[name] += gradient.float().square().cpu()
            rows += 1
    _require_rows(rows)
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in sums.values())) / rows
    if not 0 < norm < math.inf:
        raise CoterieError(f"the Fisher information has length {norm}", "model", "check the model and the data")
    return Statistics("fisher", {n: t.div_(rows * norm) for n, t in sums.items()}, rows, _id(model), norm)


def gram(model: nn.Module, batches: Iterable[Batch]) -> Statistics:
    """Mean of x x^T over the inputs of every linear layer; what `attention_mask` calls padding does not count.

    A mean and not a sum, so that the amount of data is no weight. [Jin et al. 2023, arXiv:2212.09849, section 3]

    Args:
        model: any model; in evaluation mode meanwhile.
        batches: keyword arguments of the model's forward.

    Raises:
        CoterieError: no batches.
    """
    from ..mixture.layer import MIXTURE_OF, widths

    layers = {path: module for path, module in model.named_modules() if type(module) in MIXTURE_OF}
    sums = {path: torch.zeros(widths(layer)[0], widths(layer)[0]) for path, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def add(path: str, x: Tensor) -> None:
        sums[path] += (x.T @ x).cpu()
        counts[path] += len(x)

    over_inputs(model, batches, layers, add)
    rows = max(counts.values(), default=0)
    _require_rows(rows)
    # A layer that no input reached keeps zeros: RegMean averages there.
    means = {f"{path}.weight": total / max(counts[path], 1) for path, total in sums.items()}
    return Statistics("gram", means, rows, _id(model))


def over_inputs(
    model: nn.Module, batches: Iterable[Batch], layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> None:
    """Run data through a model, and show what its layers read; what `attention_mask` calls padding is left out.

    Args:
        model: any model; in evaluation mode meanwhile.
        batches: keyword arguments of the model's forward.
        layers: path -> layer.
        see: is called with a layer's path and the rows that it reads, (rows, in) float32.
    """
    masks: dict[str, Tensor] = {}

    def show(path: str, x: Tensor) -> None:
        see(path, _unpadded(x, masks, "decoder_attention_mask" if "decoder" in path else "attention_mask").float())

    hooks = [m.register_forward_pre_hook(lambda _, args, path=p: show(path, args[0])) for p, m in layers.items()]
    try:
        with _evaluating(model), torch.no_grad():
            for batch in batches:
                given = moved(batch, model)
                masks.update({n: v.bool() for n, v in given.items() if n.endswith("attention_mask")})
                model(**given)
    finally:
        for hook in hooks:
            hook.remove()


def gather(
    source: str,
    data: str | Path,
    kind: Kind,
    out: str | Path,
    *,
    text: str = "text",
    batch_size: int = 8,
    max_length: int = 512,
    limit: int | None = None,
    device: str = "cpu",
    force: bool = False,
    token: str | None = None,
) -> Statistics:
    """Statistics of a checkpoint on a file of texts, written to `out`; what `coterie statistics` runs.

    Args:
        source: a full model's directory, or Hub id (`id@revision`).
        data: JSON lines or CSV.
        kind: "fisher" (the true one: no labels are needed) or "gram".
        out: the safetensors file to make.
        text: the column of the texts.
        batch_size: texts at a time.
        max_length: tokens of a text, at most.
        limit: use so many texts, from the first; None for all.
        device: where the model runs, in float32.
        force: replace an existing file.
        token: Hub token.

    Raises:
        CoterieError: bad data, a model that does not take texts alone, or an output that exists.
    """
    require_free(Path(out), force)
    texts = [each for each in read_texts(Path(data), text) if each.strip()][:limit]
    if not texts:
        raise CoterieError("holds no texts", str(data), "give some rows")
    model, tokenizer = _load(source, device, token)
    max_length = min(max_length, tokenizer.model_max_length, _positions(model.config))

    def batches() -> Iterator[Batch]:
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            yield tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")

    found = fisher(model, batches()) if kind == "fisher" else gram(model, batches())
    found = replace(found, fingerprint=fingerprint(Checkpoint.open(locate(source, token))))
    found.write(out, force)
    return found


def read_texts(file: Path, column: str) -> Iterator[str]:
    """One column of a JSON-lines (`.jsonl`, `.json`) or CSV file (`.csv`, `.tsv`).

    Raises:
        CoterieError: a file that cannot be read, of another kind, or a row without the column.
    """
    if file.suffix not in (".jsonl", ".json", ".csv", ".tsv"):
        raise CoterieError(f"is a {file.suffix or 'nameless'} file", str(file), "give .jsonl or .csv")
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows: Iterable[Any]
            if file.suffix in (".csv", ".tsv"):
                rows = csv.DictReader(lines, delimiter="," if file.suffix == ".csv" else "\t")
            else:
                rows = (json.loads(line) for line in lines if line.strip())
            for number, row in enumerate(rows, 1):
                found = row.get(column) if isinstance(row, dict) else None
                if not isinstance(found, str):
                    has = ", ".join(map(str, row)) if isinstance(row, dict) else "no columns"
                    raise CoterieError(
                        f"row {number} has no text {column!r} (it has {has})", str(file), "name the column with --text"
                    )
                yield found
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, CoterieError):
            raise
        raise CoterieError(f"cannot be read ({error})", str(file), "give a JSON-lines or CSV file in UTF-8") from None


def require_free(file: Path, force: bool) -> None:
    """Raise before any work if the output is in the way."""
    if file.is_dir():
        raise CoterieError("is a directory", str(file), "give a file name")
    if file.exists() and not force:
        raise CoterieError("exists already", str(file), "choose another file, or replace it with --force")


def require_shape(statistics: Tensor, shape: Sequence[int]) -> None:
    """Raise where an expert's statistics do not fit a tensor: (E, ...) against the shape of each expert's."""
    if statistics.shape[1:] != torch.Size(shape):
        raise CoterieError(
            f"statistics of shape {list(statistics.shape[1:])} do not fit one of {list(shape)}",
            "statistics",
            "make them from these experts with `coterie statistics`",
        )


def _provenance(file: str | Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            found: dict[str, str] = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CoterieError(f"cannot be read ({error})", str(file), "make it with `coterie statistics`") from None
    if not {"kind", "model", "rows", "norm"} <= set(found):
        raise CoterieError("holds no statistics", str(file), "make them with `coterie statistics`")
    return found


def _load(source: str, device: str, token: str | None) -> tuple[Any, Any]:
    import transformers

    place = locate(source, token)
    if place.is_adapter:
        raise CoterieError(
            "is an adapter", source, "load it with PEFT, merge_and_unload() it, save_pretrained, and give that"
        )
    config = place.json("config.json") or {}
    name = next(iter(config.get("architectures") or []), "")
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise CoterieError(f"its class {name!r} is unknown to transformers", source, "give a transformers model")
    model = architecture.from_pretrained(place.path, dtype=torch.float32).to(device)
    if model.config.is_encoder_decoder:
        raise CoterieError(
            f"{name} needs more than texts",
            source,
            f"call coterie.merging.statistics.{'{fisher, gram}'} with your batches",
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.path)
    except (OSError, ValueError) as error:
        raise CoterieError(
            f"has no tokenizer that can be read ({' '.join(str(error).split())[:200]})", source, "save it there"
        ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # what transformers makes of a missing one
        raise CoterieError("has no tokenizer", source, "save it there")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise CoterieError("its tokenizer has no token for padding", source, "give it one (pad_token), and save it")
    if getattr(model.config, "pad_token_id", None) is None:  # by which classifiers of decoders find the last token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _positions(config: Any) -> int:
    """How many tokens a model takes, as far as its configuration says."""
    found = getattr(config, "max_position_embeddings", None) or sys.maxsize
    # RoBERTa and its kin count positions from the padding's number on.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    return int(found) - offset


def _drawn(logits: Tensor, row: Batch, problem: str | None, generator: torch.Generator) -> Tensor:
    """log p(y | x) of a y drawn from the model's prediction, added up over the positions that are no padding."""
    logits = logits.float()
    if logits.shape[-1] == 1:  # a normal variable of variance 1: d log p = (y - f) df
        return (torch.randn(logits.shape, generator=generator).to(logits.device) * logits).sum()
    if problem == "multi_label_classification":
        y = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=generator).to(logits.device)
        return -nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
    chances = logits.log_softmax(-1).flatten(0, -2)
    y = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    chosen = chances.gather(1, y).view(logits.shape[:-1])
    masks = [row[n] for n in ("decoder_attention_mask", "attention_mask") if n in row]
    mask = next((m for m in masks if chosen.ndim == 2 and m.shape == chosen.shape), None)
    return (chosen if mask is None else chosen * mask).sum()


def _unpadded(x: Tensor, masks: Mapping[str, Tensor], first: str) -> Tensor:
    """The rows of a layer's input that belong to tokens, (rows, in); `first` names the mask to try first."""
    rows = x.detach().reshape(-1, x.shape[-1])
    for name in sorted(masks, key=lambda name: name != first):
        mask = masks[name]
        if mask.shape == x.shape[:-1] or (x.ndim == 2 and mask.numel() == len(rows)):
            return rows[mask.reshape(-1)]
    return rows


def _rows(batch: Batch, model: nn.Module) -> Iterator[dict[str, Any]]:
    """The examples of a batch one by one: squares of gradients do not add up over a batch."""
    given = moved(batch, model)
    for i in range(len(next(iter(given.values())))):
        yield {name: value[i : i + 1] for name, value in given.items()}


def moved(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model's parameters are."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and in the mode that it was in afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Floating tensors that the model saves; those without a gradient have no Fisher information, and are averaged."""
    saved = model.state_dict().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in saved and tensor.is_floating_point()}


def _require_rows(rows: int) -> None:
    if not rows:
        raise CoterieError("no batches were given", "statistics", "give some of the expert's own data")


def _id(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__
