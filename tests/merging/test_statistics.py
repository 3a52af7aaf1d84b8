"""Fisher information and Gram matrices equal their definitions; files of them are whole, and say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import coterie
from coterie.errors import CoterieError
from coterie.merging.statistics import (
    fisher,
    gather,
    gram,
    read,
    read_texts,
    require_kind,
    require_own,
    require_shape,
)
from coterie.sources.checkpoint import Checkpoint
from coterie.sources.locate import locate


class Linear(nn.Module):
    """Logistic regression over `classes`, with a frozen parameter."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.head = nn.Linear(4, classes, bias=False)
        self.idle = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def bert(**keys: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes, **keys))


def padded_batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for lengths in ([5, 2, 7], [4, 4]):
        ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def test_true_fisher_of_logistic_regression() -> None:
    """F = E_x E_y [(x (1[y = c] - p_c))^2] = E_x [x^2 p_c (1 - p_c)], whose sampled estimate comes close."""
    model = Linear()
    x = torch.randn(6, 4)
    p = (x @ model.head.weight.T).softmax(-1).detach()
    expected = torch.einsum("ni,nc->ci", x**2, p * (1 - p)) / len(x)
    found = fisher(model, [{"x": x[i : i + 4]} for i in (0, 4)] * 400)
    assert (found.kind, found.rows, set(found.tensors)) == ("fisher", 2400, {"head.weight", "idle", "frozen"})
    assert not found.tensors["idle"].any() and not found.tensors["frozen"].any()
    torch.testing.assert_close(found.tensors["head.weight"] * found.norm, expected, rtol=0.2, atol=0.01)
    assert float(found.tensors["head.weight"].norm()) == pytest.approx(1)


def test_fisher_of_drawn_labels_is_per_example() -> None:
    """With seeds fixed, the very gradients of each example, squared and averaged."""
    model, x = Linear(), torch.randn(5, 4)
    found = fisher(model, [{"x": x}], seed=7)
    generator, total = torch.Generator().manual_seed(7), torch.zeros(3, 4)
    for each in x:
        p = (model.head.weight @ each).softmax(-1).detach()
        y = torch.multinomial(p[None], 1, generator=generator).item()
        total += torch.outer(torch.eye(3)[y] - p, each).square()
    torch.testing.assert_close(found.tensors["head.weight"] * found.norm, total / 5)


