"""Small drawers of adapters, and what a mixture of them must give: naive, in float64, straight from the papers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from routed import data, encoder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import coterie
from zoo import ARCHS, base_model, make_adapter, save

Factors = tuple[Tensor, Tensor]  # A (r, in), and B (out, r) times the adapter's scale
# Weights of a layer's experts, (batch, tokens or 1, n), from what the router reads (batch, tokens or 1, in).
Gate = Callable[[Tensor, list[Factors]], Tensor]

TARGETS = {
    "bert": (("query", "value"), ("query", "output.dense"), ("value", "query")),
    "llama": (("q_proj", "v_proj"), ("q_proj", "down_proj"), ("v_proj", "q_proj")),
    "gpt2": (("c_attn", "c_fc"), ("c_attn",), ("c_fc", "c_attn")),
    "t5": (("q", "v", "wo"), ("q", "wi_0"), ("v", "q")),
}
RANKS = (4, 6, 2)
EXAMPLES = (  # texts of the adapters' tasks
    ["the first words", "some more of them"],
    ["whatever else", "there is to say", "and so on"],
    ["a third thing"],
)


def drawer(root: Path, arch: str, targets: Sequence[Sequence[str]] | None = None) -> dict[str, Any]:
    """A base and three adapters of unequal ranks and targets: a recipe without its method."""
    base = save(base_model(arch), root / "base")
    for i, (own, rank) in enumerate(zip(targets or TARGETS[arch], RANKS, strict=True)):
        make_adapter(base, root / f"adapter {i}", i, rank, own, arch=arch, scale=2.0)
    return {"base": str(base), "experts": {f"e/{i}. é": str(root / f"adapter {i}") for i in range(len(RANKS))}}


def library(root: Path, recipe: dict[str, Any], arch: str) -> dict[str, Any]:
    """The same recipe, its experts from a library that keeps all that routers may ask for; gates are random."""
    kept, generator = coterie.library.create(root / "library", recipe["base"]), torch.Generator().manual_seed(3)
    experts = {}
    for i, (name, source) in enumerate(recipe["experts"].items()):
        expert = kept.add(f"e{i}", source, examples=EXAMPLES[i])
        vectors = {path: torch.randn(layer.shape[1], generator=generator) for path, layer in expert.layers.items()}
        kept.put(f"e{i}", "gate", vectors)
        kept.average_activation(f"e{i}", base_model(arch), data(arch))
        experts[name] = f"{kept.path}#e{i}"
    for kind in ("task", "examples"):
        kept.embed(encoder, kind)
    return {**recipe, "experts": experts}


def with_spectrum(base: Path, out: Path, seed: int, values: Tensor, arch: str = "bert") -> Path:
    """An adapter whose deltas have these singular values, and random directions."""
    make_adapter(base, out, seed, len(values), arch=arch, lora_alpha=len(values))
    tensors, generator = load_file(out / "adapter_model.safetensors"), torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = (
            torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64))[0]
            for size in (tensors[name].shape[1], tensors[other].shape[0])
        )
        mix = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
        tensors[name] = (mix @ (values.double().sqrt()[:, None] * a.T)).float().contiguous()
        tensors[other] = (b * values.double().sqrt() @ mix.T).float().contiguous()
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out


def factors(adapter: Path) -> dict[str, Factors]:
    """Module -> A and scaled B of an adapter, from its two files."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            tensors[name].double(),
            scale * tensors[name.replace("lora_A", "lora_B")].double(),
        )
        for name in tensors
        if "lora_A" in name
    }


def softmax_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Softmax over the k largest, the rest zero."""
    gates = torch.zeros_like(scores)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:-1])).view(-1, scores.ndim - 1).tolist():
        row = scores[tuple(at)]
        best = sorted(range(len(row)), key=lambda i: -row[i].item())[:k]
        weights = [(row[i] / temperature).exp() for i in best]
        for i, weight in zip(best, weights, strict=True):
            gates[(*at, i)] = weight / sum(weights)
    return gates


def arrow(k: int, temperature: float = 1.0) -> Gate:
    """Ostapenko et al. 2024, section 4: `|x . v_i|`, v_i the top right singular vector of the delta."""

    def gate(x: Tensor, experts: list[Factors]) -> Tensor:
        tops = [torch.linalg.svd(b @ a)[2][0] for a, b in experts]
        return softmax_top_k(torch.stack([(x @ v).abs() for v in tops], -1), k, temperature)

    return gate


def smile(k: int, gate_rank: int) -> Gate:
    """Tang et al. 2024: the norm of x on the delta's leading right singular vectors."""

    def gate(x: Tensor, experts: list[Factors]) -> Tensor:
        leading = [torch.linalg.svd(b @ a)[2][:gate_rank] for a, b in experts]
        return softmax_top_k(torch.stack([(x @ v.T).norm(dim=-1) for v in leading], -1), k, 1.0)

    return gate


