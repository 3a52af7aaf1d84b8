"""The trained methods in naive float64, from the papers, one small function each. Nothing here is the package's.

A function gets a layer, its input x (batch, tokens, width) and the facts of the call, and gives what the experts add,
(batch, tokens, d_out). `install` puts them into a copy of the dense base model, so that whole models are compared:
outputs, losses and, by autograd through these forms, gradients.

Numbers that the package draws in training are recorded (`Draws`) and used again here, in the same order.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass
class Facts:
    """What one call of the model is: the method, which tokens count, what was drawn.

    Attributes:
        parameters: the method's.
        valid, decoder_valid, prompt: (batch, tokens) bool; None where the call has none.
        tasks: (batch,) int64.
        choices: layer -> (batch,) int64, where something arbitrary (a hash) chooses.
        draws: what was drawn, in order.
        encoder: (batch, d), the masked mean of the encoder's last hidden states; the encoder's hook fills it.
        losses: name -> a term for each layer, unweighted.
    """

    parameters: dict[str, Any]
    training: bool = False
    valid: Tensor | None = None
    decoder_valid: Tensor | None = None
    prompt: Tensor | None = None
    tasks: Tensor | None = None
    choices: dict[str, Tensor] = field(default_factory=dict)
    draws: list[Tensor] = field(default_factory=list)
    encoder: Tensor | None = None
    losses: dict[str, list[Any]] = field(default_factory=dict)

    def draw(self) -> Tensor:
        return self.draws.pop(0)

    def add(self, name: str, term: Any) -> None:
        self.losses.setdefault(name, []).append(term)


@dataclass
class Expert:
    """One expert: A (r, width), a (r,) or None, B (r, d_out)."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        z = x @ self.down.T
        if self.bias is not None:
            z = z + self.bias
            z = z * z.sigmoid()  # swish
        return self.scale * z @ self.up


@dataclass
class Layer:
    """A mixture layer: its experts, its router's parameters, and where it is."""

    name: str
    experts: list[Expert]
    router: dict[str, Tensor]
    decodes: bool

    def counted(self, x: Tensor, facts: Facts) -> Tensor:
        """(batch, tokens) bool: the tokens of x that count."""
        crosses = self.name.endswith(("EncDecAttention.k", "EncDecAttention.v"))  # which read the encoder
        valid = facts.decoder_valid if self.decodes and not crosses else facts.valid
        if valid is None or valid.shape != x.shape[:2]:
            return torch.ones(x.shape[:2], dtype=torch.bool)
        return valid

    def read(self, x: Tensor, facts: Facts) -> list[Tensor]:
        """What the router reads of each example."""
        if self.decodes:
            assert facts.encoder is not None
            return list(facts.encoder)
        counted = self.counted(x, facts)
        if facts.prompt is not None and facts.prompt.shape == x.shape[:2]:
            counted = facts.prompt
        return [x[b, counted[b]].mean(0) for b in range(len(x))]


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """`(x - mean) / sqrt(variance + 1e-5) * gain + bias`."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def linear(router: dict[str, Tensor], x: Tensor) -> Tensor:
    """SMEAR's logits: `LN(x) . LN(w_i)`."""
    x = layer_norm(x, router["score.input_gain"], router["score.input_bias"])
    return torch.stack(
        [x @ layer_norm(w, router["score.weight_gain"], router["score.weight_bias"]) for w in router["score.weight"]]
    )


def softmax(scores: Tensor) -> Tensor:
    e = (scores - scores.max()).exp()
    return e / e.sum()


def average(experts: list[Expert], gates: Tensor, ups: Tensor | None = None) -> Expert:
    """One expert whose parameters are the gates' mean of all experts'."""
    ups = gates if ups is None else ups
    down = sum(g * e.down for g, e in zip(gates, experts, strict=True))
    up = sum(g * e.up for g, e in zip(ups, experts, strict=True))
    bias = None
    if experts[0].bias is not None:
        bias = sum(g * e.bias for g, e in zip(gates, experts, strict=True))
    return Expert(down, up, bias, experts[0].scale)


