"""Renders docs/speed.md and its pictures from what the benchmarks wrote to benchmarks/results/.

python benchmarks/page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pictures
from cells import KERNEL, NEIGHBOURS, REFERENCE

ROOT = Path(__file__).resolve().parent.parent
TRIED = Path(__file__).with_name("tried.md")  # what a measurement cannot say of itself
Account = dict[str, Any]


def filled(text: str, place: str, content: str) -> str:
    """A page with what stands between a place's mark and the next `<!-- end -->` replaced."""
    before, _, rest = text.partition(f"<!-- {place} -->")
    return f"{before}<!-- {place} -->\n\n{content}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def what(cell: dict[str, Any]) -> str:
    """A cell's subject in a few characters."""
    name = cell["model"].upper().replace("LLAMA", "Llama").replace("VIT", "ViT")
    return name or f"{cell['d_in']} → {cell['d_out']}"


def setting(cell: dict[str, Any]) -> list[str]:
    dtype = {"float32": "f32", "bfloat16": "bf16"}[cell["dtype"]]
    return [
        what(cell), str(cell["experts"]), str(cell["rank"]), str(cell["top_k"]), f"{cell['tokens']:,}",
        dtype, str(cell["threads"]),
    ]  # fmt: skip


SETTING = ["layer or model", "E", "rank", "top-k", "tokens", "dtype", "threads"]


def ratio(account: Account, name: str, spread: bool = False) -> str:
    figures = account["variants"].get(name)
    if figures is None:
        return "–"
    return f"{figures['ratio']:.2f}" + (f" ({figures['low']:.2f}–{figures['high']:.2f})" if spread else "")


def took(account: Account) -> str:
    """The paths that coterie chose, the most frequent first."""
    return ", ".join(sorted(account["paths"], key=account["paths"].get, reverse=True)) or "–"


def limit(account: Account) -> str:
    """The goal that is a ratio to dense."""
    found = [g for g in account["goals"] if not g["goal"].startswith(("not slower", "reference"))]
    return f"≤ {found[0]['limit']:.2f}" if found else "–"


def met(account: Account) -> list[str]:
    """Whether all goals are met, in torch and with the compiled kernel."""
    counted = [goal for goal in account["goals"] if goal["counts"]]
    if not counted:
        return ["–", "–"]
    told = ["yes" if all(goal.get(how, False) for goal in counted) else "**no**" for how in HOW]
    return told if KERNEL in account["variants"] else [told[0], "–"]


HOW = ("met", "met_compiled")
MET = ["all goals met", "with the kernel"]


def routed_table(accounts: list[Account]) -> str:
    head = [*SETTING, "dense ms", "theory", "bytes", "goal", "coterie (quartiles)", "path", "stacked", "grouped",
            KERNEL, REFERENCE, *MET]  # fmt: skip
    rows = [
        [*setting(a["cell"]), f"{a['variants']['dense']['ms']:.3g}", f"{1 + a['cost']['theory']:.2f}",
         f"{a['cost']['bytes_ratio']:.2f}", limit(a), ratio(a, "coterie", True), took(a), ratio(a, "stacked"),
         ratio(a, "grouped"), ratio(a, KERNEL), ratio(a, REFERENCE), *met(a)]
        for a in accounts
    ]  # fmt: skip
    return table(head, rows)


def models_table(accounts: list[Account]) -> str:
    head = [
        *SETTING,
        "dense ms",
        "theory",
        "goal",
        "coterie (quartiles)",
        "path",
        "not shared",
        KERNEL,
        REFERENCE,
        *MET,
    ]
    rows = [
        [*setting(a["cell"]), f"{a['variants']['dense']['ms']:.3g}", f"{1 + a['cost']['theory']:.2f}", limit(a),
         ratio(a, "coterie", True), took(a), ratio(a, "unshared"), ratio(a, KERNEL, True), ratio(a, REFERENCE), *met(a)]
        for a in accounts
    ]  # fmt: skip
    return table(head, rows)


def neighbours_table(accounts: list[Account]) -> str:
    head = ["neighbour", *SETTING, "dense ms", "theory", "coterie (quartiles)", "path", "neighbour (quartiles)", "met"]
    rows = []
    for a in accounts:
        name = NEIGHBOURS[a["cell"]["method"]]
        rows.append(
            [name, *setting(a["cell"]), f"{a['variants']['dense']['ms']:.3g}", f"{1 + a['cost']['theory']:.2f}",
             ratio(a, "coterie", True), took(a), ratio(a, name, True), met(a)[0]]
        )  # fmt: skip
    return table(head, rows)


