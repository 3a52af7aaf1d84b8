"""Tasks: the first three layers of MiniLM, eight tasks over short texts, seven telling ways to route among experts.

Base, tasks and anchors are those of the suite text8 (see `coterie.evaluation.suites.text8`): a class is the frozen
embedding of its label, and a text is read by its nearest among the classes of its task.

    python benchmarks/tasks.py                         # writes benchmarks/results/tasks.json; goes on when stopped
    python benchmarks/tasks.py --methods smear,tag     # some methods only; the file holds whatever is finished
"""

from __future__ import annotations

from functools import cache as cached
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from coterie.evaluation.anchors import SCALE, AnchorReader, embed
from coterie.evaluation.suite import Split, Task, digest, weights_sha256
from coterie.evaluation.suites import text8
from routers import Experiment, Rows, main

METHODS = ("smear", "tag", "switch", "single", "single_wide", "hash", "ensemble")
LAYERS, TOKENS = 3, 16
TRAIN, VALIDATION, TEST = 6000, 300, 500  # rows of a task, at most
STEPS, BATCH, RANK = 600, 32, 8
RATES = (1e-3, 3e-3, 1e-2)


class AnchoredBert(BertPreTrainedModel):
    """BERT whose logits are scaled cosines of a text's embedding with frozen anchors; it is trained within a task.

    Attributes:
        anchors: (classes, D) of unit length, the classes of all tasks one after the other.
        owners: (classes,) int64, each class's task.
    """

    anchors: Tensor
    owners: Tensor

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        classes = config.num_labels or 0
        self.register_buffer("anchors", torch.zeros(classes, config.hidden_size))
        self.register_buffer("owners", torch.zeros(classes, dtype=torch.int64))
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits of every class (B, classes); the loss is the cross-entropy among the classes of the label's task."""
        embedding = embed(self.bert, {"input_ids": input_ids, "attention_mask": attention_mask})
        logits = SCALE * embedding @ self.anchors.T
        loss = None
        if labels is not None:
            others = self.owners != self.owners[labels].unsqueeze(1)
            loss = nn.functional.cross_entropy(logits.masked_fill(others, -torch.inf), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mixed(tasks: tuple[Task, ...], split: str, reader: AnchorReader) -> Rows:
    """Rows of all tasks, each text padded to `TOKENS` tokens; a label is a place among the classes of all tasks."""
    columns: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": [], "task_ids": []}
    first = 0
    for number, task in enumerate(tasks):
        rows: Split = getattr(task, split)
        texts = reader.tokenizer(
            list(rows.inputs), truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"
        )
        columns["input_ids"].append(texts["input_ids"])
        columns["attention_mask"].append(texts["attention_mask"])
        columns["labels"].append(first + torch.as_tensor(rows.targets))
        columns["task_ids"].append(torch.full((len(rows),), number))
        first += len(task.labels)
    return Rows({name: torch.cat(parts) for name, parts in columns.items()})


@cached
def experiment(cache: Path, steps: int = STEPS) -> Experiment:
    """The experiment."""
    directory, tasks = text8.base_dir(), text8.load(TRAIN, VALIDATION, TEST)
    reader = AnchorReader(directory, max_tokens=TOKENS)
    owners = torch.tensor([number for number, task in enumerate(tasks) for _ in task.labels])
    anchors = torch.cat([reader.anchors(task.labels) for task in tasks])

    def base() -> Any:
        model = AnchoredBert.from_pretrained(directory, num_hidden_layers=LAYERS, num_labels=len(owners))
        model.anchors.copy_(anchors)
        model.owners.copy_(owners)
        return model

    return Experiment(
        tasks=tuple(task.name for task in tasks),
        train=mixed(tasks, "train", reader), validation=mixed(tasks, "validation", reader),
        test=mixed(tasks, "test", reader), classes=owners == torch.arange(len(tasks)).unsqueeze(1), base=base,
        # After attention and after the feed-forward, where the paper's adapters are.
        sites=("*.attention.output.dense", "*.output.dense"), head=None, rank=RANK, tokens=TOKENS,
        settings={
            "steps": steps, "batch": BATCH, "layers": LAYERS, "scale": SCALE, "base": weights_sha256(directory),
            "labels": digest([task.labels for task in tasks]),
        },
        about=f"text8: {len(tasks)} tasks, the first {LAYERS} layers of MiniLM, at most {TOKENS} tokens a text",
    )  # fmt: skip


if __name__ == "__main__":
    main("tasks", __doc__, experiment, STEPS, RATES, METHODS)