def test_empirical_fisher_takes_the_labels() -> None:
    model, x, y = Linear(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    found = fisher(model, [{"x": x, "labels": y}], empirical=True)
    p = (x @ model.head.weight.T).softmax(-1).detach()
    expected = torch.einsum("nc,ni->nci", torch.eye(3)[y] - p, x).square().mean(0)
    torch.testing.assert_close(found.tensors["head.weight"] * found.norm, expected)
    with pytest.raises(CoterieError, match="no loss"):
        fisher(model, [{"x": x}], empirical=True)


def test_a_single_output_is_a_normal_variable() -> None:
    model, x = Linear(classes=1), torch.randn(3, 4)
    found = fisher(model, [{"x": x}] * 800)
    torch.testing.assert_close(found.tensors["head.weight"][0] * found.norm, (x**2).mean(0), rtol=0.2, atol=0.01)


def test_padding_and_batches_change_nothing() -> None:
    """One example at a time, without padding, gives the same Gram matrices; and the same gradients of the loss."""
    model, batches = bert().train(), padded_batches()
    singles = [
        {"input_ids": ids[mask.bool()][None]}
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    together, apart = gram(model, batches), gram(model, singles)
    assert together.rows == apart.rows == 22
    torch.testing.assert_close(together.tensors, apart.tensors, atol=1e-6, rtol=1e-4)
    assert model.training and model.bert.training
    for name, tensor in fisher(model, batches, seed=1).tensors.items():
        torch.testing.assert_close(tensor, fisher(model, singles, seed=1).tensors[name], atol=1e-5, rtol=1e-3)


def test_gram_of_every_linear_layer() -> None:
    model, seen = bert().eval(), []
    hook = model.bert.encoder.layer[1].intermediate.dense.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    [batch, _] = padded_batches()
    found = gram(model, [batch])
    hook.remove()
    x = seen[0][batch["attention_mask"].bool()].double()
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    torch.testing.assert_close(found.tensors[name].double(), x.T @ x / 14, atol=1e-5, rtol=1e-5)
    assert set(found.tensors) == {f"{p}.weight" for p, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_causal_model_with_its_own_kind_of_linear_layer() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    batches = padded_batches()
    grams = gram(model, batches).tensors
    assert grams["transformer.h.0.mlp.c_proj.weight"].shape == (32, 32)  # Conv1D keeps its weight as (in, out)
    found = fisher(model, batches)
    assert found.tensors["transformer.h.0.mlp.c_proj.weight"].shape == (32, 8)
    assert "lm_head.weight" not in found.tensors  # tied
    # Positions of the padding say nothing: those beyond the longest text have no information.
    assert not found.tensors["transformer.wpe.weight"][7:].any()
    assert found.tensors["transformer.wpe.weight"][6].any()


def test_bad_input() -> None:
    with pytest.raises(CoterieError, match="no batches"):
        gram(bert(), [])
    with pytest.raises(CoterieError, match="no batches"):
        fisher(bert(), [])
    with pytest.raises(CoterieError, match="no logits"):
        fisher(bert().bert, padded_batches())
    hidden = fisher(bert().bert, padded_batches(), logits=lambda output: output.last_hidden_state[:, 0])
    assert hidden.tensors["encoder.layer.0.output.dense.weight"].any()


def test_statistics_of_another_model() -> None:
    require_shape(torch.ones(2, 3, 4), (3, 4))
    with pytest.raises(CoterieError, match=r"\[3, 4\] do not fit one of \[4, 4\]"):
        require_shape(torch.ones(2, 3, 4), (4, 4))


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "new" / "gram.safetensors"
    made = gram(bert(), padded_batches())
    made.write(file)
    found = read(file)
    assert (found.kind, found.rows, found.model) == ("gram", 22, "BertForSequenceClassification")
    torch.testing.assert_close(found.tensors, made.tensors, rtol=0, atol=0)
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    with pytest.raises(CoterieError, match="exists already"):
        made.write(file)
    made.write(file, force=True)
    require_kind(file, "gram")
    with pytest.raises(CoterieError, match="of kind gram, and the method needs fisher"):
        require_kind(file, "fisher")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901234567890")
    for bad in ("bad.safetensors", "none.safetensors"):
        with pytest.raises(CoterieError, match="cannot be read"):
            read(tmp_path / bad)


def test_texts(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    lines.write_text('{"text": "one", "n": 1}\n\n{"text": "two, or 2"}\n')
    table.write_text('n,sentence\n1,one\n2,"two, or 2"\n')
    assert list(read_texts(lines, "text")) == list(read_texts(table, "sentence")) == ["one", "two, or 2"]
    for file, column, message in (
        (table, "text", "no text 'text'.*n, sentence"),
        (lines, "n", "no text 'n'"),
        (tmp_path / "none.csv", "text", "cannot be read"),
        (tmp_path / "a.parquet", "text", "parquet"),
    ):
        with pytest.raises(CoterieError, match=message):
            list(read_texts(file, column))
    lines.write_text("{oops\n")
    with pytest.raises(CoterieError, match="cannot be read"):
        list(read_texts(lines, "text"))


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_gathering_from_a_checkpoint(tmp_path: Path, kind: Any) -> None:
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    bert().save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a b", "c", "d e f g", "a")))
    out = tmp_path / "out.safetensors"
    found = gather(str(tmp_path / "model"), data, kind, out, batch_size=2, limit=3)
    assert found.rows == (3 if kind == "fisher" else 7 + 3 * 2)
    torch.testing.assert_close(read(out).tensors, found.tensors)
    assert str(found.rows) in found.summary()
    again = bert()
    again.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    (tmp_path / "model" / "model.safetensors").unlink()
    require_own(out, Checkpoint.open(locate(str(tmp_path / "model"))))  # the same tensors in other files
    torch.nn.init.ones_(again.classifier.bias)
    again.save_pretrained(tmp_path / "other")
    with pytest.raises(CoterieError, match=r"statistics of another checkpoint .*model\) than .*other"):
        require_own(out, Checkpoint.open(locate(str(tmp_path / "other"))))
    method = "fisher" if kind == "fisher" else "regmean"
    experts = {n: {"source": str(tmp_path / n), "statistics": str(out)} for n in ("model", "other")}
    with pytest.raises(CoterieError, match="give each expert its own file"):
        coterie.merge(method=method, base=str(tmp_path / "model"), experts=experts, out=tmp_path / "merged")
    with pytest.raises(CoterieError, match="exists already"):
        gather(str(tmp_path / "model"), data, kind, out)
    data.write_text("")
    with pytest.raises(CoterieError, match="no texts"):
        gather(str(tmp_path / "model"), data, kind, out, force=True)


def test_classifiers_of_decoders_and_their_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerFast

    def tokenizer(**tokens: str) -> None:
        inner = Tokenizer(WordLevel({"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
        inner.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **tokens).save_pretrained(model)

    def gathered(kind: Any = "gram") -> Any:
        return gather(str(model), data, kind, tmp_path / "out", force=True)

    model, data = tmp_path / "model", tmp_path / "data.csv"
    config = GPT2Config(vocab_size=4, n_embd=8, n_layer=1, n_head=2, n_positions=16, num_labels=3)
    whole = GPT2ForSequenceClassification(config)
    whole.save_pretrained(model)
    data.write_text("text\na b\n" + "b " * 100 + "\n  \n")  # the second is longer than the model takes, the third empty
    with pytest.raises(CoterieError, match="no tokenizer"):
        gathered()
    tokenizer()
    with pytest.raises(CoterieError, match="no token for padding"):
        gathered()
    tokenizer(eos_token="<eos>")
    assert gathered().rows == 2 + 16
    whole.config.pad_token_id = 0
    rows = [{"input_ids": torch.tensor([ids])} for ids in ([2, 3], [3] * 16)]  # no padding at all
    torch.testing.assert_close(gathered("fisher").tensors, fisher(whole, rows).tensors)