def simple_table(accounts: list[Account]) -> str:
    head = [*SETTING, "dense ms", "theory", "coterie (quartiles)", "path", REFERENCE]
    rows = [
        [*setting(a["cell"]), f"{a['variants']['dense']['ms']:.3g}", f"{1 + a['cost']['theory']:.2f}",
         ratio(a, "coterie", True), took(a), ratio(a, REFERENCE)]
        for a in accounts
    ]  # fmt: skip
    return table(head, rows)


# --- goals ----------------------------------------------------------------------------------------------------------


def goals_table(accounts: list[Account]) -> str:
    """How many cells meet each kind of goal."""
    kinds: dict[str, list[Account]] = {}
    for account in accounts:
        for goal in account["goals"]:
            if goal["counts"]:
                kinds.setdefault(goal["goal"], []).append(goal)
    named = {"reference's overhead / 2.5": f"at least 2.5x less overhead than {REFERENCE}"}
    rows = [
        [
            named.get(kind, kind), str(len(found)), str(sum(each["met"] for each in found)),
            str(sum(each.get("met_compiled", each["met"]) for each in found))
            if any("met_compiled" in each for each in found) else "–",
            "–" if kind.endswith("x theory") else str(sum(each["met_by_theory"] for each in found)),
        ]
        for kind, found in sorted(kinds.items())
    ]  # fmt: skip
    head = ["goal", "cells", "met in torch", "with the compiled kernel", "would be, were theory all that it costs"]
    return table(head, rows)


def best_rates(accounts: list[Account]) -> dict[tuple[int, str], tuple[float, float]]:
    """(threads, dtype) -> the most multiply-adds and the most bytes per ms that any dense cell of this run reached."""
    best: dict[tuple[int, str], tuple[float, float]] = {}
    for account in accounts:
        cell, cost, ms = account["cell"], account["cost"], account["variants"]["dense"]["ms"]
        key = cell["threads"], cell["dtype"]
        operations, read = best.get(key, (0.0, 0.0))
        best[key] = max(operations, cost["multiply_adds"] / ms), max(read, cost["bytes"] / ms)
    return best


def misses(accounts: list[Account]) -> str:
    """Every missed goal: by how much, and which of operations and bytes bounds the cell."""
    best = best_rates(accounts)
    rows = []
    for a in accounts:
        cell, cost = a["cell"], a["cost"]
        operations, read = best[cell["threads"], cell["dtype"]]
        by_operations = (cost["multiply_adds"] + cost["extra_multiply_adds"]) / operations
        by_bytes = (cost["bytes"] + cost["extra_bytes"]) / read
        ms = a["variants"]["coterie"]["ms"]
        for goal in a["goals"]:
            if goal["met"] or not goal["counts"]:
                continue
            by = f"{goal['measured']:.2f}, limit {goal['limit']:.2f} (+{goal['measured'] / goal['limit'] - 1:.0%})"
            extra = f"{cost['extra_multiply_adds'] / 1e6:.3g} M / {cost['extra_bytes'] / 1e6:.3g} MB"
            bound = "operations" if by_operations > by_bytes else "bytes"
            rows.append(
                [*setting(cell), cell["method"], goal["goal"], by,
                 f"{goal['compiled']:.2f}" + (", met" if goal["met_compiled"] else "") if "compiled" in goal else "–",
                 extra, f"{by_operations:.3g}", f"{by_bytes:.3g}", f"{ms:.3g}", bound]
            )  # fmt: skip
    if not rows:
        return "None."
    head = [*SETTING, "method", "goal", "measured", "with the kernel", "extra multiply-adds / bytes",
            "floor by operations, ms", "floor by bytes, ms", "coterie, ms", "bounded by"]  # fmt: skip
    return table(head, rows)


# --- other results --------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return str(value).replace("|", "/")


def spoken(name: str) -> str:
    return name.replace("_", " ")


ABOUT = ("versions", "machine", "code")


def flat(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(each, (dict, list)) for each in value.values())


def all_flat(value: Any) -> bool:
    return isinstance(value, (dict, list)) and all(map(flat, value.values() if isinstance(value, dict) else value))


def records(rows: dict[str, dict[str, Any]] | list[dict[str, Any]]) -> str:
    """Records as a table; with their names in the first column, where they have any."""
    named = list(rows.items()) if isinstance(rows, dict) else [("", row) for row in rows]
    columns = list(dict.fromkeys(name for _, row in named for name in row))
    lines = [[*([name] if name else []), *(shown(row[c]) if c in row else "–" for c in columns)] for name, row in named]
    return table([*([""] if isinstance(rows, dict) else []), *map(spoken, columns)], lines)


