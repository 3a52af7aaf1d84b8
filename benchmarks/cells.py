"""What is measured of running a mixture: the cells, what each costs in theory, and the goals that it is held to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

THREADS = (1, 2)
DTYPES = ("float32", "bfloat16")
TOKENS = (1, 32, 512, 1576, 4096)
WIDTHS = ((384, 384), (384, 1536), (768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096))
EXPERTS = (2, 4, 8, 32, 128)
RANKS = (8, 32, 128)
TOP_K = (1, 2)
ITEM = {"float32": 4, "bfloat16": 2}
# What a cell computes: SMILE; the same by the layers' vote (`pool: model`), or with one known expert for the call; and
# the mathematics of PEFT's neighbours.
METHODS = ("smile", "vote", "task", "arrow", "xlora", "mixed")


@dataclass(frozen=True)
class Cell:
    """One thing that is measured.

    Attributes:
        d_in, d_out: widths of the layer; 0 for a whole model.
        model: "vit", "bert" or "llama" for a whole model, else "".
        method: one of `METHODS`.
        experts: E.
        rank: of every expert.
        top_k: experts that answer a token (smile and arrow).
        tokens: in all; in batches of 8 sequences where there are 512 or more, and for `mixed`.
        backward: forward and backward, gradients of the input and of every parameter.
    """

    d_in: int = 0
    d_out: int = 0
    model: str = ""
    method: str = "smile"
    experts: int = 8
    rank: int = 32
    top_k: int = 1
    tokens: int = 1576
    dtype: str = "float32"
    threads: int = 1
    backward: bool = False

    @property
    def gate_rank(self) -> int:
        return 1 if self.method == "arrow" else min(16, self.rank)

    @property
    def batch(self) -> int:
        """Sequences: 8, or 1 where few tokens are one sequence's."""
        return 8 if self.tokens >= 512 or self.method == "mixed" else 1

    @property
    def key(self) -> str:
        """The cell in a line: its identity."""
        what = self.model or f"{self.d_in}->{self.d_out}"
        back = " backward" if self.backward else ""
        return (
            f"{what} {self.method} E={self.experts} r={self.rank} k={self.top_k} T={self.tokens} {self.dtype}"
            f" threads={self.threads}{back}"
        )

    @property
    def pool(self) -> str:
        """For what SMILE decides at a time."""
        return "model" if self.method == "vote" else "token"

    @property
    def bank(self) -> tuple[Any, ...]:
        """What must be built for it; cells with the same bank are measured on the same modules."""
        sizes = self.d_in, self.d_out, self.experts, self.rank, self.gate_rank
        return self.model, *sizes, self.top_k, self.has_bias, self.pool

    @property
    def has_bias(self) -> bool:
        """Whether experts change the bias: full fine-tunes do, LoRA adapters do not."""
        return self.method in ("smile", "vote", "task")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gate_rank": self.gate_rank, "batch": self.batch}


# --- theory -------------------------------------------------------------------------------------------------------


def extra_multiply_adds(cell: Cell, d_in: int, d_out: int) -> int:
    """A method's multiply-adds per token beyond the dense layer's.

    SMILE: E x gate_rank x d_in for the scores, top_k x rank x (d_in + d_out) for the experts that answer. Arrow is
    SMILE with gate_rank 1. Where the gates are given there are no scores; where one expert is known for the call,
    its delta is merged, and nothing is added.
    """
    answer = cell.rank * (d_in + d_out)
    if cell.method == "task":
        return 0
    if cell.method == "mixed" or cell.experts == 1:
        return answer
    if cell.method == "xlora":
        return cell.experts * answer
    return cell.experts * cell.gate_rank * d_in + min(cell.top_k, cell.experts) * answer


def bank_elements(cell: Cell, d_in: int, d_out: int) -> float:
    """Bank elements that must be read for a call: all gate rows, and the experts that answer some token.

    With scores from the expert's own rows these are read once. Of E equally likely experts, T tokens that choose k
    each touch E (1 - (1 - k / E)^T) on average.
    """
    if cell.method == "task":
        return 0
    if cell.method == "xlora" or cell.experts == 1:
        return cell.experts * cell.rank * (d_in + d_out)
    if cell.method == "mixed":
        return min(cell.experts, cell.batch) * cell.rank * (d_in + d_out)
    k = min(cell.top_k, cell.experts)
    touched = cell.experts * (1 - (1 - k / cell.experts) ** cell.tokens)
    gate = cell.experts * cell.gate_rank * d_in
    return gate + touched * ((cell.rank - cell.gate_rank) * d_in + cell.rank * d_out)


