"""Each example's own loss, and what routers that learn from it are rewarded with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CoterieError
from ..routing.call import Call


def check_classes(model: Any, labels: Tensor) -> None:
    """Refuse labels that no class has, which would end in a bare index error.

    Raises:
        CoterieError: there are such.
    """
    classes = model.config.num_labels if type(model).__name__.endswith("Classification") else 1
    # on a GPU, the look would wait for the device
    if classes < 2 or labels.is_floating_point() or not labels.is_cpu or torch.compiler.is_compiling():
        return
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise CoterieError(
            f"label {int(wrong[0])} is none of {classes} classes", "labels", f"number them from 0 to {classes - 1}"
        )


def example_losses(logits: Tensor, labels: Tensor, causal: bool, several: bool = False) -> Tensor:
    """(batch,) float32, each example's own loss, from the logits and labels of the usual heads.

    Args:
        logits, labels: of a call.
        causal: whether labels are of the next token.
        several: whether an example may have several classes.
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = logits.float()
    if several:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)
    if labels.is_floating_point():
        return F.mse_loss(logits.view_as(labels), labels, reduction="none").flatten(1).mean(1)
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return each.sum(1) / (labels != -100).sum(1).clamp(min=1)


def reward(call: Call, losses: Tensor, weights: dict[str, float]) -> dict[str, Tensor]:
    """REINFORCE with a learned baseline; every layer's choices share the call's reward (minus the example's loss)."""
    gain = -losses.detach()
    policy, entropy, value = [], [], []
    for each in call.policies:
        policy.append(-(each.log_probability * (gain - each.value.detach())).mean())
        entropy.append(-each.entropy.mean())
        value.append(F.huber_loss(each.value, gain))
    means = {"policy": policy, "policy_entropy": entropy, "value": value}
    return {name: weights[name] * torch.stack(each).mean() for name, each in means.items() if name in weights}