def anything(result: dict[str, Any], level: int = 3) -> str:
    """A result as text: what it says first, single figures as lines, records as tables."""
    lines, parts = [], []
    for key, value in result.items():
        title = f"{'#' * level} {spoken(key).capitalize()}\n\n"
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in ABOUT}
        if key in (*ABOUT, "what") or value == {}:
            continue
        if isinstance(value, list) and len(value) > LONGEST:
            lines.append(f"- {spoken(key)}: {len(value)} of them, in the file")
        elif value and all_flat(value):
            parts.append(title + records(value))
        elif isinstance(value, dict) and not flat(value):
            parts.append(title + anything(value, level + 1))
        else:
            lines.append(f"- {spoken(key)}: {shown(value)}")
    what = [f"{result['what'][:1].upper()}{result['what'][1:]}."] if "what" in result else []
    return "\n\n".join([*what, *(["\n".join(lines)] if lines else []), *parts])


def measured_with(result: dict[str, Any]) -> list[str]:
    """The versions and machines that a result names, anywhere inside it, each once."""
    own = [shown(result[key]) for key in ("versions", "machine") if key in result]
    inner = [each for value in result.values() if isinstance(value, dict) for each in measured_with(value)]
    return list(dict.fromkeys([*own, *inner]))


LONGEST = 40  # rows of a table of these
OTHERS = {
    "gpu.json": ("On a GPU", "python benchmarks/gpu.py"),
    "building.json": ("Building a mixture", "python benchmarks/building.py"),
    "factorise.json": ("Factorising a delta", "python benchmarks/factorise.py"),
    "paths.json": ("The rule that chooses a compute path", "python benchmarks/paths.py"),
    "memory.json": ("Peak memory of a build", "python benchmarks/memory.py"),
}


# --- the page -------------------------------------------------------------------------------------------------------


def running_sections(result: dict[str, Any], draw: Callable[[str, list[Account]], str], gpus: str) -> list[str]:
    accounts = [a for a in result["cells"] if "variants" in a]
    missing = [a for a in result["cells"] if "variants" not in a]

    def those(test: Callable[[dict[str, Any]], bool]) -> list[Account]:
        return [a for a in accounts if test(a["cell"])]

    layers = those(lambda c: not c["model"] and c["method"] == "smile" and not c["backward"] and c["experts"] > 1)
    many = [a for a in layers if a["cell"]["tokens"] >= 512]
    few = [a for a in layers if a["cell"]["tokens"] <= 32]
    models = those(lambda c: bool(c["model"]) and c["method"] == "smile" and c["experts"] > 1)
    beside = those(lambda c: c["method"] in NEIGHBOURS)
    one = those(lambda c: c["method"] == "task" or (c["experts"] == 1 and c["method"] == "smile"))
    back = those(lambda c: c["backward"])
    machine, version = result["machine"], result["versions"]
    rounds = sorted(a["rounds"] for a in accounts)
    native = "has" if machine["native_bfloat16"] else "lacks"
    cpu = f"{machine['cpu']} (family and model {machine['family_and_model']})"
    sections = [
        f"""## Running a mixture

A figure is a **ratio**: the time of a call divided by that of the dense base model's call in the same round, all
variants alternating in one process; the median over {rounds[0]} to {rounds[-1]} rounds, with quartiles in brackets.
Before anything is timed, every variant's output is compared with the right one.
*Theory* is 1 plus the method's extra multiply-adds as a share of the dense layers' (SMILE: E × gate rank × d_in +
top-k × rank × (d_in + d_out), gate rank min(16, rank)); *bytes* is the ratio of the weights and activations that must
be read. {REFERENCE} is the reference implementation of SMILE, given the same factors. Weights and inputs are random;
experts move weights and biases. Up to 32 tokens, a call goes through enough copies of the layer to exceed the
last-level cache, as it goes through the layers of a model. *Compiled* is coterie with its C++ kernel switched on
(`COTERIE_NATIVE=1`), where it then takes it; all else is torch alone.

Processor: {cpu}, {machine["cpus"]} processors, last-level cache {machine["last_level_cache_mib"]:.0f} MiB, {native}
bfloat16 arithmetic. Versions: {", ".join(f"{name} {number}" for name, number in version.items())}. Command:
`python benchmarks/running.py`; figures in `benchmarks/results/running.json`. GPUs: {gpus}."""
    ]
    if missing:
        reasons = [f"{what(a['cell'])} ({a.get('skipped') or a.get('wrong')})" for a in missing]
        sections.append("Not measured: " + "; ".join(reasons) + ".")
    sections.append("### Goals\n\n" + goals_table(accounts))

    def section(title: str, text: str, found: list[Account], rows: Callable[[list[Account]], str], name: str) -> None:
        if found:
            picture = draw(name, found) if name else ""
            sections.append("\n\n".join(part for part in (f"### {title}", text, picture, rows(found)) if part))

    section(
        "Whole models",
        "ViT and BERT have 6 layers 384 wide and run batches of 8 sequences; Llama (8 layers 768 wide, a vocabulary "
        "of 32,000) decodes one token after 128 in its cache. *Not shared*: layers that read the same input (q, k and "
        "v; gate and up) each project it for themselves.",
        models,
        models_table,
        "models",
    )
    section("Layers, many tokens", "", many, routed_table, "overhead")
    section("Layers, few tokens", "", few, routed_table, "few")
    crossing = [a for a in layers if is_crossing(a["cell"])]
    if len({a["cell"]["tokens"] for a in crossing}) > 2:
        sections.append("### Compute paths\n\n" + draw("paths", crossing))
    section(
        "Neighbours",
        "The same mathematics: Arrow is SMILE's layer with gate rank 1 and top-3; X-LoRA mixes all adapters by given "
        "scalings (its own first pass through the base, which computes them, is left out on both sides); "
        "`adapter_names` names one adapter per sequence.",
        beside,
        neighbours_table,
        "neighbours",
    )
    section(
        "One expert known for the call, or one expert in all",
        'With `model.coterie.route("name")`, layers are merged once and run like the dense base, with a second copy of '
        "their weights in memory. A single expert needs no router; it is merged only where one asks for it.",
        one,
        simple_table,
        "",
    )
    section(
        "One decision for an example, by the layers' vote",
        "SMILE with `pool: model`: the layers vote in a pass of the base before, without experts, which *theory* "
        "counts; Llama's prompt has voted before the token that is timed.",
        those(lambda c: c["method"] == "vote"),
        simple_table,
        "",
    )
    section(
        "Forward and backward",
        "Gradients of the input and of every parameter, the base's included.",
        back,
        simple_table,
        "",
    )
    sections.append(
        "### Where a goal is missed\n\nThe floors are what the counted operations and bytes would take at the highest "
        "rate that any dense cell of this run reached with the same threads and dtype; what lies above the higher one "
        "is calls and passes over activations (in whole models, also everything that is not a linear layer).\n\n"
        + misses(accounts)
    )
    return sections


