"""What stands beside the weights: configuration, provenance, tokenizer, model card."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..sources.locate import hub_id

if TYPE_CHECKING:
    from ..mixture.spec import MixtureSpec
    from .inputs import Inputs
    from .report import BuildReport

# Of the base: what makes its inputs,
INPUTS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "generation_config.json",
)
# and what sentence-transformers makes of its outputs.
_SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling")


def copy_inputs(source: Path, folder: Path, patterns: Iterable[str] = (*INPUTS, *_SENTENCES)) -> None:
    """Copy what makes a model's inputs: tokenizer, processor, generation settings; of an encoder, its pooling."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, folder / file.name)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from .. import __version__

    installed = {name: version(name) for name in ("transformers", "safetensors")}
    return {"coterie": __version__, "torch": torch.__version__, **installed, "python": platform.python_version()}


def write_metadata(
    folder: Path, inputs: Inputs, spec: MixtureSpec, report: BuildReport, dtype: torch.dtype | None, light: bool
) -> None:
    """Write everything of a mixture directory but its weights."""
    from ..mixture.handle import guard, nested_configs

    base = inputs.stored.checkpoint.location
    fingerprint = inputs.stored.fingerprint()
    copy_inputs(base.path, folder)
    if light:
        found = base.id if base.revision else str(base.path.resolve())
        spec.base = {"id": found, "revision": base.revision, "fingerprint": fingerprint}
    config = inputs.config
    stored = next(i.dtype for i in inputs.stored.checkpoint.tensors.values() if i.dtype.is_floating_point)
    for each in (config, *nested_configs(config)):
        each.dtype = str(dtype or config.dtype or stored).removeprefix("torch.")
    guard(config, spec)
    config.save_pretrained(folder)
    provenance = {
        "recipe": inputs.recipe.model_dump(mode="json"),
        "versions": versions(),
        "kinds": {expert.name: expert.kind for expert in inputs.experts},
        "base": {"id": base.id, "revision": base.revision, "fingerprint": fingerprint},
        "tensors_read": {
            name: dict(sorted(inputs.read_before.get(name, c.sha256).items())) for name, c in inputs.checkpoints.items()
        },
        "report": {**report.to_dict(), "out": None},
    }
    (folder / "mixture.json").write_text(json.dumps(provenance, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(card(inputs, report, light), encoding="utf-8")


def card(inputs: Inputs, report: BuildReport, light: bool) -> str:
    """The model card, with Hub metadata."""
    import yaml

    ids = [inputs.recipe.base, *(e.source for e in inputs.recipe.experts.values())]
    hub = list(dict.fromkeys(repository for source in ids if (repository := hub_id(source))))
    meta: dict[str, Any] = {"library_name": "transformers", "tags": ["coterie", "moe", "merge", report.method]}
    if hub:
        meta |= {"base_model": hub, "base_model_relation": "merge"}
    method = report.method
    parameters = ", ".join(f"{k} = {v}" for k, v in report.parameters.items())
    rows = "\n".join(
        f"| `{json.dumps(name, ensure_ascii=False)[1:-1]}` | {e.kind} |"
        for name, e in zip(report.experts, inputs.experts, strict=True)
    )
    notes = "".join(f"\n- {w}" for w in report.warnings)
    use = (
        "model = coterie.load(DIR)"
        if light
        else f"model = {report.architecture}.from_pretrained(DIR)  # or coterie.load(DIR)"
    )
    masks = any("mask" in layer.ranks for layer in report.layers)
    hold = "one model per task, which `model.coterie.route` names" if masks else "a sparse mixture of low-rank experts"
    hold += f" ({parameters})" if parameters else ""
    return f"""---
{yaml.safe_dump(meta, sort_keys=False).strip()}
---

# A {method} mixture of {len(report.experts)} experts

A `{report.architecture}` whose {len(report.layers)} linear layers hold {hold}:
{report.mixture_parameters:,} parameters, {report.ratio:.3f} times the base model's.
Built with [coterie](https://pypi.org/project/coterie/); `mixture.json` records every source and residual.

| expert | read from |
|---|---|
{rows}

```python
import coterie
from transformers import {report.architecture}

{use}
```
{f"{chr(10)}What the build noted:{chr(10)}{notes}{chr(10)}" if notes else ""}"""
