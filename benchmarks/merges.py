"""Every merge, and SMILE, of the same eight experts, in one table.

The suite text8 with the adapters that the package carries, or with its full fine-tunes. Each method runs at its
defaults and at the parameters that are best on validation rows among a few; what is finished is kept in the cache, so
that a run that was stopped goes on.

    python benchmarks/merges.py                            # writes benchmarks/results/merges.json; about half an hour
    python benchmarks/merges.py --experts full             # benchmarks/results/merges-full.json; trains what lacks
    python benchmarks/merges.py --methods ties,dare        # so that two runs can share the work
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from coterie.evaluation.compare import compare
from coterie.merging import registry

RESULTS = Path(__file__).parent / "results"
SCALES = (0.3, 0.6, 1.0)
SMILE = {
    "committed": [{"rank": 16, "gate_rank": gate} for gate in (4, 8, 16)],
    "full": [{"rank": 32, "gate_rank": gate} for gate in (8, 16, 32)],
}
MIXTURES = ("smile", "tall", "emr")
DESCENT = ("wudi",)  # 300 steps of Adam on every matrix: among full fine-tunes only; its closed form is in both tables
TWO_ONLY = ("slerp",)


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", choices=list(SMILE), default="committed")
    parser.add_argument("--methods", help="default: all that can take such experts")
    parser.add_argument("--rows", type=int, default=250, help="test rows of each task")
    parser.add_argument("--validation-rows", type=int, default=50)
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--out", type=Path, help="default: build/merges, or build/merges-full")
    options = parser.parse_args()
    name = "merges" if options.experts == "committed" else "merges-full"
    of_adapters = {m.name for m in registry.known() if m.acts_on == "factors"}
    left_out = {*TWO_ONLY, *(of_adapters if options.experts == "full" else DESCENT)}
    methods = options.methods or ",".join(
        [*MIXTURES, *(method.name for method in registry.known() if method.name not in left_out)]
    )
    out = options.out or Path("build") / name
    grids = {m.name: [{"scale": s} for s in SCALES] for m in registry.known() if "scale" in m.defaults}
    compare(
        "text8", methods, out, experts=options.experts, rows=options.rows, validation_rows=options.validation_rows,
        cache=options.cache, grids={**grids, "smile": SMILE[options.experts]},
    )  # fmt: skip
    if options.methods is None:
        shutil.copyfile(out / "results.json", RESULTS / f"{name}.json")
        print(f"written: {RESULTS / name}.json")


if __name__ == "__main__":
    main()
