"""What a training leaves: its report, and the finished directory with weights, inputs' files, provenance and card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..building.finish import INPUTS, copy_inputs, versions
from ..sources.locate import Location, hub_id
from .data import Rows
from .recipe import TrainRecipe


@dataclass
class TrainReport:
    """What came out of a training.

    Attributes:
        out: the mixture's directory.
        steps: optimiser's steps, of all runs.
        metrics: on `validation` (where there is one): of all rows, and of each task under `TASK/...`.
        load: task (or "all") -> each expert's share of the decisions' weight, mean over layers, in the experts' order.
        experts: their names.
        parameters: trained, and of the whole mixture.
    """

    out: str
    steps: int
    metrics: dict[str, float]
    load: dict[str, list[float]]
    experts: list[str]
    parameters: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dict(self.__dict__)

    def table(self) -> Any:
        """The report for a terminal."""
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row("mixture", self.out)
        table.add_row(
            "trained", f"{self.parameters['trained']:,} of {self.parameters['all']:,} parameters, {self.steps} steps"
        )
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:.4g}")
        for task, shares in self.load.items():
            named = (f"{name} {share:.2f}" for name, share in zip(self.experts, shares, strict=True))
            table.add_row(f"load, {task}", ", ".join(named))
        return table


def write(
    given: TrainRecipe, rows: Rows, base: Location, model: Any, processor: Any, report: TrainReport, folder: Path
) -> None:
    """The finished directory: weights, inputs' files, logs, provenance, model card."""
    shutil.rmtree(folder / "built", ignore_errors=True)
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    logs = folder / "run" / "runs"
    if logs.is_dir():
        logs.rename(folder / "runs")
    shutil.rmtree(folder / "run", ignore_errors=True)
    model.save_pretrained(folder)
    copy_inputs(base.path, folder, INPUTS)
    processor.save_pretrained(folder)
    recipe = given.model_dump(mode="json", exclude_none=True)
    spec = model.coterie.spec
    sources = given.experts if isinstance(given.experts, dict) else {}
    recipe["experts"] = {n: {"source": sources[n].source if n in sources else "trained"} for n in spec.experts}
    record: dict[str, Any] = {
        "recipe": recipe,
        "versions": versions(),
        "base": {
            "id": base.id if base.revision else str(base.path.resolve()),
            "revision": base.revision,
            "fingerprint": None,
        },
        "data": rows.files,
        "training": {**report.to_dict(), "out": None, "tasks": rows.tasks, "labels": rows.labels},
    }
    if is_mixture(base):  # its base is this one's
        record["base"] = (base.json("mixture.json") or {}).get("base")
    (folder / "mixture.json").write_text(json.dumps(plain(record), indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(_card(given, rows, model, report), encoding="utf-8")


def _card(given: TrainRecipe, rows: Rows, model: Any, report: TrainReport) -> str:
    """The model card, with Hub metadata."""
    import yaml

    spec, name = model.coterie.spec, type(model).__name__
    pipeline = {"causal-lm": "text-generation", "seq2seq": "text2text-generation"}.get(given.task, given.task)
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": pipeline}
    meta["tags"] = ["coterie", "moe", spec.method]
    if repository := hub_id(given.base):
        meta |= {"base_model": repository, "base_model_relation": "finetune"}
    if report.metrics:
        results = [{"type": k, "value": round(v, 6)} for k, v in report.metrics.items() if "/" not in k]
        row = {"task": {"type": pipeline}, "dataset": {"name": "validation", "type": "own"}, "metrics": results}
        meta["model-index"] = [{"name": f"{spec.method} mixture", "results": [row]}]
    header = " | ".join(spec.experts)
    loads = "\n".join(f"| {task} | {' | '.join(f'{s:.2f}' for s in load)} |" for task, load in report.load.items())
    metrics = "\n".join(f"| {k} | {v:.4g} |" for k, v in report.metrics.items())
    measured = f"\n| on validation | |\n|---|---|\n{metrics}\n" if metrics else ""
    parameters = ", ".join(f"{k} = {v}" for k, v in spec.parameters.items())
    return f"""---
{yaml.safe_dump(meta, sort_keys=False).strip()}
---

# A trained {spec.method} mixture of {len(spec.experts)} experts

A `{name}` for {given.task}, whose {len(spec.layers)} linear layers hold experts and a router
({parameters}): {report.parameters["all"]:,} parameters, {report.parameters["trained"]:,} of them trained, in
{report.steps} steps on {len(rows.train):,} rows. `mixture.json` records recipe, data and versions.
{measured}
Which expert serves what, as share of the decisions' weight:

| task | {header} |
|---|{"---|" * len(spec.experts)}
{loads}

```python
import coterie
from transformers import {name}

model = {name}.from_pretrained(DIR)  # or coterie.load(DIR)
```
"""


def plain(data: Any) -> Any:
    """The same in what JSON knows."""

    def as_python(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else str(value)

    return json.loads(json.dumps(data, default=as_python))


def is_mixture(base: Location) -> bool:
    """Whether a model's directory holds a mixture."""
    spec = (base.json("config.json") or {}).get("quantization_config") or {}
    return bool(spec.get("quant_method") == "coterie")
