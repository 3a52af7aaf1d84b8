"""The HTML page of a mixture: one file that works without a network."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..errors import CoterieError
from ..evaluation.cells import write_whole
from ..evaluation.tables import marked
from .charts import Figure, Layers, Palette, percent
from .figures import kept_sentence, overlap_means, weights
from .inspect import Inspection
from .routing import RoutingRecord
from .routing_figures import routed
from .subspaces import LayerSpaces

GENERATOR = "coterie inspect"
# Example texts hold at most so many (token, layer) pairs in all, and so many tokens each.
PAIRS, TOKENS = 60_000, 48
# What is seen of characters that a line of text does not show.
SIGNS = str.maketrans("\n\r\t", "↵␍⇥")


def require_free(out: Path) -> None:
    """Refuse to replace a file that is no page of ours, and a place where none can be written.

    Raises:
        CoterieError: it is a directory or another file, or its directory is missing.
    """
    if not out.absolute().parent.is_dir():
        raise CoterieError("its directory does not exist", str(out), "make it, or choose another file")
    if out.is_dir():
        raise CoterieError("is a directory", str(out), "give the name of a file")
    if out.exists():
        with out.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(1000):
                raise CoterieError("exists already and is no report", str(out), "choose another file, or remove it")


def write_page(
    out: Path,
    title: str,
    inspection: Inspection,
    layers: list[LayerSpaces],
    record: RoutingRecord | None = None,
    tokenizer: Any = None,
) -> None:
    """Write the page; the file appears whole or not at all.

    Args:
        out: the file; a page of ours is replaced.
        title: what to call the mixture.
        inspection: what its files say.
        layers: what its weights say.
        record: what its routers did on data.
        tokenizer: turns the ids of example texts into tokens; without it no texts are shown.

    Raises:
        CoterieError: the extra `report` is missing, or the file cannot be written.
    """
    page = render(title, inspection, layers, record, tokenizer)
    require_free(out)
    try:
        write_whole(out.absolute(), page)
    except OSError as error:
        raise CoterieError(f"cannot be written ({error})", str(out), "choose another file") from None


def render(
    title: str,
    inspection: Inspection,
    layers: list[LayerSpaces],
    record: RoutingRecord | None = None,
    tokenizer: Any = None,
) -> str:
    """The page as text; arguments as for `write_page`."""
    try:
        from jinja2 import Environment, PackageLoader
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise CoterieError(
            "the HTML page needs plotly and jinja2", "inspect --html", "run: pip install 'coterie[report]'"
        ) from None
    report = (inspection.provenance or {}).get("report") or {}
    built = {each["path"]: each for each in report.get("layers", [])}
    mass = record.mass.mean(0).tolist() if record else None
    palette = Palette(inspection.experts, mass)
    axis = Layers(layers)
    by_weight = weights(layers, inspection.experts, built, palette)
    by_data = routed(axis, record) if record else []
    texts = _texts(record, tokenizer, axis) if record and tokenizer is not None else []
    data = {
        "figures": [_plain(figure) for figure in by_weight + by_data],
        "paths": axis.paths,
        "views": [members for _, _, members in axis.views],
        "kinds": [{"label": label, "members": members} for label, members in axis.kinds],
        "experts": inspection.experts,
        "colours": palette.colours,
        "texts": texts,
    }
    environment = Environment(loader=PackageLoader("coterie", "report"), autoescape=True, trim_blocks=True)
    environment.filters["marked"] = marked
    return environment.get_template("page.html").render(
        generator=GENERATOR,
        title=title,
        inspection=inspection,
        report=report,
        tiles=_tiles(inspection, report, layers, record),
        kept=kept_sentence(layers, built),
        experts=_experts(inspection, built),
        costs=_costs(inspection, layers),
        by_weight=by_weight,
        by_data=by_data,
        record=record,
        tasks=_tasks(record) if record else [],
        texts=texts,
        axis=axis,
        palette=palette,
        data=_script(data),
        # The library is packed: a third of its size, and every browser since 2023 unpacks it.
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
    )


def _tiles(
    inspection: Inspection, report: dict[str, Any], layers: list[LayerSpaces], record: RoutingRecord | None
) -> list[tuple[str, str]]:
    """The page's head: a number, and what it is."""
    kinds = len(Layers(layers).kinds)
    tiles = [
        (str(len(inspection.experts)), "experts"),
        (str(len(layers)), f"mixture layers of {kinds} kind{'s' if kinds > 1 else ''}"),
    ]
    if report.get("ratio"):
        tiles.append((f"{report['ratio']:.2f}×", "the base's parameters"))
    else:
        tiles.append((_count(inspection.size["parameters"]), "parameters"))
    overlap = overlap_means(layers)
    if overlap and overlap[1]:
        tiles.append((f"{overlap[0] / overlap[1]:.1f}×", "chance: overlap between experts"))
    if record:
        hits = torch.stack([task.hits for task in record.tasks])
        if hits.isfinite().any():
            tiles.append((percent(float(hits.nanmean())), "of tokens routed to their task's expert"))
        tiles.append((f"{sum(task.tokens for task in record.tasks):,}", f"tokens of {len(record.tasks)} tasks"))
    return tiles


