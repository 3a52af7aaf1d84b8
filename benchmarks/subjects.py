"""What is measured: layers and whole models with random weights, their experts, and the mixture of them.

An expert's delta is made from its singular triplets, so that its best factors of the measured rank are known without an
SVD: every neighbour gets the same numbers, and the right output is known too. The singular values decay as 1 / j up to
that rank, and some more, smaller ones are cut off.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cells import Cell

SIZE = 0.2  # Frobenius norm of a delta, as a share of the weight's
TAIL, DROP = 8, 0.3  # directions that are cut off, and their singular values as a share of the last one kept
PROMPT = 128  # tokens in the cache before the one that is decoded
MODELS = ("vit", "bert", "llama")


class Stack(nn.Module):
    """Copies of one layer; a call goes through as many of them as it has inputs, each with its own.

    A model's weights come from memory for every token that is decoded. A single layer's would come from the cache, so
    few tokens are timed over enough copies to exceed it.
    """

    def __init__(self, d_in: int, d_out: int, copies: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out) for _ in range(copies))

    def forward(self, xs: tuple[Tensor, ...]) -> Tensor:
        """The last copy's output, from one (batch, tokens, d_in) per copy."""
        for x, layer in zip(xs, self.layers, strict=False):
            y = layer(x)
        return y


@dataclass
class Factors:
    """The experts of one layer: deltas `up_i^T down_i`.

    Attributes:
        down: (E, r, d_in), orthonormal rows.
        up: (E, r, d_out), orthogonal rows in descending length.
        bias: (E, d_out), or None.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None

    def to(self, like: Tensor) -> Factors:
        """The same in another tensor's dtype."""
        return Factors(self.down.to(like), self.up.to(like), None if self.bias is None else self.bias.to(like))

    def cut(self, rank: int) -> Factors:
        """The leading directions."""
        return Factors(self.down[:, :rank].contiguous(), self.up[:, :rank].contiguous(), self.bias)


def _orthonormal(rows: int, width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rows))[0].T.contiguous()


def _factors(linear: nn.Linear, experts: int, rank: int, bias: bool) -> Factors:
    spectrum = torch.cat([1 / torch.arange(1, rank + 1), torch.full((TAIL,), DROP / rank)])
    spectrum *= SIZE * linear.weight.detach().norm() / spectrum.norm()
    down = torch.stack([_orthonormal(rank + TAIL, linear.in_features) for _ in range(experts)])
    up = torch.stack([_orthonormal(rank + TAIL, linear.out_features) * spectrum[:, None] for _ in range(experts)])
    shift = 0.02 * torch.randn(experts, linear.out_features) if bias and linear.bias is not None else None
    return Factors(down, up, shift)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    return ViTModel(config, add_pooling_layer=False)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    return BertModel(config, add_pooling_layer=False)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, num_hidden_layers=8, num_attention_heads=12, intermediate_size=2048, vocab_size=32000,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Subject:
    """Everything that the cells of one bank share.

    Attributes:
        dense: the base.
        factors: path of a linear layer -> its experts, cut to the measured rank.
        names: the experts' names.
        mixture: the coterie mixture of them.
    """

    def __init__(self, cell: Cell, copies: int):
        import coterie

        torch.manual_seed(0)
        base = {"vit": _vit, "bert": _bert, "llama": _llama}[cell.model]() if cell.model else None
        self.dense = (base or Stack(cell.d_in, cell.d_out, copies)).eval()
        linears = {path: part for path, part in self.dense.named_modules() if isinstance(part, nn.Linear)}
        self.widths = {path: (part.in_features, part.out_features) for path, part in linears.items()}
        self.names = [f"expert {i}" for i in range(cell.experts)]
        whole = {
            path: _factors(part, cell.experts, cell.rank, cell.has_bias)
            for path, part in linears.items()
            if path != "lm_head"
        }
        self.factors = {path: factors.cut(cell.rank) for path, factors in whole.items()}
        experts = {name: self._expert(i, whole) for i, name in enumerate(self.names)}
        self.mixture: Any = coterie.smile(
            self.dense, experts, rank=cell.rank, gate_rank=cell.gate_rank, top_k=cell.top_k, pool=cell.pool
        )

    @torch.no_grad()
    def _expert(self, index: int, whole: dict[str, Factors]) -> nn.Module:
        expert = copy.deepcopy(self.dense)
        for path, factors in whole.items():
            linear: Any = expert.get_submodule(path)
            linear.weight += factors.up[index].T @ factors.down[index]
            if factors.bias is not None:
                linear.bias += factors.bias[index]
        return expert

    def to(self, dtype: torch.dtype) -> None:
        self.dense.to(dtype)
        self.mixture.to(dtype)

    def linears(self, copies: int) -> list[tuple[int, int, bool]]:
        """(d_in, d_out, whether it is a mixture layer) of every linear layer that a call goes through."""
        every = [(*widths, path in self.factors) for path, widths in self.widths.items()]
        return every[:copies] if isinstance(self.dense, Stack) else every


