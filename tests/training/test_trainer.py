"""A wrapped model in the Hugging Face Trainer, unchanged: losses, checkpoints, resuming, accumulation, processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import coterie
from matching import relative_error
from zoo import base_model, fine_tune, inputs, outputs, save


def wrapped(arch="bert", method="smear", experts=3, base=None, train="all", **parameters):
    config = coterie.MixtureConfig(method=method, experts=experts, parameters={"rank": 2, **parameters}, seed=1)
    return coterie.wrap(base if base is not None else base_model(arch), config, train)


def rows(arch="bert", count=8):
    """Labelled rows; of a decoder, the first three tokens are the prompt."""
    found = []
    for i in range(count):
        row = {k: v[0] for k, v in inputs(arch, batch=1, seed=i).items()}
        row["labels"] = torch.tensor(i % 3) if arch == "bert" else row["input_ids"].clone()
        if arch != "bert":
            row["labels"][:3] = -100
        found.append(row)
    return found


def arguments(folder, **given):
    usual = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        seed=3,
    )
    return TrainingArguments(**{**usual, **given})


def trained(model, folder, resume=None, data=None, **given):
    data = data if data is not None else rows("bert" if "Bert" in type(model).__name__ else "llama")
    trainer = Trainer(model=model, args=arguments(folder, **given), train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def apart(one, other):
    assert set(one) == set(other)
    return max(float((one[n] - other[n]).abs().max()) for n in one)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_routers_losses_are_in_the_loss(tmp_path):
    """What the Trainer logs is the cross-entropy plus the terms; without their weights it is the cross-entropy."""
    seen = {}
    for name, weight in (("with", 0.5), ("without", 0.0)):
        model = wrapped(method="switch", balance=weight, z_loss=0.0)
        seen[name] = losses(trained(model, tmp_path, max_steps=1))[0]
    terms = model.coterie._context.last_losses
    assert set(terms) == {"balance", "z"}
    # fresh routers are nearly level: the balance loss is near 1 (k = 1) where experts' shares are
    assert seen["with"] - seen["without"] == pytest.approx(0.5, abs=0.25)


def test_only_the_mixture_is_trained(tmp_path):
    base = base_model("bert")
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = wrapped(base=base)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(model, tmp_path)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed
    assert all(".bank." in n or ".router." in n or n.startswith("classifier.") for n in changed)
    assert any(n.startswith("classifier.") for n in changed)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_also_train_names_what_is_trained_besides(tmp_path):
    config = coterie.MixtureConfig(experts=2, parameters={"rank": 2}, also_train=["*LayerNorm*"])
    model = coterie.wrap(base_model("bert"), config)
    also = {n for n, p in model.named_parameters() if p.requires_grad and ".bank." not in n and ".router." not in n}
    assert also
    assert all("LayerNorm" in n for n in also)
    start = weights(model)
    trained(model, tmp_path)
    assert apart({n: start[n] for n in also}, {n: p for n, p in weights(model).items() if n in also}) > 0


@pytest.mark.parametrize("method", ["smear", "st_gumbel"])
def test_a_checkpoint_holds_what_is_trained_and_other_saves_are_complete(method, tmp_path):
    base = base_model("bert")
    save(base, tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    trainer = trained(wrapped(method=method, base=base), tmp_path / "run", save_strategy="steps", save_steps=4)
    model = trainer.model
    held = set(load_file(tmp_path / "run/checkpoint-4/model.safetensors"))
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    wanted |= {n for n, _ in model.named_buffers() if ".router." in n}
    assert held == wanted
    assert any(n.endswith(".select.step") for n in held) == (method == "st_gumbel")

    model.save_pretrained(tmp_path / "explicit")
    trainer.save_model(str(tmp_path / "out"))
    model.eval()
    here = outputs(model, inputs("bert"))
    for folder in ("explicit", "out", "run/checkpoint-4"):
        assert torch.equal(outputs(coterie.load(tmp_path / folder).eval(), inputs("bert")), here), folder
    for folder in ("explicit", "out"):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        assert torch.equal(outputs(again, inputs("bert")), here)
        assert {n: p.requires_grad for n, p in again.named_parameters()}
    with pytest.raises(coterie.CoterieError, match=r"load it with coterie\.load"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/checkpoint-4")


def test_a_checkpoint_whose_base_is_nowhere_is_an_error(tmp_path):
    trained(wrapped(), tmp_path / "run", save_strategy="steps", save_steps=4)  # of a model that was never on disk
    with pytest.raises(coterie.CoterieError, match="base="):
        coterie.load(tmp_path / "run/checkpoint-4")
    save(base_model("bert"), tmp_path / "base")
    assert coterie.load(tmp_path / "run/checkpoint-4", base=str(tmp_path / "base")).coterie.expert_names


def test_a_base_that_was_once_from_the_hub_is_where_it_is(tmp_path, monkeypatch):
    place = save(base_model("bert"), tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(place)
    base.config._commit_hash = "a" * 40
    model = trained(wrapped(base=base), tmp_path / "run", save_strategy="steps", save_steps=4).model.eval()
    halfway = coterie.load(tmp_path / "run/checkpoint-4").eval()
    assert torch.equal(outputs(halfway, inputs("bert")), outputs(model, inputs("bert")))
    monkeypatch.chdir(save(fine_tune(base_model("bert"), 3), tmp_path / "elsewhere"))  # the base of no name is not here
    trained(wrapped(), tmp_path / "nameless", save_strategy="steps", save_steps=4)
    save(base_model("bert"), tmp_path / "right")
    assert coterie.load(tmp_path / "nameless/checkpoint-4", base=str(tmp_path / "right")).coterie.expert_names


def test_a_checkpoint_refuses_another_base(tmp_path):
    place = save(base_model("bert"), tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(place)
    trained(wrapped(base=base), tmp_path / "run", save_strategy="steps", save_steps=4)
    save(fine_tune(base_model("bert"), 3), place)
    with pytest.raises(coterie.CoterieError, match="fingerprints differ"):
        coterie.load(tmp_path / "run/checkpoint-4")


def test_checkpoints_of_a_built_mixture_load_with_it(tmp_path):
    base = base_model("bert")
    built = wrapped(base=base)
    built.save_pretrained(tmp_path / "built")
    again = coterie.wrap(coterie.load(tmp_path / "built"), train="routers")
    model = trained(again, tmp_path / "run", save_strategy="steps", save_steps=4).model.eval()
    held = set(load_file(tmp_path / "run/checkpoint-4/model.safetensors"))
    assert held
    assert all(".router." in n for n in held)
    here = outputs(model, inputs("bert"))
    assert torch.equal(outputs(coterie.load(tmp_path / "run/checkpoint-4").eval(), inputs("bert")), here)


@pytest.mark.parametrize(
    ("arch", "method", "options"),
    [
        ("bert", "smear", {"dropout": 0.2}),
        ("bert", "st_gumbel", {"anneal": 0.5}),
        ("llama", "switch", {"dropout": 0.1}),
    ],
)
def test_a_resumed_run_gives_the_same_weights(arch, method, options, tmp_path, caplog):
    def fresh():
        return wrapped(arch, method, **options)

    whole = trained(fresh(), tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    resumed = trained(fresh(), tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-3"), max_steps=6)
    assert resumed.state.global_step == 6
    assert apart(weights(whole.model), weights(resumed.model)) == 0
    steps = [(n, b) for n, b in whole.model.named_buffers() if n.endswith(".select.step")]
    assert bool(steps) == (method == "st_gumbel")
    for name, buffer in steps:
        assert int(buffer) == int(resumed.model.get_buffer(name)) == 6
    assert "missing keys" not in caplog.text


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = trained(
        wrapped(), tmp_path, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, learning_rate=0.3,
    )  # fmt: skip
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(p, best[n]) for n, p in weights(trainer.model).items())
    scores = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert min(scores, key=scores.__getitem__) == int(trainer.state.best_model_checkpoint.rpartition("-")[2])


@pytest.mark.parametrize("method", ["switch", "st_gumbel"])
def test_gradient_checkpointing_changes_nothing(method, tmp_path):
    runs = [
        trained(wrapped(method=method), tmp_path, max_steps=2, **given)
        for given in ({}, {"activation_checkpointing": {"use_reentrant": False}})
    ]
    assert apart(*(weights(run.model) for run in runs)) < 1e-6


@pytest.mark.parametrize(("arch", "method"), [("bert", "smear"), ("llama", "smear"), ("bert", "switch")])
def test_accumulated_batches_are_one_batch(arch, method, tmp_path):
    """Without the terms that are no means over rows (balance), and without chance."""
    options = {"smear": {"expert_dropout": 0.0}, "switch": {"balance": 0.0, "z_loss": 0.1}}[method]
    if arch == "llama" and method == "smear":
        options["pool"] = "prompt"
    data = rows(arch)
    for i, row in enumerate(data):
        row["task_ids"] = torch.tensor(i % 3)
        if arch == "llama":
            row["labels"][: 3 + i % 3] = -100  # unlike counts of labels
    given = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "data": data}
    one = trained(wrapped(arch, method, **options), tmp_path, per_device_train_batch_size=4, **given)
    four = trained(
        wrapped(arch, method, **options),
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **given,
    )
    assert apart(weights(one.model), weights(four.model)) < 1e-6
    assert losses(one) == pytest.approx(losses(four), rel=1e-5)


def test_bfloat16(tmp_path):
    model = trained(wrapped(method="switch"), tmp_path, bf16=True, max_steps=2).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.eval()
    assert torch.isfinite(outputs(model, inputs("bert"))).all()
    model.save_pretrained(tmp_path / "out")
    assert (
        relative_error(outputs(coterie.load(tmp_path / "out").eval(), inputs("bert")), outputs(model, inputs("bert")))
        < 0.05
    )


def test_label_smoothing_keeps_the_routers_losses(tmp_path):
    """The Trainer takes the labels out of the call: told of; and mended by `watch`, also when batches accumulate."""

    def run(watched, **given):
        model = wrapped(method="switch", balance=0.0, z_loss=0.5)
        usual = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "label_smoothing_factor": 0.1}
        trainer = Trainer(
            model=model, args=arguments(tmp_path, max_steps=2, **{**usual, **given}), train_dataset=rows()
        )
        if watched:
            coterie.watch(trainer)
        trainer.train()
        return trainer

    with pytest.warns(UserWarning, match=r"losses of the routers \(balance, z\) are not part"):
        without = run(False, per_device_train_batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        one = run(True, per_device_train_batch_size=4)
        two = run(True, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert losses(one)[0] - losses(without)[0] == pytest.approx(one.state.log_history[0]["loss_z"], rel=1e-4)
    assert one.state.log_history[0]["loss_z"] > 0.5
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    assert apart(weights(one.model), weights(two.model)) < 1e-6


def test_a_loss_of_ones_own_can_take_the_routers_losses():
    model = wrapped(method="switch", z_loss=1.0)
    batch = inputs("bert")
    model(**batch)
    taken = model.coterie.losses()
    taken.backward()
    assert float(taken.detach()) == pytest.approx(sum(float(t) for t in model.coterie._context.last_losses.values()))
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("router.score.weight"))
    assert float(model.coterie.losses()) == 0  # taken
    with pytest.raises(coterie.CoterieError, match="each example's loss"):
        other = wrapped(method="reinforce")
        other(**batch)
        other.coterie.losses()


LAUNCHED = """
import json, sys, torch
sys.path[:0] = sys.argv[3:]
from test_trainer import arguments, rows, trained, weights, wrapped
out, method = sys.argv[1], sys.argv[2]
options = {"smear": {"expert_dropout": 0.0}, "switch": {"balance": 0.0, "z_loss": 0.1}, "reinforce": {}}[method]
trainer = trained(
    wrapped("bert", method, **options), out, max_steps=2, optim="sgd", max_grad_norm=0.0, learning_rate=0.1,
    ddp_find_unused_parameters=False, data=rows("bert", 16), save_strategy="steps", save_steps=2,
)
if trainer.args.process_index == 0:
    assert trainer.args.world_size == 2
    torch.save(weights(trainer.model), out + "/weights.pt")
