"""Starting is cheap: what is imported is counted, not timed (benchmarks/building.py times it)."""

from __future__ import annotations

import json

import pytest

from matching import python

HEAVY = {"torch", "transformers", "numpy", "pydantic", "peft", "safetensors", "huggingface_hub", "ray", "yaml", "rich"}

LOADED = """
import json, sys
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HELP = """
sys.argv = ["coterie", "--help"]
import contextlib, io
from coterie.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
"""


@pytest.mark.parametrize(
    ("code", "allowed", "most"),
    [("import coterie", set(), 210), ("import coterie.cli", set(), 260), (HELP, {"rich"}, 400)],
    ids=["import", "cli", "help"],
)
def test_few_modules_are_imported(code, allowed, most):
    loaded = json.loads(python(LOADED.format(code=code)))
    assert "coterie" in loaded
    assert not HEAVY & set(loaded) - allowed
    assert len(loaded) <= most
