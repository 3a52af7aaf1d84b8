"""Layers whose router decides once for many tokens, or that merge or mix before they apply their experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CoterieError
from ..experts.bank import Bank
from ..experts.derived import flows
from ..routing.call import Call, repeated
from ..routing.decision import Decision
from ..routing.pooling import masked_mean, segment_means, segments_of
from ..routing.precise import precise
from .paths import grouped, stacked


def add_pooled(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """What the experts add to y (..., d_out), the base layer's output, where routers decide per example.

    Args:
        layer: a mixture layer.
        x: what its experts read, (batch, ..., width) or (batch * tokens, width).
    """
    call = layer.context.call
    if call is None:
        raise CoterieError(
            "a part of a mixture was called, and its routers must know the whole call (its attention mask, its prompt)",
            "forward",
            "call the whole model; a mixture of this part alone is built or wrapped as such",
        )
    rows, bank = rows_of(x, call), layer.bank
    # Where nothing follows on the mixed output, it is summed onto the base's in the last product.
    onto = bank.linear and not bank.shape.norm
    into = y.view(*rows.shape[:2], -1) if onto else y.new_zeros(*rows.shape[:2], y.shape[-1])
    gates = _add(layer, rows, into, call)
    if layer.context.recorders:
        layer._record(gates.flatten(0, -2), gates.shape[:-1])
    return y if onto else y + bank.after_mixing(into).view(y.shape)


def _add(layer: Any, rows: Tensor, into: Tensor, call: Call) -> Tensor:
    """Add the experts' mixed output to `into` (batch, tokens, d_out), in place; the gates (batch, tokens or 1, E)."""
    routing, router, bank = layer.routing, layer.router, layer.bank
    decided = layer.context.weights is not None or layer.context.gates is not None
    if routing.combine == "slots" and not decided:
        return _slots(layer, rows, into, call)
    if call.gates is not None and router.score.reads == "call":
        gates = _of_tokens(router.score(call, layer.index), rows, call.valid)
        gates = gates if router.candidates is None else gates[..., router.candidates]
        _mix(bank, rows, gates, into)
        return gates
    if routing.pool == "token" and not decided:
        decision = _read(layer, rows.flatten(0, 1), _counted(layer, rows, call), call)
        gates = decision.gates().view(*rows.shape[:2], -1)
        _token_factors(bank, rows, gates, into)
        return gates
    if routing.pool == "segment" and not (layer.decodes or decided or call.continues):
        return _segments(layer, rows, into, call)
    decision = _decision(layer, rows, call)
    if routing.combine == "factors":
        kept = call.kept if call.continues else None
        factors(bank, rows, decision, into, None if kept is None else kept.setdefault(("merged", layer.index), []))
    else:
        _apply(bank, rows, decision, into)
    return _gates(decision)[:, None]


def merged_layer(layer: Any, x: Tensor, call: Call | None) -> tuple[Tensor, Tensor | None] | None:
    """The layer's weight (d_out, d_in) and bias, with what a call's only example gets added to them.

    What a prompt decided is kept beside its KV cache for the steps that go on from it: a second copy of the weights, at
    dense speed. Else a call merges anew.

    Args:
        layer: a mixture layer.
        x: its input.
        call: the call.

    Returns:
        None where the call has several decisions or wants gradients, or experts are no deltas of the weight.
    """
    bank, routing = layer.bank, layer.routing
    if flows(layer) or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if call is None or call.batch != 1 or routing.combine == "slots":
        return None
    if call.gates is not None and layer.router.score.reads == "call":
        return None
    if not bank.linear or bank.shape.norm or (layer.training and bank.shape.dropout):
        return None
    if routing.pool == "token" or (routing.pool == "segment" and not (layer.decodes or call.continues)):
        return None
    named = layer.context.weights is not None or layer.context.gates is not None
    name, kept = ("dense", layer.index), {} if call.kept is None or named else call.kept
    known = kept.get(name) if call.continues else None
    if known is None or layer.context.recorders:
        rows = rows_of(x.to(bank.dtype), call)
        decision = _decision(layer, rows, call)
        if layer.context.recorders:
            layer._record(_gates(decision), torch.Size((1, 1)))
    if known is None:
        if routing.combine == "factors":
            down, up, *biases = _merge(bank, decision, torch.promote_types(rows.dtype, torch.float32))
            delta, added = bank.shape.scale * up[0].T @ down[0], biases[0][0] if biases else None
        else:
            delta, added = bank.delta(_gates(decision)[0].tolist())
        kept[name] = known = layer.onto_base(delta, added)
    dense: tuple[Tensor, Tensor | None] = known
    return dense


