"""Sequence classifiers read by heads of their own: one head for each task, on whatever body is compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..errors import CoterieError
from ..recipe import nearest
from .ladder import blocks_of
from .metrics import class_scores
from .reader import most_tokens, told
from .suite import Inputs, Split, Task

ADAPTER = "adapter_model.safetensors"


@dataclass
class ClassifierReader:
    """A `Reader` of texts by sequence classifiers.

    A model without a head (`base_model`, which merges and the ladder fill) answers a task through the head of the
    task's expert; a mixture through the head that it keeps under the task's name; any other model through its own.

    Args:
        base: directory of the base, with or without a head.
        device: where batches go.
        experts: task -> directory of its expert.
        max_tokens: of a text; what is longer, or than the base has positions for, is cut.
    """

    base: Path
    device: str = "cpu"
    experts: Mapping[str, Path] = field(default_factory=dict)
    max_tokens: int = 128

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        whole = self._classifier(self.base)
        self.head_names = [name for name, child in whole.named_children() if _is_head(whole, name, child)]
        self.model = self.base_model()
        self.blocks = blocks_of(self.model)
        self.max_tokens = most_tokens(self.model, self.max_tokens)
        self.settings: dict[str, Any] = {"max_tokens": self.max_tokens}
        self._heads: dict[str, tuple[Any, dict[str, nn.Module]]] = {}

    def _classifier(self, directory: Path, **options: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32, **options).eval()

    def _with_head(self, directory: Path, **options: Any) -> tuple[Any, set[str]]:
        """A classifier, and the names of its tensors that the directory does not hold, which are random then."""
        model, found = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, **options
        )
        mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
        return model.eval(), {*found["missing_keys"], *mismatched}

    def base_model(self) -> nn.Module:
        """A fresh copy of the base in float32, in eval mode, without a head."""
        model = self._classifier(self.base)
        for name in self.head_names:
            setattr(model, name, nn.Identity())
        return model.to(self.device)

    def sizes(self, inputs: Inputs) -> np.ndarray:
        """(N,) int64: tokens of each text."""
        return np.array([len(row) for row in self._ids(inputs)])

    def _ids(self, inputs: Inputs) -> list[list[int]]:
        return self.tokenizer(list(map(str, inputs)), truncation=True, max_length=self.max_tokens)["input_ids"]

    def batches(self, inputs: Inputs, size: int = 64) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """(B,) row numbers and `input_ids`, `attention_mask` of those rows; rows of similar length come together."""
        ids = self._ids(inputs)
        order = np.argsort([len(row) for row in ids], kind="stable")
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            padded = self.tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            yield rows, {name: padded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def loss(self, model: nn.Module, task: Task, rows: Split) -> Tensor:
        """() the cross-entropy of the model's own head."""
        ((order, batch),) = self.batches(rows.inputs, len(rows))
        targets = torch.as_tensor(np.asarray(rows.targets)[order], device=self.device)
        return nn.functional.cross_entropy(model(**batch).logits.float(), targets)

    def logits(self, task: Task, output: Any) -> Tensor:
        """The model's own."""
        logits: Tensor = output.logits
        return logits

    @torch.inference_mode()
    def scores(self, model: nn.Module, task: Task, split: Split) -> np.ndarray:
        """(N,) float64: whether the head's largest logit is the row's class (or its cell of the confusion matrix)."""
        parts, order = [], []
        with self._headed(model, task) as config:
            columns = _columns(config, task)
            for rows, batch in self.batches(split.inputs):
                order.extend(rows.tolist())
                with told(model, (split.inputs[row] for row in rows)):
                    parts.append(model(**batch).logits[:, columns].float().cpu().numpy())
        return class_scores(np.concatenate(parts)[np.argsort(order)], np.asarray(split.targets), task.metric)

    @contextmanager
    def _headed(self, model: Any, task: Task) -> Iterator[Any]:
        """The model has the head that answers the task; gives that head's configuration."""
        if hasattr(model, "coterie") and model.coterie.spec.heads:
            with model.coterie.use_head(task.name):
                yield model.config
        elif isinstance(getattr(model, self.head_names[0], None), nn.Identity):
            if task.name not in self._heads:
                self._heads[task.name] = self._head(task)
            config, heads = self._heads[task.name]
            try:
                for name, head in heads.items():
                    setattr(model, name, head)
                yield config
            finally:
                for name in heads:
                    setattr(model, name, nn.Identity())
        else:
            yield model.config

    def _head(self, task: Task) -> tuple[Any, dict[str, nn.Module]]:
        """The configuration of the task's expert, and the modules of its head by name."""
        if task.name not in self.experts:
            raise CoterieError(f"task {task.name!r} has no expert, and so no head", "suite", "name one under experts:")
        directory = self.experts[task.name]
        if (directory / ADAPTER).exists():
            model, random = self._with_head(self.base, num_labels=len(task.labels), ignore_mismatched_sizes=True)
            prefix = "base_model.model."
            kept = {name.removeprefix(prefix): t for name, t in load_file(directory / ADAPTER).items()}
            random -= set(kept)
        else:
            model, random = self._with_head(directory)
            kept = {}
        if random:
            raise CoterieError(
                f"has no head for the {len(task.labels)} classes of task {task.name!r}",
                str(directory),
                "give a model, or an adapter with its head among the modules to save",
            )
        for name, needed in model.state_dict().items():
            if name.split(".")[0] in self.head_names and name in kept and kept[name].shape != needed.shape:
                raise CoterieError(  # the head of another task: full fine-tunes are told apart by their classes' names
                    f"task {task.name!r} has {len(task.labels)} classes, which needs {name} of {list(needed.shape)}, "
                    f"and the adapter's has {list(kept[name].shape)}",
                    str(directory),
                    "give an adapter whose head has these classes",
                )
        model.load_state_dict(kept, strict=False)
        return model.config, {name: getattr(model, name).to(self.device) for name in self.head_names}

    def features(self, inputs: Inputs) -> np.ndarray:
        """(N, D) float32 masked means of the base's last hidden states."""
        body: Any = getattr(self.model, str(self.model.base_model_prefix))
        order: list[int] = []
        parts = []
        with torch.inference_mode():
            for rows, batch in self.batches(inputs):
                order.extend(rows.tolist())
                mask = batch["attention_mask"].unsqueeze(-1).float()
                hidden = body(**batch).last_hidden_state.float()
                parts.append(((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy())
        return np.concatenate(parts)[np.argsort(order)]


def _is_head(model: Any, name: str, child: nn.Module) -> bool:
    return name != model.base_model_prefix and next(child.parameters(), None) is not None


def _columns(config: Any, task: Task) -> list[int]:
    """The logit of each class of the task: by its name in the head's configuration, where upper and lower case are one
    if that leaves no doubt; in order only where the configuration names no classes."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    for same in (str, str.casefold):
        known = list(map(same, names))
        if all(known.count(same(label)) == 1 for label in task.labels):
            return [known.index(same(label)) for label in task.labels]
    if names == [f"LABEL_{number}" for number in range(len(task.labels))]:
        return list(range(len(names)))
    lacking = [label for label in task.labels if known.count(label.casefold()) != 1]
    where = f"task {task.name!r} ({', '.join(task.labels)})"
    if len(lacking) == len(task.labels):
        what = f"the model's head has the classes {', '.join(names)}"
        mend = "if these are the task's, give labels: value in the data -> the head's name of it"
    else:
        what = f"the model's head has no one class {lacking[0]!r}"
        mend = f"give labels: value in the data -> the head's name of it; {nearest(lacking[0], names)}"
    raise CoterieError(what, where, mend)
