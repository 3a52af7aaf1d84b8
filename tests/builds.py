"""Sources of one small build, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo import base_model, fine_tune, make_adapter, save

SHARD = 6000  # bytes: a few dozen shards


def write_sources(folder: Path, arch: str = "bert", **config: Any) -> dict[str, Any]:
    """A base and three experts (two fine-tunes, one of them of everything, and an adapter); the recipe of a build."""
    base = base_model(arch, **config)
    save(base, folder / "base", max_shard_size="20KB")
    save(fine_tune(base, 1), folder / "tuned")
    save(fine_tune(base, 2, everything=True), folder / "changed")
    make_adapter(folder / "base", folder / "adapter", 3, arch=arch)
    return {
        "method": "smile",
        "base": str(folder / "base"),
        "experts": {name: str(folder / name) for name in ("tuned", "changed", "adapter")},
        "parameters": {"rank": 6, "gate_rank": 4},
        "others": "average",
    }


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a mixture, byte by byte; of `mixture.json` everything but what the build cost."""
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    account = json.loads(found["mixture.json"])
    for cost in ("seconds", "peak_memory"):
        del account["report"][cost]
    found["mixture.json"] = json.dumps(account, indent=1)  # the order of keys counts
    return found
