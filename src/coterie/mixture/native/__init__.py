"""The native path: a mixture layer's experts in compiled code, for inference on a CPU.

It is compiled on first use, with the system's C++ compiler, into torch's extension cache (`TORCH_EXTENSIONS_DIR`). The
environment variable `COTERIE_NATIVE=1` lets path "auto" take it; `model.coterie.use_path("native")` asks for it.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ...errors import CoterieError
from ...experts.bank import Bank
from ...routing.decision import Decision
from ...routing.energy import SubspaceEnergy

SOURCE = Path(__file__).with_name("experts.cpp")
# By level, not "native": the extension cache may be shared by machines.
TARGET = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}


@lru_cache
def kernel() -> Any:
    """The compiled operators (half a minute the first time).

    Raises:
        CoterieError: they cannot be compiled here.
    """
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp", *TARGET.get(capability, [])]
    try:
        name = f"coterie_{capability.lower().replace(' ', '_')}"
        cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, is_python_module=False)
    except (RuntimeError, OSError) as error:
        raise CoterieError(
            f"the native path cannot be compiled ({str(error).splitlines()[0]})",
            str(SOURCE),
            "install a C++ compiler and ninja, or use another path",
        ) from error
    return torch.ops.coterie


@lru_cache
def enabled() -> bool:
    """Whether path "auto" may take it: it was switched on, and compiles. Warns where it does not."""
    if os.environ.get("COTERIE_NATIVE") != "1":
        return False
    try:
        kernel()
    except CoterieError as error:
        warnings.warn(f"{error}; COTERIE_NATIVE=1 has no effect", stacklevel=2)
        return False
    return True


def serves(bank: Bank, score: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether it computes a layer's call: low-rank experts of equal ranks, one dtype, no gradients."""
    shape, dtype = bank.shape, x.dtype
    ranks = shape.ranks or (0,)
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and dtype == bank.dtype
        and min(ranks) == max(ranks) > 0
        and shape.scale == 1
        and type(score) is SubspaceEnergy
    )


def scores(bank: Bank, score: SubspaceEnergy, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router reads of x (tokens, d_in), (tokens, n, gate_rank), and its scores (tokens, n)."""
    if x.dtype != torch.float32:
        z = F.linear(x, bank.score_rows()).unflatten(-1, (bank.experts, -1))
        return z, score(z)
    z, norms = kernel().scores(x.contiguous(), bank.score_rows(), bank.experts)
    return z, norms


def add_experts(bank: Bank, x: torch.Tensor, z: torch.Tensor, decision: Decision, y: torch.Tensor) -> torch.Tensor:
    """Add the experts' outputs to y (tokens, d_out), in place; z as `scores` gives it."""
    shape, index, gates = bank.shape, decision.index, decision.weight
    assert index is not None
    kernel().add_experts(
        y,
        x.contiguous(),
        index.contiguous(),
        None if gates is None else gates.contiguous(),
        bank.down,
        bank.up,
        bank.bias if shape.bias else None,
        bank.experts,
        None if shape.gate else z,  # else these are the leading rows of `down` already
    )
    return y
