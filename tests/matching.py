"""Comparing a mixture with the reference, and building mixtures through the public contract only."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import coterie
from reference import Expert, Reference
from zoo import outputs

Run = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

TOLERANCE = 1e-5
MARGIN = 1e-4


@dataclass
class Match:
    """What a comparison found: decisions compared, decisions that fell differently, largest relative error."""

    decisions: int
    flips: int
    error: float


def doubled(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its floating-point tensors in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, over the largest absolute value wanted where that is above one."""
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    return float((got.double() - wanted.double()).abs().max() / max(1.0, float(wanted.abs().max())))


def traced(mixture: nn.Module, batch: Mapping[str, Tensor], run: Run = outputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixture's outputs and its gates by layer."""
    with coterie.routing_trace(mixture) as trace:
        got = run(mixture, batch)
    return got, {name: trace[name] for name in trace}


def assert_matches(
    mixture: nn.Module,
    base: nn.Module,
    experts: list[Expert],
    layers: list[str],
    batch: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    run: Run = outputs,
    **options,
) -> Match:
    """The mixture computes what the reference computes, and decides as it decides wherever that is well-defined.

    The reference runs in float64 on the decisions that the mixture took, so that outputs can be compared to
    rounding; its own free decisions on the same inputs must agree wherever the margin exceeds ``MARGIN``.
    """
    got, trace = traced(mixture, batch, run)
    reference = Reference(base, experts, layers, **options)
    assert set(trace) == set(reference.layers)
    wanted = reference.run(lambda m: run(m, doubled(batch)), trace)
    decisions = flips = 0
    for name, decision in reference.decisions.items():
        gates = trace[name]
        assert gates.shape[0] == len(got)
        assert gates.ndim == 3
        assert gates.shape[2] == len(experts)
        gates = gates.double().reshape(-1, len(experts))
        differ = ((gates > 0) != decision.free).any(-1)
        decisions += len(differ)
        flips += int(differ.sum())
        wrong = differ & (decision.margin > MARGIN)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {len(wrong)} decisions differ beyond the margin"
        assert (gates - decision.gates).abs().max() < TOLERANCE, f"{name}: gates differ"
    error = relative_error(got, wanted)
    assert error <= tolerance, f"outputs differ by {error:.2e}; {flips} of {decisions} decisions flipped"
    return Match(decisions, flips, error)


def assert_not_dense(mixture: nn.Module, base: nn.Module, batch: Mapping[str, Tensor], least: float = 1e-3) -> None:
    """The mixture visibly differs from the base."""
    assert relative_error(outputs(mixture, batch), outputs(base, batch)) > least


def smile(base: nn.Module, experts: Mapping[str, nn.Module], **options) -> nn.Module:
    """``coterie.smile`` in eval mode with its warnings silenced; tests of warnings call it directly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return coterie.smile(base, dict(experts), **options).eval()


def build(out: Path, base: Path, experts: Mapping[str, object], *, load: bool = True, **recipe) -> nn.Module | object:
    """Build a SMILE mixture from directories into ``out``; the loaded mixture, or the report if ``load`` is false.

    ``recipe`` may hold any other key of a recipe; parameters of the method are given as ``parameters``.
    """
    experts = {n: s if isinstance(s, dict) else str(s) for n, s in experts.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = coterie.build({"method": "smile", "base": str(base), "experts": experts, **recipe}, out=out)
        return coterie.load(out).eval() if load else report


def python(code: str, *arguments: object) -> str:
    """Run ``code`` in a fresh interpreter that can import coterie; its standard output. Fails where it fails."""
    path = [str(Path(coterie.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