def _apply(bank: Bank, x: Tensor, decision: Decision, into: Tensor) -> None:
    """Outputs mixed under a decision for each row of x (batch, tokens, width)."""
    flat, y, spread = x.flatten(0, 1), into.flatten(0, 1), decision.spread(x.shape[1])
    if spread.index is None or torch.compiler.is_compiling() or x.device.type != "cpu":
        stacked(bank, flat, bank.project(flat), spread, y)
    else:
        grouped(bank, flat, spread, y)


def _mix(bank: Bank, x: Tensor, gates: Tensor, into: Tensor) -> None:
    """Outputs mixed by gates (batch, tokens, E)."""
    flat, y = x.flatten(0, 1), into.flatten(0, 1)
    stacked(bank, flat, bank.project(flat), Decision(bank.experts, None, gates.flatten(0, 1)), y)


def _of_tokens(gates: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
    """Gates (batch, tokens, E) for a layer's rows: those that see one vector an example take the mean."""
    if gates.shape[1] == rows.shape[1]:
        return gates
    counted = valid if valid is not None and valid.shape == gates.shape[:2] else None
    return masked_mean(gates, counted)[:, None].expand(-1, rows.shape[1], -1)


@precise
def signals(bank: Bank, x: Tensor, kind: str, weights: Sequence[float]) -> Tensor:
    """How much each expert says of x: the norm of its output `o = B A x`, or the inverse entropy of softmax(o).

    arXiv:2511.07129, section 3.

    Args:
        bank: low-rank experts, of one layer.
        x: (n, width).
        kind: norm or entropy.
        weights: of every expert of the mixture, the factor that is in its B; a signal is without.

    Returns:
        (n, experts of the mixture), float32 at least; 0 where an expert has nothing in this layer.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    found = x.new_zeros(len(x), len(weights), dtype=dtype)
    for at, expert in enumerate(bank.shape.experts):
        if not weights[expert]:
            continue
        out = (bank.project(x.to(bank.dtype), at).to(dtype) @ bank.up[bank.rows(at)].to(dtype)) / weights[expert]
        if kind == "norm":
            found[:, expert] = out.norm(dim=-1)
        else:
            logs = out.log_softmax(-1)
            found[:, expert] = 1 / (1e-6 - (logs.exp() * logs).sum(-1))
    return found


def factors(bank: Bank, x: Tensor, decision: Decision, into: Tensor, merged: list[Tensor] | None = None) -> None:
    """One expert for each row, its parameters the gates' mean of all experts' (arXiv:2306.03745, section 3.1).

    Args:
        bank: experts of equal ranks.
        x: (batch, tokens, width).
        decision: gates (batch, E), or (batch, E, splits), of blocks of the dimensions.
        into: (batch, tokens, d_out), is added to, in place.
        merged: holds these experts, or is filled with them: for decisions that outlive the call.
    """
    parts = merged or _merge(bank, decision, x.dtype)
    if merged is not None and not merged:
        merged += parts
    down, up, *biases = parts
    z = torch.bmm(bank.dropped(x), down.transpose(1, 2))
    if bank.shape.activation is not None:
        z = bank._phi(z + biases.pop(0)[:, None])
    if bank.shape.scale != 1:
        z = z * bank.shape.scale
    into.baddbmm_(z.to(into.dtype), up.to(into.dtype))
    if biases:
        into.add_(biases[0][:, None])


def _merge(bank: Bank, decision: Decision, dtype: torch.dtype) -> list[Tensor]:
    """Each row's expert: down (batch, rank, width), up (batch, rank, d_out), and its biases, of down and of up."""
    gates = decision.gates() if decision.index is not None else decision.weight
    assert gates is not None
    gates = gates.to(dtype)
    ups = gates if decision.up is None else decision.up.to(dtype)
    parts = [_merged(bank.down, gates, bank.experts), _merged(bank.up, ups, bank.experts)]
    if bank.shape.activation is not None:
        first = gates if gates.ndim == 2 else gates.mean(-1)
        parts.append(first @ bank.down_bias.view(bank.experts, -1).to(dtype))
    if bank.shape.bias:
        parts.append((ups if ups.ndim == 2 else ups.mean(-1)) @ bank.bias.to(dtype))
    return parts


def _token_factors(bank: Bank, x: Tensor, gates: Tensor, into: Tensor) -> None:
    """Factors mixed for each token: `(sum_i g_i B_i) (sum_j g_j A_j) x`, and no token's own matrices.

    Args:
        bank: low-rank experts of equal ranks.
        x: (batch, tokens, width).
        gates: (batch, tokens, E).
        into: (batch, tokens, d_out), is added to, in place.
    """
    gates = gates.to(x.dtype)
    z = bank.project(x).unflatten(-1, (bank.experts, -1))
    mixed = torch.einsum("bte,bter->btr", gates, z)
    spread = (gates[..., None] * mixed[:, :, None]).flatten(-2)
    into.flatten(0, 1).addmm_(spread.flatten(0, 1).to(into.dtype), bank.up.to(into.dtype))
    if bank.shape.bias:
        into.add_(gates @ bank.bias.to(x.dtype))


def _merged(stack: Tensor, gates: Tensor, experts: int) -> Tensor:
    """(batch, rank, d): `sum_i g_i` of the experts' blocks of a stack (R, d)."""
    rank, width = len(stack) // experts, stack.shape[-1]
    if gates.ndim == 2:
        return (gates @ stack.view(experts, -1).to(gates.dtype)).view(-1, rank, width)
    splits = gates.shape[-1]
    blocks = stack.view(experts, rank, splits, width // splits).to(gates.dtype)
    return torch.einsum("bes,ersw->brsw", gates, blocks).reshape(-1, rank, width)


def rows_of(x: Tensor, call: Call) -> Tensor:
    """x as (batch, tokens, width): layers may see tokens flat, on a grid, or one vector an example."""
    if x.shape[0] == call.batch:
        return x.reshape(call.batch, -1, x.shape[-1])
    if x.ndim == 2 and len(x) % call.batch == 0:
        return x.view(call.batch, -1, x.shape[-1])
    raise CoterieError(
        f"a layer's input has {x.shape[0]} rows, and the call has {call.batch} examples",
        "forward",
        "leave layers out that do not see whole examples (windows, packed sequences), by an exclude glob",
    )


def _valid(layer: Any, rows: Tensor, call: Call) -> Tensor | None:
    """(batch, tokens) bool, the tokens of these rows that count."""
    valid = call.decoder_valid if layer.decodes else call.valid
    return valid if valid is not None and valid.shape == rows.shape[:2] else None


def _decision(layer: Any, rows: Tensor, call: Call) -> Decision:
    """One decision for each example."""
    context, candidates, router = layer.context, layer.bank.shape.experts, layer.router
    if context.weights is not None:
        weights = torch.tensor([[context.weights[i] for i in candidates]], device=rows.device)
        return Decision(len(candidates), None, weights.expand(call.batch, -1))
    if context.gates is not None:
        if context.gates.shape[:2] != (call.batch, 1):
            rows, decisions = context.gates.shape[:2]
            raise CoterieError(
                f"a decision is taken for each of {call.batch} rows, and {decisions} for each of {rows} were given",
                "model.coterie.route or retrieve",
                f"give as many texts as rows, or gates of shape ({call.batch}, 1, experts)",
            )
        gates = context.gates[:, 0, list(candidates)].to(rows.device)
        if router.routing.combine == "factors" or context.active >= len(candidates):
            return Decision(len(candidates), None, gates)
        return Decision(len(candidates), *gates.topk(context.active)[::-1])
    if router.score.reads == "call":
        return router.decide(None, None, call, layer.index)
    if call.gates is not None:  # the layers' votes
        gates = call.gates[:, 0, 0, list(candidates)].to(rows.device)
        if router.routing.combine == "factors":
            return Decision(len(candidates), None, gates)
        return Decision(len(candidates), *gates.topk(min(router.routing.k, len(candidates)))[::-1])
    if layer.decodes:
        return router.decide(call.encoder, None, call, layer.index)
    if call.continues:
        assert call.kept is not None
        return Decision(len(candidates), None, repeated(call.kept[layer.index], call.batch))
    prompt = _prompt(rows, call)
    pooled = masked_mean(rows, _valid(layer, rows, call) if prompt is None else prompt)
    decision = _read(layer, pooled, None, call)
    if call.kept is not None:
        call.kept[layer.index] = _gates(decision).detach()
    return decision


def vote(layer: Any, x: Tensor, call: Call) -> Tensor:
    """(batch, candidates) float32: 1 for the expert whose scores are largest in the mean of an example's tokens."""
    rows = rows_of(x.to(layer.bank.dtype), call)
    scores = layer.router.score(_projected(layer, rows.flatten(0, 1))).view(*rows.shape[:2], -1)
    prompt = _prompt(rows, call)
    mean = masked_mean(scores, _valid(layer, rows, call) if prompt is None else prompt)
    return F.one_hot(mean.argmax(-1), mean.shape[-1]).float()


def _read(layer: Any, x: Tensor, valid: Tensor | None, call: Call | None) -> Decision:
    """The router's decision for rows x (n, width); `valid` (n,), the rows that count in losses."""
    decision: Decision = layer.router.decide(_projected(layer, x), valid, call, layer.index)
    return decision


def _projected(layer: Any, x: Tensor) -> Tensor:
    """What the router's score reads of rows x (n, width): these, or the bank's projections (n, E, g)."""
    if layer.router.score.reads != "rows":
        return x
    return F.linear(x, layer.bank.score_rows().to(x.dtype)).unflatten(-1, (layer.bank.experts, -1))


def _counted(layer: Any, rows: Tensor, call: Call) -> Tensor | None:
    valid = _valid(layer, rows, call)
    return None if valid is None else valid.flatten()


def _prompt(rows: Tensor, call: Call) -> Tensor | None:
    return call.prompt if call.prompt is not None and call.prompt.shape == rows.shape[:2] else None


def _gates(decision: Decision) -> Tensor:
    """(n, E), also where blocks have gates of their own: their mean."""
    if decision.index is None and decision.weight is not None and decision.weight.ndim == 3:
        return decision.weight.mean(-1)
    return decision.gates()


def _segments(layer: Any, rows: Tensor, into: Tensor, call: Call) -> Tensor:
    """Each segment under the decision that the one before it makes; the first is level, what follows the prompt its.

    Level, since a decision that reads its own segment, as Lory's first does, looks ahead (arXiv:2405.03133, section 3).
    """
    bank, routing = layer.bank, layer.routing
    length = routing.segment
    batch, tokens, width = rows.shape
    valid = _valid(layer, rows, call)
    valid = torch.ones(batch, tokens, dtype=torch.bool, device=rows.device) if valid is None else valid
    count = -(-tokens // length)
    belongs = segments_of(valid, length)
    read = segment_means(rows, valid, belongs, count)
    used = (belongs[:, :, None] == torch.arange(count, device=rows.device)).logical_and(valid[..., None]).any(1)
    decided = _read(layer, read.flatten(0, 1), used.flatten(), call)
    own = _gates(decided).view(batch, count, -1)
    level = torch.full_like(own[:, :1], 1 / bank.experts)
    gates = torch.cat([level, own[:, :-1]], dim=1)  # of segments
    prompt = _prompt(rows, call)
    if prompt is not None:
        after = _read(layer, masked_mean(rows, prompt), None, None)
        if call.kept is not None:
            call.kept[layer.index] = _gates(after).detach()
        gates = torch.cat([gates, _gates(after)[:, None]], dim=1)  # one more segment: what follows the prompt
        has = prompt.any(1, keepdim=True)
        belongs = torch.where(valid & ~prompt & has, torch.full_like(belongs, count), belongs)
    per_token = gates.gather(1, belongs[..., None].expand(-1, -1, gates.shape[-1]))
    if routing.combine == "outputs":
        _mix(bank, rows, per_token, into)
        return per_token
    # Each segment as a row of its own: tokens go to (segment, place in it) and back.
    segments = gates.shape[1]
    place = (belongs[:, :, None] == torch.arange(segments, device=rows.device)).cumsum(1)
    place = place.gather(2, belongs[..., None])[..., 0] - 1
    at = (torch.arange(batch, device=rows.device)[:, None] * segments + belongs) * tokens + place
    laid = rows.new_zeros(batch * segments * tokens, width).index_copy(0, at.flatten(), rows.flatten(0, 1))
    decision = Decision(bank.experts, None, gates.flatten(0, 1))
    out = into.new_zeros(batch * segments, tokens, into.shape[-1])
    factors(bank, laid.view(batch * segments, tokens, width), decision, out)
    into.add_(out.flatten(0, 1).index_select(0, at.flatten()).view(into.shape))
    return per_token


def _slots(layer: Any, rows: Tensor, into: Tensor, call: Call) -> Tensor:
    """Soft MoE: each expert reads its slots, mixtures of the example's tokens (arXiv:2308.00951, section 2.1)."""
    bank, router = layer.bank, layer.router
    valid = _valid(layer, rows, call)
    scores = router.score(rows)
    dispatch, combine = scores, scores
    if valid is not None:
        dispatch = scores.masked_fill(~valid[..., None], torch.finfo(scores.dtype).min)
    dispatch, combine = dispatch.softmax(1), combine.softmax(-1)
    slots = torch.einsum("bts,btd->bsd", dispatch.to(rows.dtype), rows)
    each = slots.shape[1] // bank.experts
    outputs = []
    for expert in range(bank.experts):
        mine = slots[:, expert * each : (expert + 1) * each]
        out = bank.project(mine, expert) @ bank.up[bank.rows(expert)].to(rows.dtype)
        outputs.append(out + bank.bias[expert].to(out) if bank.shape.bias else out)
    into.baddbmm_(combine.to(into.dtype), torch.cat(outputs, dim=1).to(into.dtype))
    return combine.unflatten(-1, (bank.experts, each)).sum(-1)