def spectr(k: int, temperature: float = 1.0) -> Gate:
    """Fleshman & Van Durme 2025: `|delta_i x|`."""

    def gate(x: Tensor, experts: list[Factors]) -> Tensor:
        return softmax_top_k(torch.stack([(x @ (b @ a).T).norm(dim=-1) for a, b in experts], -1), k, temperature)

    return gate


def outputs(x: Tensor, experts: list[Factors], gates: Tensor) -> Tensor:
    """`sum_i g_i B_i A_i x`."""
    return sum(gates[..., i, None] * (x @ (b @ a).T) for i, (a, b) in enumerate(experts))


def averaged_factors(x: Tensor, experts: list[Factors], gates: Tensor) -> Tensor:
    """`(sum_i g_i B_i) (sum_i g_i A_i) x`; a smaller rank is filled up with zeros."""
    most = max(len(a) for a, _ in experts)
    down = torch.stack([torch.cat([a, a.new_zeros(most - len(a), a.shape[1])]) for a, _ in experts])
    up = torch.stack([torch.cat([b, b.new_zeros(len(b), most - b.shape[1])], dim=1) for _, b in experts])
    gates = gates.expand(*x.shape[:2], -1)
    rows = []
    for token, weights in zip(x.flatten(0, 1), gates.flatten(0, 1), strict=True):
        a = sum(w * each for w, each in zip(weights, down, strict=True))
        b = sum(w * each for w, each in zip(weights, up, strict=True))
        rows.append(b @ (a @ token))
    return torch.stack(rows).view(*x.shape[:2], -1)


def mixture_of(
    arch: str,
    recipe: dict[str, Any],
    gate: Gate | None,
    mix: Callable[[Tensor, list[Factors], Tensor], Tensor] = outputs,
    *,
    read: Tensor | None = None,
    weights: Tensor | Callable[[str, list[int]], Tensor] | None = None,
) -> nn.Module:
    """The dense base in float64, each adapted linear followed by its experts.

    Args:
        gate: of a layer's experts; None where `weights` says.
        read: (batch, tokens) bool: the router reads the mean of these tokens; None: it reads each token.
        weights: (batch, experts of all), instead of a gate; or a layer's path and experts to theirs, (n,) or
            (batch, tokens, n).
    """
    model = copy.deepcopy(base_model(arch)).double()
    found: dict[str, list[tuple[int, Factors]]] = {}
    for i, source in enumerate(recipe["experts"].values()):
        for path, pair in factors(Path(source)).items():
            found.setdefault(path, []).append((i, pair))

    def follow(path: str) -> Callable[..., Tensor]:
        who, experts = [i for i, _ in found[path]], [pair for _, pair in found[path]]

        def hook(_module: nn.Module, args: Any, y: Tensor) -> Tensor:
            x = args[0]
            if callable(weights):
                gates = weights(path, who)
            elif weights is not None:
                gates = weights.double()[:, None, who]
            elif read is None:
                gates = gate(x, experts)
            else:
                means = torch.stack([row[counted].mean(0) for row, counted in zip(x, read, strict=True)])
                gates = gate(means[:, None], experts)
            return y + mix(x, experts, gates)

        return hook

    for path in found:
        model.get_submodule(path).register_forward_hook(follow(path))
    return model


def batch(arch: str, padded: bool = True) -> dict[str, Tensor]:
    """Three examples; of text, with padding on the right."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 100, (3, 8), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row, length in enumerate((8, 5, 3)):
            mask[row, length:], ids[row, length:] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    if ARCHS[arch].kind == "seq2seq":
        given["decoder_input_ids"] = torch.randint(3, 100, (3, 5), generator=generator)
    return given


def apart(arch: str, got: nn.Module, want: nn.Module, given: dict[str, Tensor], **more: Any) -> float:
    """The largest relative difference between the answers of two models, where they count."""
    with torch.no_grad():
        a, b = got(**given, **more).logits, want(**given).logits
    counted = given["attention_mask"].bool() if ARCHS[arch].kind == "causal" else slice(None)
    return float((a - b)[counted].abs().max() / b[counted].abs().max())