def is_crossing(cell: dict[str, Any]) -> bool:
    plain = cell["dtype"] == "float32" and cell["threads"] == 1 and cell["top_k"] == 1
    return plain and (cell["d_in"], cell["d_out"], cell["experts"], cell["rank"]) == (768, 3072, 8, 32)


def grid_section(result: dict[str, Any]) -> str:
    accounts = [a for a in result["cells"] if "variants" in a]
    ratios = sorted(a["variants"]["coterie"]["ratio"] for a in accounts)
    return (
        f"## The whole grid\n\n{len(accounts):,} of {len(result['cells']):,} cells could be measured here "
        "(`python benchmarks/running.py --full`; figures in `benchmarks/results/running-full.json`). "
        f"The median ratio is {ratios[len(ratios) // 2]:.2f}, the highest {ratios[-1]:.2f}.\n\n" + goals_table(accounts)
    )


def native_table(result: dict[str, Any]) -> str:
    rows = [
        [a["cell"], f"{a['theory']:.2f}", ratio(a, "grouped", True), ratio(a, "native", True)] for a in result["cells"]
    ]
    return (
        "One thread by its processor time, two by the clock; command: `python benchmarks/native.py`; figures in "
        "`benchmarks/results/native.json`.\n\n" + table(["model or layer", "theory", "grouped", "native"], rows)
    )


def render(results: Path, page: Path) -> None:
    """Write the page and its pictures (in a folder beside it, of the same name)."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    def draw(name: str, accounts: list[Account]) -> str:
        pictures.DRAW[name](accounts, folder / f"{name}.svg")
        return f"![{pictures.CAPTION[name]}]({folder.name}/{name}.svg)\n\n*{pictures.CAPTION[name]}*"

    def read(name: str) -> dict[str, Any] | None:
        path = results / name
        return json.loads(path.read_text()) if path.exists() else None

    parts = [
        "# Speed",
        "Rendered by `make bench` from the figures in `benchmarks/results/`.",
    ]
    if running := read("running.json"):
        gpus = "see below" if (results / "gpu.json").exists() else "not measured (`make bench-gpu` does)"
        parts += running_sections(running, draw, gpus)
    if TRIED.exists():
        parts.append("### What was tried\n\n" + TRIED.read_text().strip())
    if compiled := read("native.json"):
        parts.append("### The compiled path\n\n" + native_table(compiled))
    if full := read("running-full.json"):
        parts.append(grid_section(full))
    for name, (title, command) in OTHERS.items():
        if result := read(name):
            source = f"Command: `{command}`; figures in `benchmarks/results/{name}`."
            about = f"Measured with {'; '.join(measured_with(result))}."
            parts += [f"## {title}", source, anything(result), about]
    page.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.md")
    options = parser.parse_args()
    render(options.results, options.out)
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