def costs(cell: Cell, linears: list[tuple[int, int, bool]]) -> dict[str, float]:
    """Multiply-adds and bytes of a cell, dense and beyond, counted over linear layers.

    Args:
        cell: the cell.
        linears: (d_in, d_out, whether it is a mixture layer) of every linear layer.
    """
    item, mixtures = ITEM[cell.dtype], [(n, m) for n, m, mixture in linears if mixture]
    dense = cell.tokens * sum(n * m for n, m, _ in linears)
    extra = cell.tokens * sum(extra_multiply_adds(cell, n, m) for n, m in mixtures)
    if cell.method == "vote" and cell.model == "llama":  # its prompt has voted: the chosen expert is all that is added
        extra = cell.tokens * sum(cell.rank * (n + m) for n, m in mixtures)
    elif cell.method == "vote":  # in a pass of the base before
        extra += dense
    read = item * sum(n * m + cell.tokens * (n + m) for n, m, _ in linears)
    more = item * sum(bank_elements(cell, n, m) for n, m in mixtures)
    passes = 3 if cell.backward else 1
    return {
        "multiply_adds": passes * dense,
        "extra_multiply_adds": passes * extra,
        "theory": extra / dense,
        "bytes": read,
        "extra_bytes": round(more),
        "bytes_ratio": 1 + more / read,
    }


# --- goals --------------------------------------------------------------------------------------------------------

MODEL_GOALS = {"vit": 1.6, "bert": 1.35, "llama": 1.4}
LESS_THAN_REFERENCE = 2.5
NEIGHBOURS = {"arrow": "PEFT Arrow", "xlora": "PEFT X-LoRA", "mixed": "PEFT adapter_names"}
REFERENCE = "fusion-bench"
KERNEL = "compiled"  # what a mixture takes with COTERIE_NATIVE=1


def goals(cell: Cell, cost: dict[str, float], ratios: dict[str, float], native: bool) -> list[dict[str, Any]]:
    """The goals of a cell, each with its limit, what was measured, and whether it is met; and would be at `theory`.

    Args:
        cell: the cell.
        cost: its `costs`.
        ratios: variant -> time as a ratio to dense; where "compiled" is among them, each goal has it in the place of
            "coterie" too.
        native: whether the processor computes in the cell's dtype; goals count only then.
    """
    found: list[dict[str, Any]] = []
    variants = {"measured": ratios["coterie"]} | ({"compiled": ratios[KERNEL]} if KERNEL in ratios else {})

    def at_most(what: str, limit: float, measure: Callable[[float], float] = lambda ratio: ratio) -> None:
        figures = {name: measure(ratio) for name, ratio in variants.items()}
        met = {"met" if name == "measured" else "met_compiled": figure <= limit for name, figure in figures.items()}
        met["met_by_theory"] = measure(1 + cost["theory"]) <= limit
        found.append({"goal": what, "limit": limit, **figures, **met, "counts": native})

    routed = cell.method == "smile" and not cell.backward
    if routed and cell.model and cell.experts > 1:
        at_most("whole model", MODEL_GOALS[cell.model])
    if routed and not cell.model and cell.tokens >= 512:
        factor = 2 if min(cell.d_in, cell.d_out) >= 768 else 3
        at_most(f"{factor} x theory", 1 + factor * cost["theory"])
        if ratios.get(REFERENCE, 0) > 1:  # else it has no overhead to be less than
            overhead = ratios[REFERENCE] - 1
            at_most("reference's overhead / 2.5", 1 / LESS_THAN_REFERENCE, lambda ratio: (ratio - 1) / overhead)
    if routed and not cell.model and cell.tokens <= 32 and min(cell.d_in, cell.d_out) >= 768:
        at_most("max(1.6, 1.3 x bytes)", max(1.6, 1.3 * cost["bytes_ratio"]))
    for other in (REFERENCE, *NEIGHBOURS.values()):
        if other in ratios:
            at_most(f"not slower than {other}", ratios[other])
    return found


