"""Small trained mixtures for the tests, with experts and routers that matter to the output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coterie
from zoo import ARCHS, base_model, inputs

# method -> whether experts can be bottleneck adapters, too
METHODS = {
    "smear": True,
    "ensemble": True,
    "switch": True,
    "st_gumbel": True,
    "reinforce": True,
    "dselect_k": True,
    "soft_moe": True,
    "adamix": True,
    "poly": True,
    "mhr": False,
    "tag": True,
    "hash": True,
    "single": True,
}
KINDS = [(m, kind) for m, both in METHODS.items() for kind in (("lora", "bottleneck") if both else ("lora",))]
BY_TASK = ("tag", "poly", "mhr")
# What a causal model takes in place of a method's default pool.
CAUSAL: list[tuple[str, dict[str, Any]]] = [
    ("smear", {"pool": "prompt"}),
    ("smear", {"pool": "segment", "segment": 3}),
    ("ensemble", {"pool": "prompt"}),
    ("ensemble", {"pool": "segment", "segment": 3}),
    ("ensemble", {"pool": "token"}),
    ("switch", {"top_k": 2}),
    ("switch", {"pool": "prompt"}),
    ("st_gumbel", {"pool": "token"}),
    ("st_gumbel", {"pool": "prompt"}),
    ("reinforce", {"pool": "prompt"}),
    ("dselect_k", {"pool": "prompt"}),
    ("adamix", {}),
    ("poly", {}),
    ("mhr", {}),
    ("tag", {}),
    ("hash", {"pool": "prompt"}),
    ("single", {}),
]
EXPERTS = 3


def quick(cases: Iterable[Any], every: int, start: int = 0) -> list[Any]:
    """Every so many cases by default, the others marked slow: the whole matrix takes minutes."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if i % every == start else pytest.mark.slow
        )
        for i, case in enumerate(cases)
    ]


def wrapped(
    model: nn.Module | str, method: str, kind: str = "lora", *, experts: Any = EXPERTS, random: bool = True, **more: Any
) -> Any:
    """A wrapped mixture in training mode; `more`: the method's parameters, and `modules` and the like.

    Args:
        model: a dense model, or the zoo's name of one.
        random: whether experts and routers are random and not as they start.
    """
    model = base_model(model) if isinstance(model, str) else model
    keys = {key: more.pop(key) for key in ("modules", "also_train", "seed") if key in more}
    parameters = {"rank": 4, **({} if method == "mhr" else {"expert": kind}), **more}
    mixture = coterie.wrap(model, coterie.MixtureConfig(method=method, experts=experts, parameters=parameters, **keys))
    if random:
        randomise(mixture)
    return mixture


def randomise(mixture: nn.Module, seed: int = 1) -> None:
    """Experts and routers of realistic scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in mixture.named_parameters():
            if ".bank." not in name and ".router." not in name:
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            scale = 0.5 * p.shape[-1] ** -0.5 if ".bank.down" in name and p.ndim == 2 else 0.2
            if ".router." in name:
                scale = 0.5
            p.add_(scale * noise)


def batch_of(
    arch: str, batch: int = 3, length: int = 7, padding: str = "right", labels: bool = False
) -> dict[str, Tensor]:
    """Inputs for an architecture of the zoo, padded on one side (or on none: ""), with tasks, labels if wanted."""
    given = inputs(arch, batch=batch, length=length)
    kind = ARCHS[arch].kind
    if padding and "attention_mask" in given:
        mask = given["attention_mask"]
        for b in range(1, batch):
            mask[b, slice(length - b, None) if padding == "right" else slice(None, b)] = 0
        given["input_ids"] = given["input_ids"].masked_fill(mask == 0, 0)
    if labels:
        if kind == "classify":
            given["labels"] = torch.arange(batch) % 3
        elif kind == "vision":
            given["labels"] = torch.arange(batch) % 5
        elif kind == "causal":
            given["labels"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
            # the prompt: two tokens of each row
            given["labels"][(given["attention_mask"].cumsum(1) <= 2)] = -100
        elif kind == "seq2seq":
            given["labels"] = given.pop("decoder_input_ids").clone()
            if padding:
                given["labels"][1, 3:] = -100
    return given


def tasks(batch: int = 3) -> Tensor:
    """Each example's task."""
    return torch.arange(batch) % EXPERTS


def call_of(method: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with what the method wants beside it."""
    first = next(iter(given.values()))
    return {**given, "task_ids": tasks(len(first))} if method in BY_TASK else given