# --- inputs, and the right output -----------------------------------------------------------------------------------


@dataclass
class Inputs:
    """What a cell computes with.

    Attributes:
        arguments: keywords of a whole model's forward; a layer's input under "x".
        gates: (batch, tokens, E), given gates (xlora), or None.
        rows: which expert each sequence goes to (mixed), or None.
    """

    arguments: dict[str, Tensor]
    gates: Tensor | None
    rows: list[int] | None


def inputs_of(cell: Cell) -> Inputs:
    noise = torch.Generator().manual_seed(1)
    dtype, each = getattr(torch, cell.dtype), cell.tokens // cell.batch
    shape = (cell.batch, each)
    if cell.model == "vit":
        arguments = {"pixel_values": torch.randn(cell.batch, 3, 224, 224, generator=noise).to(dtype)}
    elif cell.model:
        arguments = {"input_ids": torch.randint(0, 30000, shape, generator=noise)}
    else:
        arguments = {"x": torch.randn(*shape, cell.d_in, generator=noise).to(dtype)}
    gates = torch.randn(*shape, cell.experts, generator=noise).softmax(-1).to(dtype)
    rows = [i % cell.experts for i in range(cell.batch)]
    return Inputs(arguments, gates if cell.method == "xlora" else None, rows if cell.method == "mixed" else None)


@torch.no_grad()
def right_output(cell: Cell, subject: Subject, inputs: Inputs, copy: int) -> Tensor:
    """What a copy of a layer must give, in float64: `W x + b + sum_i g_i (B_i A_i x + b_i)`."""
    path = f"layers.{copy}"
    linear: Any = subject.dense.get_submodule(path)
    x = inputs.arguments["x"].double()
    factors = subject.factors[path].to(x)
    z = torch.einsum("btn,ern->bter", x, factors.down)
    if inputs.gates is not None:
        gates = inputs.gates.double()
    elif inputs.rows is not None:
        gates = nn.functional.one_hot(torch.tensor(inputs.rows), cell.experts).double()[:, None].expand(z.shape[:3])
    elif cell.method == "task":
        gates = torch.zeros(z.shape[:3], dtype=torch.float64)
        gates[..., 0] = 1
    else:
        top, index = z[..., : cell.gate_rank].norm(dim=-1).topk(min(cell.top_k, cell.experts))
        gates = torch.zeros(z.shape[:3], dtype=torch.float64).scatter(-1, index, top.softmax(-1))
    y = x @ linear.weight.double().T + linear.bias.double() + torch.einsum("bte,bter,erm->btm", gates, z, factors.up)
    return y if factors.bias is None else y + gates @ factors.bias


def share_right(found: Tensor, right: Tensor, tolerance: float) -> float:
    """The share of tokens whose output is right to `tolerance` of the largest output.

    Two experts whose scores agree to rounding may be chosen differently, hence a share.
    """
    error = (found.double() - right).abs().amax(-1) / right.abs().max()
    return float((error <= tolerance).double().mean())