# --- which cells --------------------------------------------------------------------------------------------------


def default_cells() -> list[Cell]:
    """The fixed cells of the default run."""
    small, square, up, down = (384, 384), (768, 768), (768, 3072), (3072, 768)
    wide, large = (1024, 4096), (4096, 4096)

    def layer(widths: tuple[int, int], **settings: Any) -> Cell:
        return Cell(*widths, **settings)

    cells = [layer(widths) for widths in WIDTHS]
    cells += [layer(widths, tokens=512) for widths in (square, up, down)]
    cells += [layer(up, tokens=4096)]
    cells += [layer(widths, threads=2) for widths in ((384, 1536), square, up, down)]
    cells += [layer(up, experts=experts) for experts in (2, 32, 128)]
    cells += [layer(up, rank=rank) for rank in (8, 128)]
    cells += [layer(widths, top_k=2) for widths in (square, up)]
    cells += [layer(widths, dtype="bfloat16") for widths in (square, up)]
    cells += [layer(up, dtype="bfloat16", threads=2)]
    cells += [layer(widths, tokens=1) for widths in (small, square, up, down, wide, large)]
    cells += [layer(widths, tokens=32) for widths in (square, up, large)]
    cells += [layer(up, tokens=tokens, threads=2) for tokens in (1, 32)]
    cells += [layer(square, tokens=1, experts=32), layer(up, tokens=1, top_k=2)]
    cells += [layer(up, tokens=tokens, dtype="bfloat16") for tokens in (1, 32)]
    cells += [layer(square, experts=1), layer(up, tokens=1, experts=1)]
    cells += [layer(up, method="task"), layer(up, method="task", tokens=1)]
    cells += [layer(square, tokens=512, backward=True), layer(up, backward=True)]
    vit = Cell(model="vit", tokens=8 * 197)
    bert = Cell(model="bert", experts=4, tokens=8 * 128)
    llama = Cell(model="llama", experts=4, tokens=1)
    cells += [replace(model, threads=threads) for model in (vit, bert, llama) for threads in THREADS]
    cells += [replace(llama, experts=8), replace(vit, dtype="bfloat16")]
    cells += [replace(vit, method="task"), replace(llama, method="task"), replace(llama, experts=1)]
    cells += [replace(model, method="vote") for model in (vit, bert, llama)]
    for method, top_k in (("arrow", 3), ("xlora", 1), ("mixed", 1)):
        few = 8 if method == "mixed" else 1
        cells += [layer(square, method=method, top_k=top_k, tokens=tokens) for tokens in (512, few)]
        cells += [replace(bert, method=method, top_k=top_k)]
    cells += [layer(up, method="arrow", top_k=3, experts=32, tokens=512)]
    return cells


def grid() -> Iterator[Cell]:
    """Every cell of the full run: the default ones, and the whole grid of SMILE layers, bank by bank."""
    seen = set()
    banks = product(WIDTHS, EXPERTS, RANKS, TOP_K)
    whole = (
        Cell(*widths, experts=experts, rank=rank, top_k=k, tokens=tokens, dtype=dtype, threads=threads)
        for widths, experts, rank, k in banks
        for dtype, tokens, threads in product(DTYPES, TOKENS, THREADS)
    )
    for cell in (*default_cells(), *whole):
        if cell not in seen:
            seen.add(cell)
            yield cell


def by_bank(cells: list[Cell]) -> list[list[Cell]]:
    """Cells grouped by what must be built, float32 first, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.bank, []).append(cell)
    return [sorted(group, key=lambda cell: DTYPES.index(cell.dtype)) for group in groups.values()]


def code_version() -> str:
    """A fingerprint of the code that is measured and of the code that measures."""
    here = Path(__file__).resolve().parent
    package = here.parent / "src" / "coterie"
    files = [path for room in ("mixture", "routing", "experts") for path in (package / room).rglob("*.py")]
    files += (package / "mixture" / "native").glob("*.cpp")
    files += [here / f"{name}.py" for name in ("cells", "neighbours", "running", "subjects", "timing")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