"""


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def launched(script, folder, *given, by=TORCHRUN):
    """Run a script in two processes on this machine's CPU."""
    (folder / "script.py").write_text(script)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", *by, str(folder / "script.py"), str(folder), *given, str(here), str(here.parent)],
        capture_output=True, text=True, check=False, timeout=280, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smear", "switch", "reinforce"])
def test_two_processes_agree_with_one(method, tmp_path):
    two = launched(LAUNCHED, tmp_path, method, by=ACCELERATE if method == "smear" else TORCHRUN)
    assert (tmp_path / "checkpoint-2/model.safetensors").is_file()
    if method == "reinforce":  # each process draws its own choices
        return
    options = {"smear": {"expert_dropout": 0.0}, "switch": {"balance": 0.0, "z_loss": 0.1}}[method]
    one = trained(
        wrapped("bert", method, **options), tmp_path / "one", max_steps=2, optim="sgd", max_grad_norm=0.0,
        learning_rate=0.1, data=rows("bert", 16), per_device_train_batch_size=4,
    )  # fmt: skip
    assert apart(two, weights(one.model)) < 1e-6


SHARDED = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from test_trainer import wrapped
from zoo import inputs
dist.init_process_group("gloo")
options = {"smear": {"expert_dropout": 0.0}, "switch": {"balance": 0.0, "z_loss": 0.1}}[sys.argv[2]]
model = wrapped("bert", sys.argv[2], **options)
model.activation_checkpointing_enable({"use_reentrant": False})
mesh = init_device_mesh("cpu", (2,))
for layer in model.bert.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
half = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
batch = {k: v[half] for k, v in inputs("bert", batch=4).items()}
for _ in range(2):
    model(**batch, labels=torch.tensor([0, 1, 2, 0])[half]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
found = {n: p.full_tensor().detach() for n, p in model.named_parameters() if p.requires_grad}
if dist.get_rank() == 0:
    torch.save(found, sys.argv[1] + "/weights.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smear", "switch"])
