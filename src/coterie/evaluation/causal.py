"""Causal language models: the likelihood of texts, and answers that are generated word for word.

A row is a prompt and the answer that follows it; where the targets are no texts, the input is the answer to an empty
prompt. Perplexity counts the answer's tokens and the end of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import CoterieError
from .ladder import blocks_of
from .reader import most_tokens, told
from .suite import Inputs, Split, Task

MAX_TOKENS = 128
NEW_TOKENS = 24
IGNORED = -100


@dataclass
class CausalReader:
    """A `Reader` of texts by causal language models.

    The tokenizer's last token stands in for a first token or a padding token that it lacks.

    Args:
        base: directory of the base.
        device: where batches go.
        max_tokens: of a prompt with its answer, at least 2. What is longer, or than the base has positions for, loses
            the beginning of its prompt, then the end of its answer.

    Raises:
        CoterieError: the tokenizer has no last token.
    """

    base: Path
    device: str = "cpu"
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        first, self.last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.last is None:
            raise CoterieError("its tokenizer has no token for the end of a text", str(self.base), "name its eos_token")
        self.first = self.last if first is None else first
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # the attention mask hides it
        self.model = self.base_model()
        self.blocks = blocks_of(self.model)
        self.max_tokens = most_tokens(self.model, self.max_tokens)
        self.settings: dict[str, Any] = {
            "max_tokens": self.max_tokens, "new_tokens": NEW_TOKENS, "loss": "answer",
        }  # fmt: skip

    def base_model(self) -> nn.Module:
        """A fresh copy of the base in float32, in eval mode."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval().to(self.device)

    def tokenize(self, texts: Inputs) -> list[list[int]]:
        """Token ids of each text, without first and last token."""
        encode = self.tokenizer.backend_tokenizer.encode_batch
        return [encoding.ids for encoding in encode(list(texts), add_special_tokens=False)]

    def prompts(self, inputs: Inputs) -> list[list[int]]:
        """The first token and the input's, which may be a whole text: what is too long loses its end."""
        return [[self.first, *ids][: self.max_tokens] for ids in self.tokenize(inputs)]

    def _begun(self, ids: list[int], room: int) -> list[int]:
        """The first token and the end of a prompt, `room` tokens at most."""
        return [self.first, *ids[max(0, len(ids) + 1 - room) :]]

    def sizes(self, inputs: Inputs) -> np.ndarray:
        """(N,) int64: tokens of each input."""
        return np.array([len(ids) for ids in self.prompts(inputs)], dtype=np.int64)

    def padded(self, ids: list[list[int]], side: str = "right") -> dict[str, Tensor]:
        """(B, T) int64 `input_ids` and `attention_mask`."""
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def batches(self, inputs: Inputs, size: int = 64) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """(B,) row numbers and the batch of those rows; rows of similar length come together."""
        ids = self.prompts(inputs)
        for rows in _alike(ids, size):
            yield rows, self.padded([ids[row] for row in rows])

    def labelled(self, rows: Split) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompt, answer and end of each row; and the same with the prompt's tokens IGNORED."""
        if not _prompted(rows):
            prompts, answers = self.tokenize(("",) * len(rows)), self.tokenize(rows.inputs)
        else:
            prompts, answers = self.tokenize(rows.inputs), self.tokenize(rows.targets)
        ends = [[*answer, self.last][: self.max_tokens - 1] for answer in answers]
        pairs = [
            (self._begun(prompt, self.max_tokens - len(end)), end) for prompt, end in zip(prompts, ends, strict=True)
        ]
        return [[*start, *end] for start, end in pairs], [[*[IGNORED] * len(start), *end] for start, end in pairs]

    def losses(
        self, model: nn.Module, ids: list[list[int]], labels: list[list[int]], prompted: bool
    ) -> tuple[Tensor, Tensor]:
        """(B,) summed negative log-likelihood of each row's answer, and (B,) its tokens; `prompted`: as `_prompted`."""
        batch = self.padded(ids)
        if hasattr(model, "coterie") and prompted:  # its routers may decide by the prompt
            batch["prompt_lengths"] = torch.tensor([row.count(IGNORED) for row in labels], device=self.device)
        width = batch["input_ids"].shape[1]
        wanted = torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels], device=self.device)[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
        return each.sum(1), (wanted != IGNORED).sum(1)

    def loss(self, model: nn.Module, task: Task, rows: Split) -> Tensor:
        """() negative log-likelihood per answered token of the batch."""
        total, tokens = self.losses(model, *self.labelled(rows), _prompted(rows))
        return total.sum() / tokens.sum()

    def logits(self, task: Task, output: Any) -> Tensor:
        """The model's own."""
        logits: Tensor = output.logits
        return logits

    @torch.inference_mode()
    def scores(self, model: nn.Module, task: Task, split: Split) -> np.ndarray:
        """(N,) float64: negative log-likelihood per token ("perplexity"), or whether greedy generation after the
        prompt gives the answer, no more and no less but white space around it ("exact_match"). 24 tokens are written
        at most, or those of the longest answer, as far as the model has positions."""
        scores = np.empty(len(split))
        if task.metric == "perplexity":
            ids, labels = self.labelled(split)
            for rows in _alike(ids, 64):
                with told(model, (split.inputs[row] for row in rows)):
                    total, tokens = self.losses(
                        model, [ids[row] for row in rows], [labels[row] for row in rows], _prompted(split)
                    )
                scores[rows] = (total / tokens).double().cpu().numpy()
            return scores
        prompts = [self._begun(ids, self.max_tokens) for ids in self.tokenize(split.inputs)]
        most = max([NEW_TOKENS, *map(len, self.tokenize(split.targets))])
        for rows in _alike(prompts, 128):
            with told(model, (split.inputs[row] for row in rows)):
                right = self.generated(model, [prompts[row] for row in rows], most)
            scores[rows] = [
                np.nan if answer is None else float(split.targets[row] in (answer, answer.strip()))
                for row, answer in zip(rows, right, strict=True)
            ]
        return scores

    def generated(self, model: nn.Module, prompts: list[list[int]], most: int) -> list[str | None]:
        """What greedy decoding writes after each prompt, in so many tokens; None where a logit on the way is NaN."""
        batch = self.padded(prompts, "left")
        positions = getattr(cast("Any", model).config, "max_position_embeddings", None)
        if positions:
            most = max(1, min(most, positions - batch["input_ids"].shape[1]))
        output = cast("Any", model).generate(
            **batch, max_new_tokens=most, do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.last, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        finite = torch.stack([logits.isfinite().all(1) for logits in output.logits]).all(0).tolist()
        written = output.sequences[:, batch["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text if fine else None for text, fine in zip(texts, finite, strict=True)]

    @torch.inference_mode()
    def features(self, inputs: Inputs) -> np.ndarray:
        """(N, D) float32: means of the base's last hidden states."""
        features = np.empty((len(inputs), cast("Any", self.model).config.hidden_size), dtype=np.float32)
        for rows, batch in self.batches(inputs):
            hidden = self.model(**batch, output_hidden_states=True).hidden_states[-1]
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            features[rows] = ((hidden * mask).sum(1) / mask.sum(1)).float().cpu().numpy()
        return features


def _prompted(rows: Split) -> bool:
    """Whether the rows are prompts and answers, not whole texts."""
    return not isinstance(rows.targets, np.ndarray)


def _alike(ids: list[list[int]], size: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of rows of similar length."""
    order = np.argsort([len(row) for row in ids], kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]
