"""A naive SMILE in float64, written from the formula alone.

For a linear layer with weight W (out, in), bias b, and experts i with dW_i = W_i - W = U_i S_i V_i^T:

    r_i(x) = || V_i[:, :g]^T x ||     g = min(gate_rank, smallest numerical rank among the experts that touched W)
    p      = softmax of r over the candidates, kept where r is among the top_k, divided by the sum of what is kept
    y      = W x + b + sum_i p_i w_i (U_i[:, :k] S_i[:k] V_i[:, :k]^T x + (b_i - b))      w_i: the expert's weight

An expert is a candidate in a layer exactly if its dW_i is not zero there. Nothing here is shared with the package.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

NUMERICAL_RANK = 1e-6


@dataclass
class Expert:
    """One expert as deltas in float64.

    Attributes:
        weights: layer path -> dW (out, in).
        biases: layer path -> db (out,).
        others: parameter path -> delta, for every parameter that is not a linear's weight or bias.
        heads: parameter path -> value, for every parameter of the task head.
        scale: the weight that multiplies the expert's delta.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if isinstance(layer, Conv1D) else weight


def from_model(base: nn.Module, tuned: nn.Module, heads: Iterable[str] = (), scale: float = 1.0) -> Expert:
    """An expert from a fine-tuned copy of ``base``. ``heads``: top-level modules that are the task head."""
    heads = tuple(heads)
    linears = _linears(base)
    expert = Expert(scale=scale)
    theirs = dict(tuned.named_parameters())
    for name, p in base.named_parameters():
        module, leaf = name.rpartition(".")[::2]
        if name.split(".")[0] in heads:
            continue
        delta = theirs[name].detach().double() - p.detach().double()
        if module in linears and leaf == "weight":
            expert.weights[module] = _out_in(linears[module], delta).contiguous()
        elif module in linears and leaf == "bias":
            expert.biases[module] = delta
        else:
            expert.others[name] = delta
    expert.heads = {n: p.detach().double() for n, p in theirs.items() if n.split(".")[0] in heads}
    return expert


