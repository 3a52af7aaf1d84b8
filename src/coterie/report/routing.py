"""What a mixture's routers do on data: who answers, how surely, whether rightly, and whether layers agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..errors import CoterieError
from ..evaluation.reader import as_prompts, told
from ..mixture.trace import routing_trace

# An expert is dead below this share of its fair share 1/E of the gates, and dominant above this multiple of it (or,
# where there are too few experts for that, above `MOST`).
DEAD, DOMINANT, MOST = 0.1, 3.0, 0.9

# Groups are compared one by one up to this many experts; beyond, they grow greedily.
EXHAUSTIVE = 14

Batch = Mapping[str, Any]


@dataclass
class Example:
    """One text, token by token.

    Attributes:
        ids: (T,) token ids.
        gates: (L, T, E) gates; NaN in layers that do not see these tokens.
    """

    ids: list[int]
    gates: Tensor


@dataclass
class TaskRouting:
    """What the routers did with one task's inputs; L layers, E experts.

    Attributes:
        task: its name.
        expert: the expert that was made for it, if that is known.
        rows, tokens: inputs, and tokens of the layer that saw the most.
        share: (L, E) mean gates; NaN in layers that were not called.
        hits: (L,) share of tokens whose largest gate is at `expert`; NaN where that is unknown, or not one of several
            candidates.
        margin: (L,) mean margin of the router; NaN where it had nothing to decide, or all layers follow one decision.
        entropy: (L,) mean entropy of the router, 0 to 1; NaN likewise.
        examples: the first rows.
    """

    task: str
    expert: int | None
    rows: int
    tokens: int
    share: Tensor
    hits: Tensor
    margin: Tensor
    entropy: Tensor
    examples: list[Example] = field(default_factory=list)


@dataclass
class RoutingRecord:
    """What the routers did on all tasks.

    Attributes:
        layers: the L layers' paths.
        experts: the E experts' names.
        candidates: (L, E) bool, who can answer where.
        tasks: one by one.
        agreement: (L, L) share of tokens for which two layers choose the same expert; NaN where they never see the
            same tokens, or one decision holds for all.
        kappa: (L, L) the same beyond what chance would give.
    """

    layers: list[str]
    experts: list[str]
    candidates: Tensor
    tasks: list[TaskRouting]
    agreement: Tensor
    kappa: Tensor

    @property
    def share(self) -> Tensor:
        """(tasks, L, E) mean gates."""
        return torch.stack([task.share for task in self.tasks])

    @property
    def mass(self) -> Tensor:
        """(tasks, E) mean gates over the layers that were called."""
        return self.share.nanmean(1)


def margin(scores: Tensor) -> Tensor:
    """`p_(1) - p_(2)`, the lead of the largest gate before selection, p the softmax of the scores over candidates.

    SMILE's gates before selection are this softmax (arXiv:2408.10174, section 4).

    Args:
        scores: (..., E), -inf for those that are no candidates.
    """
    first, second = scores.double().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def entropy(scores: Tensor) -> Tensor:
    """`-sum_i p_i ln p_i / ln n`, p the softmax of the scores over n candidates: 0 one is sure, 1 all are alike.

    Args:
        scores: (..., E), -inf for those that are no candidates, of which there are at least two.
    """
    logs = scores.double().log_softmax(-1)
    terms = torch.where(logs.isfinite(), logs.exp() * logs, 0.0)
    return -terms.sum(-1) / scores.isfinite().sum(-1).double().log()


def agreement(choices: Tensor, experts: int) -> Tensor:
    """(L, L) counts of tokens for which two layers chose the same of E experts.

    Args:
        choices: (L, T) int64.
        experts: E.
    """
    chosen = torch.nn.functional.one_hot(choices, experts).double().flatten(1)
    return chosen @ chosen.T


def cohen_kappa(observed: Tensor, picks: Tensor) -> Tensor:
    """(L, L) agreement beyond chance, `(a - c) / (1 - c)` with `c_lm = sum_e q_le q_me` [Cohen 1960, Educational and
    Psychological Measurement 20(1)]: 0 as if layers chose independently, 1 where they always choose alike.

    Args:
        observed: (L, L) share of tokens on which two layers agree.
        picks: (L, E) share q of tokens for which each layer chooses each expert.
    """
    chance = picks.double() @ picks.double().T
    return torch.where(observed.isnan() | (chance < 1), (observed - chance) / (1 - chance), 1.0)


def dead(mass: Tensor) -> list[int]:
    """Experts that get less than a tenth of their fair share 1/E.

    Args:
        mass: (E,) mean gates, which add up to 1.
    """
    return [i for i, share in enumerate(mass.tolist()) if share < DEAD / len(mass)]


def dominant(mass: Tensor) -> list[int]:
    """Experts that get more than three times their fair share 1/E (more than 0.9 where there are three or fewer).

    Args:
        mass: (E,) mean gates, which add up to 1.
    """
    return [i for i, share in enumerate(mass.tolist()) if share > min(DOMINANT / len(mass), MOST)]


def committees(mass: Tensor) -> list[tuple[list[int], float]]:
    """For each size 1..E the group of experts that carries most of the routing mass in the task where it carries least.

    After the "standing committee" audit, which looks for a compact group of experts that captures the majority of the
    routing mass whatever the domain. If every task went to an expert of its own, no group short of all would carry
    anything in every task; if experts were used alike, a group of n would carry n / E.

    Args:
        mass: (tasks, E) mean gates, rows that add up to 1.

    Returns:
        Per size: the group, and the least mass that it carries in any task. Groups are found exactly up to
        `EXHAUSTIVE` experts; beyond, each grows from the one before by the expert that helps most.
    """
    total = mass.shape[1]
    found: list[tuple[list[int], float]] = []
    for size in range(1, total + 1):
        if total <= EXHAUSTIVE:
            groups = [list(group) for group in combinations(range(total), size)]
        else:
            before = found[-1][0] if found else []
            groups = [[*before, i] for i in range(total) if i not in before]
        carried = mass.double()[:, torch.tensor(groups)].sum(-1)  # (tasks, groups)
        # Ties of the least are broken by the mean: a group that is better elsewhere.
        best = int((carried.min(0).values + 1e-6 * carried.mean(0)).argmax())
        found.append((sorted(groups[best]) if total <= EXHAUSTIVE else groups[best], float(carried[:, best].min())))
    return found


def standing_committee(mass: Tensor, most: float = 0.5) -> list[int]:
    """The smallest group of experts that carries at least `most` of the routing mass in every task; see `committees`.

    Args:
        mass: (tasks, E) mean gates, rows that add up to 1.
        most: the share that is to be carried.
    """
    return next(group for group, carried in committees(mass) if carried >= min(most, 1.0) - 1e-9)


@torch.inference_mode()
def record(
    model: Any,
    tasks: Iterable[tuple[str, str | None, Iterable[Batch]]],
    examples: int = 3,
    tell: Callable[[str], None] = lambda _: None,
) -> RoutingRecord:
    """Run a mixture on tasks and keep what its routers did.

    Args:
        model: a mixture; its own device and dtype are used.
        tasks: (name, the expert made for it or None, batches). A batch holds what the model is called with: tensors
            that begin with the rows; and perhaps their `texts`, for a mixture that retrieves experts by them, or what
            else the rows are read from and its `encoder` (see `told`). Tokens that its `attention_mask` (batch, tokens)
            hides do not count in layers that see exactly these tokens, `decoder_attention_mask` likewise. Where the
            routers of a model that writes decide by the prompt, a row is one, unless `prompt_lengths`, or `labels` that
            begin with -100, say otherwise.
        examples: how many rows of each task are kept token by token, where batches hold `input_ids`.
        tell: is told what is being done.

    Raises:
        CoterieError: no such expert, or a task without rows.
    """
    names: list[str] = model.coterie.expert_names
    layers: list[str] = model.coterie.layers
    spec = model.coterie.spec
    candidates = torch.zeros(len(layers), len(names), dtype=torch.bool)
    for at, shape in enumerate(spec.layers.values()):
        candidates[at, list(shape.experts)] = True
    pairs = _Pairs(len(layers), len(names))
    # One decision for all layers has no margin in each, and cannot but agree.
    routing = spec.routing
    before = routing.score == "prepass" and not routing.score_options["layerwise"]
    apart = routing.pool != "model" and routing.score not in ("signal", "retrieval") and not before
    done = []
    for task, expert, batches in tasks:
        if expert is not None and expert not in names:
            raise CoterieError(f"no expert {expert!r} for task {task!r}", "inspect", f"known: {', '.join(names)}")
        tally = _Tally(layers, candidates, None if expert is None else names.index(expert), examples)
        for batch in batches:
            tell(f"{task}: {tally.rows} rows")
            known = told(model, batch.get("texts", ()), batch.get("encoder"))
            batch = {key: value.to(model.device) for key, value in batch.items() if key not in ("texts", "encoder")}
            with known, routing_trace(model, scores=apart) as trace:
                model(**as_prompts(model, batch))
            tally.add(batch, trace, pairs if apart else None)
        if not tally.rows:
            raise CoterieError(f"task {task!r} has no rows", "inspect", "give it at least one")
        done.append(tally.result(task))
    if not done:
        raise CoterieError("no tasks given", "inspect", "give at least one")
    observed = pairs.same / pairs.seen
    return RoutingRecord(layers, names, candidates, done, observed, cohen_kappa(observed, pairs.picks()))


class _Pairs:
    """Counts of agreement between layers, over all tasks."""

    def __init__(self, layers: int, experts: int):
        self.same = torch.zeros(layers, layers, dtype=torch.float64)
        self.seen = torch.zeros(layers, layers, dtype=torch.float64)
        self.chosen = torch.zeros(layers, experts, dtype=torch.float64)

    def add(self, members: list[int], choices: Tensor) -> None:
        """Layers that saw the same T tokens, and what they chose (L, T)."""
        at = torch.tensor(members)
        experts = self.chosen.shape[1]
        self.same[at[:, None], at] += agreement(choices, experts)
        self.seen[at[:, None], at] += choices.shape[1]
        self.chosen[at] += torch.nn.functional.one_hot(choices, experts).sum(1)

    def picks(self) -> Tensor:
        """(L, E) share of tokens for which each layer chooses each expert."""
        return self.chosen / self.chosen.sum(-1, keepdim=True)


class _Tally:
    """Sums over one task's tokens."""

    def __init__(self, layers: list[str], candidates: Tensor, expert: int | None, examples: int):
        self.layers, self.candidates, self.expert, self.wanted = layers, candidates, expert, examples
        self.rows = 0
        self.examples: list[Example] = []
        self.tokens, self.decided, self.hits, self.margin, self.entropy = torch.zeros(5, len(layers)).double()
        self.share = torch.zeros(candidates.shape, dtype=torch.float64)

    def add(self, batch: Batch, trace: Any, pairs: _Pairs | None) -> None:
        masks = [batch[key].bool().cpu() for key in ("attention_mask", "decoder_attention_mask") if key in batch]
        self.rows += len(next(iter(batch.values())))
        together: dict[tuple[int, ...], tuple[list[int], list[Tensor]]] = {}
        for at, path in enumerate(self.layers):
            if path not in trace:
                continue
            gates = trace[path].double().cpu()
            mask = next((m for m in masks if m.shape == gates.shape[:2]), torch.ones(gates.shape[:2], dtype=torch.bool))
            seen = gates[mask]
            choices = seen.argmax(-1)
            self.tokens[at] += len(seen)
            self.share[at] += seen.sum(0)
            if self.expert is not None:
                self.hits[at] += (choices == self.expert).sum()
            if path in trace.scores and self.candidates[at].sum() > 1:
                scores = trace.scores[path].cpu()[mask]
                self.decided[at] += len(scores)
                self.margin[at] += margin(scores).sum()
                self.entropy[at] += entropy(scores).sum()
            if self.candidates[at].sum() > 1:
                members, chosen = together.setdefault(tuple(gates.shape[:2]), ([], []))
                members.append(at)
                chosen.append(choices)
        if pairs is not None:
            for members, chosen in together.values():
                pairs.add(members, torch.stack(chosen))
        if "input_ids" in batch and len(self.examples) < self.wanted:
            self._keep(batch, trace)

    def _keep(self, batch: Batch, trace: Any) -> None:
        ids = batch["input_ids"].cpu()
        gates = torch.full((len(self.layers), *ids.shape, self.candidates.shape[1]), torch.nan)
        for at, path in enumerate(self.layers):
            if path in trace and trace[path].shape[:2] == ids.shape:
                gates[at] = trace[path].cpu()
        mask = batch["attention_mask"].bool().cpu() if "attention_mask" in batch else torch.ones_like(ids).bool()
        for row in range(min(len(ids), self.wanted - len(self.examples))):
            self.examples.append(Example(ids[row, mask[row]].tolist(), gates[:, row, mask[row]]))

    def result(self, task: str) -> TaskRouting:
        can = self.candidates.sum(1) > 1
        can &= self.candidates[:, self.expert] if self.expert is not None else False
        return TaskRouting(
            task,
            self.expert,
            self.rows,
            int(self.tokens.max()),
            self.share / self.tokens[:, None],
            torch.where(can, self.hits / self.tokens, torch.nan),
            self.margin / self.decided,
            self.entropy / self.decided,
            self.examples,
        )
