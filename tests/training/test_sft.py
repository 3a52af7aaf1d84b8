"""TRL's SFTTrainer, unchanged, on decoders: its forward calls the base model and makes the loss itself."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from test_trainer import apart, losses, rows, trained, weights, wrapped
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import coterie

trl = pytest.importorskip("trl")


def tokenizer():
    words = ["[PAD]", "<s>", "</s>", *(f"w{i}" for i in range(97))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[PAD]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="[PAD]", eos_token="</s>", bos_token="<s>")


PAIRS = [{"prompt": "w5 " * (1 + i % 3) + f"w{i}", "completion": f" w{i + 2} w{i + 5}"} for i in range(8)]


def tuned(folder, model, watched=False, data=PAIRS, **given):
    usual = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1, completion_only_loss=True, learning_rate=0.1,
        optim="sgd", max_grad_norm=0.0, activation_checkpointing=False, train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**{**usual, **given}),
        train_dataset=Dataset.from_list(list(data)),
        processing_class=tokenizer(),
    )
    if watched:
        coterie.watch(trainer)
    trainer.train()
    return trainer


def plain(folder, model):
    """The same rows through the Trainer, which lets the model make its loss."""
    words = tokenizer()
    longest = 1 + max(len(words(p["prompt"] + p["completion"])["input_ids"]) for p in PAIRS)
    data = []
    for pair in PAIRS:
        prompt = words(pair["prompt"])["input_ids"]
        answer = [*words(pair["completion"])["input_ids"], words.eos_token_id]
        pad = longest - len(prompt) - len(answer)
        data.append(
            {
                "input_ids": torch.tensor(prompt + answer + [0] * pad),
                "attention_mask": torch.tensor([1] * (len(prompt) + len(answer)) + [0] * pad),
                "labels": torch.tensor([-100] * len(prompt) + answer + [-100] * pad),
            }
        )
    return trained(
        model, folder, data=data, max_steps=2, per_device_train_batch_size=4, learning_rate=0.1, optim="sgd",
        max_grad_norm=0.0, train_sampling_strategy="sequential", lr_scheduler_type="constant",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("smear", {"pool": "prompt", "expert_dropout": 0.0}),
        pytest.param("smear", {"pool": "segment", "segment": 2, "expert_dropout": 0.0}, marks=pytest.mark.slow),
        ("switch", {"balance": 0.1, "z_loss": 0.1}),
    ],
)
def test_it_trains_as_the_trainer_does(method, options, tmp_path):
    one = tuned(tmp_path / "sft", wrapped("llama", method, **options), watched=True)
    two = plain(tmp_path / "plain", wrapped("llama", method, **options))
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    assert apart(weights(one.model), weights(two.model)) < 1e-5
    logged = one.state.log_history[0]
    assert "routing_entropy" in logged
    assert ("loss_balance" in logged) == (method == "switch")


def test_routers_losses_are_told_of_where_nobody_watches(tmp_path):
    with pytest.warns(UserWarning, match="losses of the routers"):
        tuned(tmp_path, wrapped("llama", "switch"))


def test_routers_that_learn_from_the_loss(tmp_path):
    model = wrapped("llama", "reinforce", pool="prompt")
    start = weights(model)
    trainer = tuned(tmp_path, model, watched=True)
    assert {"loss_policy", "loss_value"} <= set(trainer.state.log_history[0])
    changed = {n for n, p in weights(model).items() if not torch.equal(p, start[n])}
    assert any(n.endswith("router.score.weight") for n in changed)


@pytest.mark.slow
def test_its_checkpoints_hold_what_is_trained(tmp_path):
    from safetensors.torch import load_file

    model = wrapped("llama", "switch")
    tuned(tmp_path, model, watched=True, save_strategy="steps", save_steps=2)
    held = set(load_file(tmp_path / "checkpoint-2/model.safetensors"))
    assert held == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(rows("llama")) == 8