def _pattern(patterns: Mapping[str, int], module: str, default: float) -> float:
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def from_adapter(base: nn.Module, path: Path, heads: Iterable[str] = (), scale: float = 1.0) -> Expert:
    """An expert from a PEFT LoRA directory, read from its two files and multiplied out in float64."""
    heads = tuple(heads)
    config = json.loads((path / "adapter_config.json").read_text())
    stored = load_file(path / "adapter_model.safetensors")
    tensors = {k.removeprefix("base_model.model."): v.double() for k, v in stored.items()}
    linears = _linears(base)
    expert = Expert(scale=scale)
    saved = {n: p.detach().double() for n, p in base.named_parameters()}
    for key in [k for k in tensors if k.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        a, b = tensors.pop(key), tensors.pop(f"{module}.lora_B.weight")
        rank = _pattern(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        delta = factor * (b @ a)
        magnitude = tensors.pop(f"{module}.lora_magnitude_vector", None)
        if magnitude is not None:
            w = _out_in(linears[module], linears[module].weight.detach().double())
            delta = magnitude[:, None] * (w + delta) / (w + delta).norm(dim=1, keepdim=True) - w
        trained_bias = tensors.pop(f"{module}.lora_B.bias", None)
        if module.split(".")[0] in heads:
            saved[f"{module}.weight"] = saved[f"{module}.weight"] + delta
        elif module in linears:
            expert.weights[module] = delta
        if trained_bias is not None:
            expert.biases[module] = factor * trained_bias
    for key in [k for k in tensors if ".lora_embedding_A" in k]:
        module = key.partition(".lora_embedding_A")[0]
        b = tensors.pop(key.replace("embedding_A", "embedding_B"))
        expert.others[f"{module}.weight"] = config["lora_alpha"] / config["r"] * (b @ tensors.pop(key)).T
    for key, value in tensors.items():  # trained biases and modules_to_save hold values, not deltas
        name = key.replace(".base_layer.", ".")
        module, leaf = name.rpartition(".")[::2]
        if name.split(".")[0] in heads:
            saved[name] = value
        elif module in linears and leaf == "bias":
            delta = value - saved[name]
            expert.biases[module] = expert.biases.get(module, 0) + delta
        elif module in linears and leaf == "weight":
            expert.weights[module] = _out_in(linears[module], value - saved[name])
        elif name in saved:
            expert.others[name] = value - saved[name]
        else:
            raise KeyError(f"{path}: {key} has no place in the base model")
    expert.heads = {n: p for n, p in saved.items() if n.split(".")[0] in heads}
    return expert


def _touched(delta: Tensor | None) -> bool:
    return delta is not None and bool((delta != 0).any())


@dataclass
class Decision:
    """What one layer decided: all tensors have one row per token.

    Attributes:
        scores: (tokens, E), -inf where the expert is no candidate.
        gates: (tokens, E), of the experts that were used (forced or free).
        free: (tokens, E) bool, the experts that the layer would have taken on this input.
        margin: (tokens,) between the last score taken and the first one left out; inf where all candidates are taken.
    """

    scores: Tensor
    gates: Tensor
    free: Tensor
    margin: Tensor


class Layer:
    """One linear layer of the mixture."""

    def __init__(self, layer: nn.Module, name: str, experts: list[Expert], rank: int | str, gate_rank: int, top_k: int):
        self.name, self.top_k = name, top_k
        self.weight = _out_in(layer, layer.weight.detach().double())
        self.bias = None if layer.bias is None else layer.bias.detach().double()
        self.candidates = [i for i, e in enumerate(experts) if _touched(e.weights.get(name))]
        self.count = len(experts)
        factors = {}
        for i in self.candidates:
            u, s, vh = torch.linalg.svd(experts[i].weights[name], full_matrices=False)
            factors[i] = u, s, vh, int((s > NUMERICAL_RANK * s[0]).sum())
        self.gate_rank = min([gate_rank, *(n for *_, n in factors.values())])
        self.ranks = {}
        self.gate, self.delta, self.delta_bias = {}, {}, {}
        for i, (u, s, vh, numerical) in factors.items():
            kept = numerical if rank in ("full", "dense") else min(int(rank), numerical)
            self.ranks[i] = kept
            dense = experts[i].weights[name]
            truncated = dense if rank == "dense" else (u[:, :kept] * s[:kept]) @ vh[:kept]
            self.gate[i] = vh[: self.gate_rank]
            self.delta[i] = experts[i].scale * truncated
            bias = experts[i].biases.get(name)
            self.delta_bias[i] = None if bias is None else experts[i].scale * bias

    def __call__(self, x: Tensor, forced: Tensor | None) -> tuple[Tensor, Decision]:
        shape, x = x.shape, x.reshape(-1, x.shape[-1]).double()
        scores = torch.full((len(x), self.count), -math.inf, dtype=torch.float64)
        for i in self.candidates:
            scores[:, i] = (x @ self.gate[i].T).norm(dim=-1)
        take = min(self.top_k, len(self.candidates))
        ordered = scores.sort(dim=-1, descending=True).values
        left_out = take < len(self.candidates)
        margin = ordered[:, take - 1] - ordered[:, take] if left_out else torch.full((len(x),), math.inf)
        free = scores >= ordered[:, take - 1 : take]
        used = free if forced is None else forced.reshape(-1, self.count) > 0
        p = torch.softmax(scores, dim=-1) * used
        p = p / p.sum(dim=-1, keepdim=True)
        y = F.linear(x, self.weight, self.bias)
        for i in self.candidates:
            out = F.linear(x, self.delta[i], self.delta_bias[i])
            y = y + p[:, i : i + 1] * out
        return y.reshape(*shape[:-1], -1), Decision(scores, p, free, margin)


def to_double(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode; fused experts run eagerly, since grouped GEMMs know no float64."""
    model = copy.deepcopy(model).double().eval()
    if any(p.ndim == 3 and "experts" in n for n, p in model.named_parameters()):
        model.set_experts_implementation("eager")
    return model


class Reference:
    """A whole mixture in float64: the base with the forward of every mixture layer replaced by the naive formula.

    Args:
        base: the base model; not changed.
        experts: in order.
        layers: paths of the linears that may be mixture layers.
        rank, gate_rank, top_k: as in the package; rank is an int, "full" or "dense".
        others: "base" or "average", for every parameter that is neither in a mixture layer nor in a head.
        head: index of the expert whose head is used.
    """

    def __init__(
        self,
        base: nn.Module,
        experts: list[Expert],
        layers: Iterable[str],
        rank: int | str = 32,
        gate_rank: int = 16,
        top_k: int = 1,
        others: str = "base",
        head: int = 0,
    ):
        self.model = to_double(base)
        modules = dict(self.model.named_modules())
        parameters = dict(self.model.named_parameters())
        self.layers: dict[str, Layer] = {}
        self.decisions: dict[str, Decision] = {}
        self._forced: Mapping[str, Tensor] | None = None
        layers = set(layers)
        mean_of = len(experts)
        with torch.no_grad():
            for name in _linears(base):
                if name in layers and any(_touched(e.weights.get(name)) for e in experts):
                    self.layers[name] = Layer(modules[name], name, experts, rank, gate_rank, top_k)
                    modules[name].forward = self._forward(name)
                    continue
                for e in experts:  # a layer that stays dense
                    single = name in layers and mean_of == 1
                    if (others == "average" or single) and name in e.biases:
                        modules[name].bias += e.scale * e.biases[name] / mean_of
                    if others == "average" and name in e.weights:
                        delta = e.weights[name].T if isinstance(modules[name], Conv1D) else e.weights[name]
                        modules[name].weight += e.scale * delta / mean_of
            if others == "average":
                for e in experts:
                    for name, delta in e.others.items():
                        parameters[name] += e.scale * delta / mean_of
            for name, value in experts[head].heads.items():
                owner, leaf = name.rpartition(".")[::2]
                setattr(modules[owner], leaf, nn.Parameter(value.clone()))

    def _forward(self, name: str):
        def forward(x: Tensor) -> Tensor:
            forced = None if self._forced is None else self._forced[name]
            y, self.decisions[name] = self.layers[name](x, forced)
            return y

        return forward

    def run(self, run, forced: Mapping[str, Tensor] | None = None) -> Tensor:
        """``run(model)`` with routing free or ``forced`` (layer path -> gates (..., E), used where positive)."""
        self.decisions, self._forced = {}, forced
        try:
            return run(self.model)
        finally:
            self._forced = None