def test_fully_sharded_processes_agree_with_one(method, tmp_path):
    """FSDP2, two steps on two processes."""
    two = launched(SHARDED, tmp_path, method)
    options = {"smear": {"expert_dropout": 0.0}, "switch": {"balance": 0.0, "z_loss": 0.1}}[method]
    model = wrapped("bert", method, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**inputs("bert", batch=4), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert apart(two, weights(model)) < 1e-6


def test_the_logs_get_what_routers_do(tmp_path):
    """Entropy, load, dead experts and losses, equal to what a trace of the same calls gives; padding does not count."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    data = rows()
    for row in data:
        row["attention_mask"][4:] = 0
    model = wrapped(method="switch", experts=4, top_k=2)
    reporter = Reporter()
    given = arguments(tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer = Trainer(model=model, args=given, train_dataset=data, callbacks=[reporter])
    coterie.watch(trainer)
    with coterie.routing_trace(model) as trace:
        trainer.train()
    logged = next(entry for entry in reporter.seen if "loss" in entry)
    assert logged.items() <= {**trainer.state.log_history[0]}.items()
    entropies, loads = [], []
    for gates in trace.values():
        share = (gates / gates.sum(-1, keepdim=True)).double()
        share = share[:, :4] if share.shape[1] > 1 else share
        share = share.reshape(-1, 4)
        entropies.append(float(-torch.xlogy(share, share).sum(-1).mean()) / math.log(4))
        loads.append(share.mean(0))
    load = torch.stack(loads).mean(0)
    assert logged["routing_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert [logged[f"routing_load/expert {i}"] for i in range(4)] == pytest.approx(load.tolist(), rel=1e-4)
    assert logged["routing_dead"] == pytest.approx(float((torch.stack(loads) < 0.01 / 4).double().mean()))
    assert {"loss_balance", "loss_z"} <= set(logged)
    assert not model.coterie.recorders


def test_the_meter_counts_no_recomputation(tmp_path):
    seen = []
    for given in ({}, {"activation_checkpointing": {"use_reentrant": False}}):
        trainer = Trainer(model=wrapped(), args=arguments(tmp_path, max_steps=1, **given), train_dataset=rows())
        meter = coterie.watch(trainer).meter
        meter.read = dict
        trainer.train()
        seen.append([float(sums[-1]) for sums in meter._sums.values()])
    assert seen[0] == seen[1]
    assert set(seen[0]) == {2.0}  # one decision an example


def test_the_logs_reach_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = Trainer(
        model=wrapped(method="switch"), args=arguments(tmp_path, report_to=["tensorboard"]), train_dataset=rows()
    )
    coterie.watch(trainer)
    trainer.train()
    file = next(tmp_path.rglob("events.out*"))
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    assert {"train/routing_entropy", "train/routing_load/expert 0", "train/loss_balance"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.parametrize("where", ["loss", "router"])
def test_a_lost_loss_stops_the_training(where, tmp_path):
    data = rows(count=8)
    model = wrapped(method="switch")
    given = arguments(tmp_path, train_sampling_strategy="sequential", gradient_accumulation_steps=2, max_steps=8)
    trainer = Trainer(model=model, args=given, train_dataset=data)
    coterie.watch(trainer)
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == 7:  # of the second epoch, the third batch
            output["loss"] = output["loss"] * float("nan")
        return output

    if where == "loss":
        model.register_forward_hook(spoil)
        with pytest.raises(
            coterie.CoterieError, match=r"step 4, batch 2 of epoch 1 \(from 0\): the loss is not finite"
        ):
            trainer.train()
        assert all(torch.isfinite(p).all() for p in model.parameters())
    else:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("router.score.weight")).fill_(float("inf"))
        with pytest.raises(coterie.CoterieError, match=r"step 1, batch 0 of epoch 0.*of the routers: "):
            trainer.train()


def test_watch_wants_a_mixture(tmp_path):
    with pytest.raises(coterie.CoterieError, match="no mixture"):
        coterie.watch(Trainer(model=base_model("bert"), args=arguments(tmp_path)))


def test_a_configuration_file_says_what_a_checkpoint_is(tmp_path):
    """A checkpoint is light: its configuration names the base and never passes for a whole model's."""
    trained(wrapped(), tmp_path, save_strategy="steps", save_steps=4)
    config = json.loads((tmp_path / "checkpoint-4/config.json").read_text())
    assert config["quantization_config"]["base"] is not None