def dropped(gates: Tensor, rate: float, draw: Tensor) -> Tensor:
    """Expert dropout: `(p m + 1e-10) / sum(p m + 1e-10)`."""
    kept = gates * (draw >= rate) + 1e-10
    return kept / kept.sum()


def segments(counted: Tensor, length: int) -> list[int]:
    """Which segment each token of one example is in: `length` tokens that count make one."""
    found, seen = [], 0
    for counts in counted.tolist():
        seen += counts
        found.append(max(seen - 1, 0) // length)
    return found


def by_segment(layer: Layer, x: Tensor, facts: Facts) -> list[list[Tensor]]:
    """Gates of each example's tokens: a segment follows the one before, the first is level; after a prompt, its."""
    length, level = facts.parameters["segment"], torch.full((len(layer.experts),), 1 / len(layer.experts)).to(x)
    result = []
    for b in range(len(x)):
        counted = layer.counted(x, facts)[b]
        where = segments(counted, length)
        means: dict[int, Tensor] = {}
        for s in set(where):
            mine = torch.tensor([w == s and bool(c) for w, c in zip(where, counted, strict=True)])
            means[s] = x[b, mine].mean(0) if mine.any() else torch.zeros_like(x[b, 0])
        gates = [level if s == 0 else softmax(linear(layer.router, means[s - 1])) for s in where]
        if facts.prompt is not None and facts.prompt[b].any():
            after = softmax(linear(layer.router, x[b, facts.prompt[b]].mean(0)))
            gates = [after if c and not p else g for g, c, p in zip(gates, counted, facts.prompt[b], strict=True)]
        result.append(gates)
    return result


def smear(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Muqeeth et al. 2024, section 3: one merged expert for each example."""
    rate = facts.parameters["expert_dropout"]
    if facts.parameters["pool"] == "segment" and not layer.decodes:
        gates = by_segment(layer, x, facts)
        return torch.stack(
            [
                torch.stack([average(layer.experts, g)(t) for g, t in zip(gates[b], x[b], strict=True)])
                for b in range(len(x))
            ]
        )
    draw = facts.draw() if facts.training and rate else None
    rows = []
    for b, mean in enumerate(layer.read(x, facts)):
        gates = softmax(linear(layer.router, mean))
        if draw is not None:
            gates = dropped(gates, rate, draw[b])
        rows.append(average(layer.experts, gates)(x[b]))
    return torch.stack(rows)


def ensemble(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Every expert's output, averaged by the gates."""
    pool, rate = facts.parameters["pool"], facts.parameters["expert_dropout"]
    if pool == "segment" and not layer.decodes:
        gates = by_segment(layer, x, facts)
    elif pool == "token":
        gates = [[softmax(linear(layer.router, t)) for t in row] for row in x]
    else:
        draw = facts.draw() if facts.training and rate else None
        pooled = [softmax(linear(layer.router, mean)) for mean in layer.read(x, facts)]
        if draw is not None:
            pooled = [dropped(g, rate, draw[b]) for b, g in enumerate(pooled)]
        gates = [[g] * x.shape[1] for g in pooled]
    return torch.stack(
        [
            torch.stack(
                [sum(g[i] * e(t) for i, e in enumerate(layer.experts)) for g, t in zip(gates[b], x[b], strict=True)]
            )
            for b in range(len(x))
        ]
    )


def units(layer: Layer, x: Tensor, facts: Facts) -> list[list[tuple[Tensor, Tensor, bool]]]:
    """For each example, what decides: what its router reads, the tokens (t, width) that follow, whether it counts."""
    if facts.parameters["pool"] != "token":
        return [[(mean, x[b], True)] for b, mean in enumerate(layer.read(x, facts))]
    counted = layer.counted(x, facts)
    return [[(x[b, t], x[b, t, None], bool(counted[b, t])) for t in range(x.shape[1])] for b in range(len(x))]


def switch(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Fedus et al. 2022: the k likeliest experts, times their probabilities; equation 4 and the z-loss."""
    k, n = facts.parameters["top_k"], len(layer.experts)
    out, shares, means, squares = [], torch.zeros(n), [], []
    for row in units(layer, x, facts):
        parts = []
        for read, tokens, counts in row:
            scores = linear(layer.router, read)
            p = softmax(scores)
            best = p.detach().sort(descending=True).indices[:k].tolist()
            parts.append(sum(p[i] * layer.experts[i](tokens) for i in best))
            if counts:
                shares[best] += 1
                means.append(p)
                squares.append(scores.exp().sum().log() ** 2)
        out.append(torch.cat(parts))
    facts.add("balance", n * (shares.to(x) / len(means) * (sum(means) / len(means))).sum())
    facts.add("z", sum(squares) / len(squares))
    return torch.stack(out)


def st_gumbel(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """The reference's gs_st_routing: `y = softmax((s + G) / T)`, the largest answers, times `1 - p + p`."""
    drawn = iter(facts.draw()) if facts.training else None
    options, out = facts.parameters, []
    for row in units(layer, x, facts):
        parts = []
        for read, tokens, _ in row:
            scores = linear(layer.router, read)
            if drawn is None:
                parts.append(layer.experts[int(scores.argmax())](tokens))
                continue
            temperature = max(options["temperature"] * math.exp(-options["anneal"] * options["step"]), 0.5)
            y = softmax((scores - next(drawn).log()) / temperature)  # minus the log of an exponential is Gumbel
            i = int(y.argmax())
            parts.append((1 - y[i].detach() + y[i]) * layer.experts[i](tokens))
        out.append(torch.cat(parts))
    return torch.stack(out)


def reinforce(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """A sampled expert; what the policy's loss needs is kept: log probability, entropy, baseline, for each example."""
    draw = facts.draw() if facts.training else None
    rows, noted = [], []
    for b, mean in enumerate(layer.read(x, facts)):
        scores = linear(layer.router, mean)
        i = int(scores.argmax() if draw is None else draw[b, 0])
        rows.append(layer.experts[i](x[b]))
        p = softmax(scores)
        plain = layer_norm(mean.detach(), torch.tensor(1.0), torch.tensor(0.0))
        value = (plain @ layer.router["select.down"].T + layer.router["select.down_bias"]) @ layer.router["select.up"].T
        noted.append((p[i].log(), -(p * p.log()).sum(), (value + layer.router["select.up_bias"])[0]))
    facts.add("noted", noted)
    return torch.stack(rows)


def rewarded(noted: list[list[tuple[Tensor, Tensor, Tensor]]], losses: list[Tensor]) -> dict[str, Tensor]:
    """REINFORCE's three terms: policy, minus the entropy, Huber loss of the baseline; the reward is minus the loss."""
    policy, entropy, value = [], [], []
    for layer in noted:
        for (log_p, h, v), loss in zip(layer, losses, strict=True):
            reward = -loss.detach()
            policy.append(-log_p * (reward - v.detach()))
            entropy.append(-h)
            apart = (reward - v).abs()
            value.append(0.5 * apart**2 if apart < 1 else apart - 0.5)
    return {
        name: sum(each) / len(each)
        for name, each in (("policy", policy), ("policy_entropy", entropy), ("value", value))
    }


def selectors(layer: Layer, mean: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """DSelect-k: each selector's outputs (k, E) and the selectors' weights (k,)."""
    n = len(layer.experts)
    x = layer_norm(mean, layer.router["score.input_gain"], layer.router["score.input_bias"])
    out = []
    for rows in layer.router["score.bits"]:
        steps = []
        for row in rows:
            t = x @ row
            if t <= -gamma / 2:
                steps.append(0 * t)
            elif t >= gamma / 2:
                steps.append(0 * t + 1)
            else:
                steps.append(-2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5)
        each = []
        for i in range(n):
            code = format(i, f"0{len(steps)}b") if steps else ""
            bits = [s if bit == "1" else 1 - s for s, bit in zip(steps, code, strict=True)]
            each.append(torch.stack(bits).prod() if bits else torch.ones(()).to(x))
        out.append(torch.stack(each))
    return torch.stack(out), softmax(layer.router["score.mix"] @ x)


def dselect_k(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Hazimeh et al. 2021, section 3; the reference's entropy, and what keeps off codes without an expert."""
    n, rows, entropies = len(layer.experts), [], []
    for b, mean in enumerate(layer.read(x, facts)):
        out, mix = selectors(layer, mean, facts.parameters["gamma"])
        gates = mix @ out
        rows.append(sum(gates[i] * e(x[b]) for i, e in enumerate(layer.experts)))
        for selected in out:
            entropy = -(selected * (selected + 1e-6).log()).sum()
            entropies.append(entropy + (1 / (selected + 1e-6).sum() if math.log2(n) % 1 else 0))
    facts.add("entropy", sum(entropies) / len(entropies))
    return torch.stack(rows)


def soft_moe(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Puigcerver et al. 2024, equations 1 to 3, logits normalised as in section 2.3."""
    slots = facts.parameters["slots"]
    phi = torch.stack([w / w.norm() for w in layer.router["score.weight"]]) * layer.router["score.scale"]
    rows = []
    for b, counted in enumerate(layer.counted(x, facts)):
        logits = torch.stack([t / t.norm() for t in x[b]]) @ phi.T  # (tokens, slots)
        reads = [softmax(logits[counted, s]) @ x[b, counted] for s in range(len(phi))]
        gives = torch.stack([layer.experts[s // slots](read) for s, read in enumerate(reads)])
        rows.append(torch.stack([softmax(row) @ gives for row in logits]))
    return torch.stack(rows)


def adamix(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Wang et al. 2022: training pairs a random down- with a random up-projection, use averages all."""
    n = len(layer.experts)
    if not facts.training:
        merged = average(layer.experts, torch.full((n,), 1 / n).to(x))
        return torch.stack([merged(row) for row in x])
    draw = facts.draw()  # (2, batch)
    rows = []
    for b in range(len(x)):
        down, up = layer.experts[int(draw[0, b])], layer.experts[int(draw[1, b])]
        rows.append(Expert(down.down, up.up, down.bias, down.scale)(x[b]))
    return torch.stack(rows)


def poly(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Ponti et al. 2023: `sigmoid(Z_t)`, relaxed in training, normalised over skills; parameters are averaged."""
    draw = facts.draw() if facts.training and facts.parameters["relaxed"] else None
    rows = []
    for b, task in enumerate(facts.tasks):
        logits = layer.router["score.table"][task][:, 0]
        if draw is not None:
            u = draw[b, :, 0].clamp(1e-6, 1 - 1e-6)
            logits = logits + (u / (1 - u)).log()
        shares = 1 / (1 + (-logits).exp())
        rows.append(average(layer.experts, shares / (shares.sum() + 1e-12))(x[b]))
    return torch.stack(rows)


def mhr(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """Caccia et al. 2023: as poly, block by block of the input's and the output's dimensions."""
    splits = facts.parameters["splits"]
    rows = []
    for b, task in enumerate(facts.tasks):
        shares = 1 / (1 + (-layer.router["score.table"][task]).exp())  # (skills, splits)
        shares = shares / shares.sum(0)
        parts = []
        for kind in ("down", "up"):
            blocks = [getattr(e, kind).chunk(splits, dim=-1) for e in layer.experts]
            parts.append(
                torch.cat(
                    [sum(shares[i, s] * blocks[i][s] for i in range(len(layer.experts))) for s in range(splits)], dim=-1
                )
            )
        rows.append(Expert(parts[0], parts[1], None, layer.experts[0].scale)(x[b]))
    return torch.stack(rows)


def tag(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """The expert of the example's task."""
    share = facts.parameters["share"]
    return torch.stack([layer.experts[int(t) if share is None else share[t]](x[b]) for b, t in enumerate(facts.tasks)])


def chosen(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """The hash baseline: an expert that the content of an example chooses."""
    return torch.stack([layer.experts[int(i)](x[b]) for b, i in enumerate(facts.choices[layer.name])])


def single(layer: Layer, x: Tensor, facts: Facts) -> Tensor:
    """One expert."""
    return layer.experts[0](x)


METHODS = {
    "smear": smear,
    "ensemble": ensemble,
    "switch": switch,
    "st_gumbel": st_gumbel,
    "reinforce": reinforce,
    "dselect_k": dselect_k,
    "soft_moe": soft_moe,
    "adamix": adamix,
    "poly": poly,
    "mhr": mhr,
    "tag": tag,
    "hash": chosen,
    "single": single,
}


def install(
    base: nn.Module,
    method: str,
    parameters: dict[str, Tensor],
    layers: list[str],
    facts: Facts,
    experts: int,
    **kind: Any,
) -> nn.Module:
    """A copy of the dense base whose named layers are mixture layers in the naive form.

    Args:
        base: float64.
        parameters: name -> value of the experts and routers, as the mixture names them.
        layers: module paths.
        facts: of the calls to come.
        experts: how many.
        kind: `after`: whether experts read what the layer gives; `scale`: LoRA's.
    """
    model = copy.deepcopy(base)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else None
    for name in layers:
        module = model.get_submodule(name)
        own = {n[len(name) + 1 :]: p for n, p in parameters.items() if n.startswith(f"{name}.")}
        downs, ups = own["bank.down"].chunk(experts), own["bank.up"].chunk(experts)
        biases = own["bank.down_bias"].chunk(experts) if "bank.down_bias" in own else [None] * experts
        layer = Layer(
            name,
            [Expert(*each, kind.get("scale", 1.0)) for each in zip(downs, ups, biases, strict=True)],
            {n[len("router.") :]: p for n, p in own.items() if n.startswith("router.")},
            encoder is not None and name.startswith("decoder."),
        )
        module.forward = functools.partial(_forward, module, layer, METHODS[method], facts, kind.get("after", False))
    if encoder is not None:

        def keep(_module: Any, _args: Any, output: Any) -> None:
            states = output[0]
            counted = torch.ones(states.shape[:2], dtype=torch.bool) if facts.valid is None else facts.valid
            facts.encoder = torch.stack([s[c].mean(0) for s, c in zip(states, counted, strict=True)])

        encoder.register_forward_hook(keep)
    return model


def _forward(module: Any, layer: Layer, function: Any, facts: Facts, after: bool, x: Tensor) -> Tensor:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    y = x @ weight.T
    if module.bias is not None:
        y = y + module.bias
    read = y if after else x
    rows = read[:, None] if read.ndim == 2 else read  # one vector an example
    return y + function(layer, rows, facts).reshape(y.shape)


def example_losses(logits: Tensor, labels: Tensor, shifts: bool) -> list[Tensor]:
    """Each example's own mean cross-entropy."""
    if labels.ndim == 1:
        return [-row.log_softmax(-1)[y] for row, y in zip(logits, labels, strict=True)]
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return [
        torch.stack([-t.log_softmax(-1)[y] for t, y in zip(row, ys, strict=True) if y != -100]).mean()
        for row, ys in zip(logits, labels, strict=True)
    ]


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """AdaMix, equation 5: `(KL(p || q) + KL(q || p)) / 2` of rows (n, classes), averaged."""
    p, q = first.softmax(-1), second.softmax(-1)
    return ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2


class Draws:
    """Within the block, everything that is drawn at random is written down."""

    def __init__(self) -> None:
        self.log: list[Tensor] = []

    def __enter__(self) -> Draws:
        def noting(function: Any) -> Any:
            def drawn(*args: Any, **kwargs: Any) -> Tensor:
                result = function(*args, **kwargs)
                self.log.append(result.detach().clone())
                return result

            return drawn

        self._patches = [
            mock.patch.object(torch, "rand_like", noting(torch.rand_like)),
            mock.patch.object(torch, "randint", noting(torch.randint)),
            mock.patch.object(torch.Tensor, "exponential_", noting(torch.Tensor.exponential_)),
            mock.patch.object(torch.Tensor, "multinomial", noting(torch.Tensor.multinomial)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()