def _experts(inspection: Inspection, built: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(inspection.experts):
        ranks = [layer["ranks"][i] for layer in inspection.layers.values() if layer["ranks"][i] is not None]
        kept = [1 - each["residuals"][i] ** 2 for each in built.values() if each["residuals"][i] is not None]
        norms = [each["norms"][i] for each in built.values() if each["norms"][i] is not None]
        rows.append(
            {
                "name": name,
                "source": inspection.sources[i] or "not recorded",
                "layers": len(ranks),
                "ranks": _range(ranks),
                "kept": percent(fmean(kept)) if kept else "–",
                "norm": percent(fmean(norms)) if norms else "–",
                "heads": ", ".join(p for p, owners in inspection.heads.items() if name in owners) or "shared",
            }
        )
    return rows


def _costs(inspection: Inspection, layers: list[LayerSpaces]) -> list[dict[str, Any]]:
    """Per kind of layer: what its experts cost."""
    axis = Layers(layers)
    rows: list[dict[str, Any]] = []
    for label, members in axis.kinds:
        own = sum(layers[i].d_in * layers[i].d_out for i in members)
        bank = sum(layers[i].parameters for i in members)
        forms = [form for i in members for form in inspection.layers[layers[i].path]["ranks"] if form is not None]
        widths = f"{layers[members[0]].d_in} → {layers[members[0]].d_out}"
        rows.append(
            {
                "kind": label,
                "layers": len(members),
                "widths": widths,
                "ranks": _range(forms),
                "parameters": _count(bank),
                "ratio": bank / own,
            }
        )
    most = max((row["ratio"] for row in rows), default=1)
    return [row | {"width": 100 * row["ratio"] / most} for row in rows]


def _tasks(record: RoutingRecord) -> list[dict[str, Any]]:
    rows = []
    for task, mass in zip(record.tasks, record.mass, strict=True):
        top = int(mass.argmax())
        hits = float(task.hits.nanmean())
        rows.append(
            {
                "task": task.task,
                "expert": None if task.expert is None else record.experts[task.expert],
                "rows": task.rows,
                "tokens": f"{task.tokens:,}",
                "right": "–" if math.isnan(hits) else percent(hits),
                "top": f"{record.experts[top]} ({percent(float(mass[top]))})",
                "mistaken": task.expert is not None and top != task.expert,
            }
        )
    return rows


def _texts(record: RoutingRecord, tokenizer: Any, axis: Layers) -> list[dict[str, Any]]:
    """Example texts: per token its piece, and per layer the experts that answer, with their gates in hundredths.

    A layer is the expert's index where one expert has the whole gate, a list [expert, gate, expert, gate, ...]
    otherwise, and None where it does not see the token.
    """
    rows: list[dict[str, Any]] = []
    budget = PAIRS
    for turn in range(max(len(task.examples) for task in record.tasks)):
        for task in record.tasks:
            if turn >= len(task.examples):
                continue
            example = task.examples[turn]
            ids = example.ids[:TOKENS]
            budget -= len(ids) * len(axis.paths)
            if budget < 0 and rows:
                return sorted(rows, key=lambda row: row["at"])
            special = set(tokenizer.all_special_ids)
            tokens = []
            for at, token in enumerate(ids):
                gates = example.gates[:, at]
                mean = gates.nanmean(0)
                tokens.append(
                    {
                        "piece": _piece(tokenizer, token),
                        "special": token in special,
                        "top": int(mean.nan_to_num().argmax()),
                        "gates": [_gates(layer) for layer in gates],
                    }
                )
            names = [each.task for each in record.tasks]
            expert = None if task.expert is None else record.experts[task.expert]
            rows.append({"task": task.task, "expert": expert, "tokens": tokens, "at": (names.index(task.task), turn)})
    return sorted(rows, key=lambda row: row["at"])


def _piece(tokenizer: Any, token: int) -> str:
    """A token as one reads it, its spaces kept, line breaks and tabs as signs.

    Bytes that are no character by themselves stay as the vocabulary has them.
    """
    raw, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "▁" in raw:  # sentencepiece's spaces, the first of which decoding drops
        text = raw.replace("▁", " ")
    return str(text if text and "\ufffd" not in text else raw).translate(SIGNS)


def _gates(gates: Tensor) -> int | list[int] | None:
    if gates.isnan().any():
        return None
    used = sorted(((round(100 * g), e) for e, g in enumerate(gates.tolist()) if g >= 0.005), reverse=True)
    return used[0][1] if len(used) == 1 else [value for g, e in used[:4] for value in (e, g)]


def _plain(figure: Figure) -> dict[str, Any]:
    kept = ("key", "data", "layout", "height", "chooser", "views")
    return {key: value for key, value in asdict(figure).items() if key in kept}


def _script(data: Any) -> str:
    """JSON for a script element: three digits are enough, NaN is null, and no text ends the element."""
    return json.dumps(_rounded(data), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value


def _range(ranks: list[Any]) -> str:
    if not ranks:
        return "–"
    counted = Counter(ranks)
    if len(counted) <= 3:
        return ", ".join(str(rank) for rank in sorted(counted, key=str))
    numbers = [rank for rank in counted if isinstance(rank, int)]
    return f"{min(numbers)}–{max(numbers)}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
