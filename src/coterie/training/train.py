"""`coterie train`: from a recipe to a trained mixture's directory, resumably."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..building.directory import whole_directory
from ..building.finish import versions
from ..building.journal import JOURNAL
from ..errors import CoterieError
from ..methods import get
from ..mixture.load import load
from ..sources.locate import Location, locate
from .data import IGNORED, Rows, Split, encode, read_rows
from .finish import TrainReport, is_mixture, plain, write
from .log import Meter, watch
from .recipe import TrainRecipe, read_train_recipe
from .wrap import MixtureConfig, wrap

AUTOS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
# What TrainingArguments default to for training all of a model suits no low-rank expert.
USUAL = {
    "learning_rate": 5e-4, "save_strategy": "epoch", "logging_steps": 10, "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}  # fmt: skip


class _Interrupted(BaseException):
    """Carries an error past `whole_directory`, which leaves the checkpoints of what is interrupted."""

    def __init__(self, error: CoterieError):
        self.error = error


def train(
    recipe: str | Path | dict[str, Any] | TrainRecipe,
    out: str | Path,
    resume: bool = False,
    force: bool = False,
    token: str | None = None,
    quiet: bool = False,
) -> TrainReport:
    """Train a mixture.

    A run that is interrupted leaves its checkpoints in a hidden folder beside `out`, from the last of which another
    goes on with `resume`, to the same weights; without it they are removed.

    Args:
        recipe: path of a YAML file, its content, or a `TrainRecipe`.
        out: the directory to make; it appears only when it is complete.
        resume: go on with what an interrupted run of the same recipe, data and versions left, if it left any.
        force: replace an existing directory.
        token: Hub token.
        quiet: show no progress.

    Raises:
        CoterieError: bad input, before training; or a loss that is not finite.
    """
    given = read_train_recipe(recipe)
    out = Path(out)
    if out.exists() and not force:
        raise CoterieError("exists already", str(out), "choose another directory, or replace it with --force")
    rows = read_rows(given)
    base = locate(given.base, token)
    _check(given, rows, base)
    identity = plain({"recipe": given.model_dump(mode="json"), "data": rows.files, "versions": versions()})
    try:
        with whole_directory(out, force, sources=[base.path], identity=identity, resume=resume) as folder:
            journal = folder / JOURNAL
            if not journal.exists():
                if resume:
                    warnings.warn(f"nothing is left of a run for {out}: it starts anew", stacklevel=2)
                journal.write_text(json.dumps(identity) + "\n", encoding="utf-8")
            try:
                return _run(given, rows, base, folder, out, token, quiet)
            except CoterieError as error:
                raise _Interrupted(error) from None
    except _Interrupted as interrupted:
        raise interrupted.error from None


def _run(
    given: TrainRecipe, rows: Rows, base: Location, folder: Path, out: Path, token: str | None, quiet: bool
) -> TrainReport:
    from transformers import Trainer, set_seed

    class Unshaken(Trainer):
        """Validation draws nothing from the training's generators: a run resumed at an epoch's end has not seen it."""

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            with torch.random.fork_rng():
                return super().evaluate(*args, **kwargs)

    set_seed(given.seed)
    processor = _processor(given, base)
    data = {"train": encode(given, rows.train, processor)}
    if rows.validation is not None:
        data["validation"] = encode(given, rows.validation, processor)
    _check_labels(given, data)
    model = _model(given, rows, base, folder, token)
    cached = model.config.use_cache if hasattr(model.config, "use_cache") else None
    run = folder / "run"
    arguments = _arguments(given, run, rows.validation is not None, quiet)
    trainer = Unshaken(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        data_collator=_collator(given, processor, model),
        processing_class=processor,
        compute_metrics=None if given.task in ("causal-lm", "seq2seq") else _accuracy,
        preprocess_logits_for_metrics=_classes_of,
    )
    watch(trainer)
    trainer.add_callback(_noting(folder))
    last = max(
        (p for p in run.glob("checkpoint-*") if (p / "trainer_state.json").is_file()),  # written last
        key=lambda p: int(p.name.rpartition("-")[2]),
        default=None,
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    metrics, load = _evaluate(trainer, rows, data)
    if cached is not None:
        model.config.use_cache = cached
    report = TrainReport(
        str(out),
        trainer.state.global_step,
        metrics,
        load,
        model.coterie.expert_names,
        {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "all": sum(p.numel() for p in model.parameters()),
        },
    )
    write(given, rows, base, model, processor, report, folder)
    return report


def _check(given: TrainRecipe, rows: Rows, base: Location) -> None:
    """What can be told before a model is loaded.

    Raises:
        CoterieError: it is wrong.
    """
    mixture, chosen = is_mixture(base), given.model_fields_set
    for key in ("experts", "modules"):
        if mixture and key in chosen:
            raise CoterieError(f"the base is a mixture, which has its {key}", key, "leave the key out")
    if mixture and given.method is None and "parameters" in chosen:
        raise CoterieError("the base is a mixture, which has its parameters", "parameters", "name a method as well")
    if "also_train" in chosen and (given.method is None or not get(given.method).trained):
        raise CoterieError(
            "a mixture that is trained as it is has nothing beside its experts, routers and heads",
            "also_train",
            "leave the key out, or give the mixture the fresh routers of a trained method",
        )
    if mixture and given.method is None:
        return
    if given.method is None:
        raise CoterieError("method is missing", "recipe", "`coterie methods` lists them")
    method = get(given.method)
    if not method.trained and (mixture or not isinstance(given.experts, dict)):
        raise CoterieError(
            f"{given.method} is built from experts", "experts", "name their sources: experts: {NAME: PATH_OR_HUB_ID}"
        )
    if not method.trained:
        return
    parameters = method.parameters(given.parameters, _number(given))
    routing = method.assemble(**parameters).routing
    if routing.pool == "task" and routing.score in ("task", "skills") and not rows.tasks:
        raise CoterieError(
            f"{given.method} goes by each row's task, and the data names none",
            "data",
            "add task: COLUMN, or give a file for each task: train: {TASK: FILE}",
        )
    many = parameters.get("tasks", _number(given)) if routing.pool == "task" else len(rows.tasks)
    many = len(parameters["share"]) if parameters.get("share") else many
    if len(rows.tasks) > many:
        raise CoterieError(
            f"the data has {len(rows.tasks)} tasks, and {given.method} routes {many}",
            "experts" if "tasks" not in parameters else "parameters.tasks",
            f"set {len(rows.tasks)}",
        )
    if given.task == "causal-lm" and routing.pool == "prompt" and given.data.target is None:
        raise CoterieError(
            "its routers decide by the prompt, and the data has but whole texts",
            "data.target",
            "name the column of the continuation, with the prompt as input; or set parameters: {pool: segment}",
        )


def _number(given: TrainRecipe) -> int:
    return given.experts if isinstance(given.experts, int) else len(given.experts)


def _check_labels(given: TrainRecipe, data: Mapping[str, Any]) -> None:
    """Rows of which nothing is left in the loss.

    Raises:
        CoterieError: there are some.
    """
    if given.task not in ("causal-lm", "token-classification"):
        return
    for which, table in data.items():
        for i, labels in enumerate(table["labels"]):
            if all(label == IGNORED for label in labels[1 if given.task == "causal-lm" else 0 :]):
                raise CoterieError(
                    f"row {i + 1} has nothing left that is learned once it is cut to {given.data.max_tokens} tokens",
                    f"data.{which}",
                    "raise data.max_tokens, or leave the row out",
                )


def _processor(given: TrainRecipe, base: Location) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    try:
        if given.task == "image-classification":
            return AutoImageProcessor.from_pretrained(base.path)
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CoterieError(
            f"has no tokenizer or processor that loads ({reason})", given.base, "add its files"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(given: TrainRecipe, rows: Rows, base: Location, folder: Path, token: str | None) -> Any:
    import transformers

    auto = getattr(transformers, AUTOS[given.task])
    if is_mixture(base):
        return _further(given, rows, load(str(base.path), dtype=torch.float32), auto)
    method, sources = get(str(given.method)), given.experts
    if not method.trained:
        from ..building.build import build

        built = folder / "built"
        if not built.exists():
            keys = ("method", "base", "experts", "parameters", "modules")
            build({k: v for k, v in given.model_dump(exclude_unset=True).items() if k in keys}, built, token=token)
        return _further(given, rows, load(str(built), dtype=torch.float32), auto)
    if "config.json" not in {file.name for file in base.path.iterdir()}:
        raise CoterieError("has no config.json", given.base, "give a model's directory or Hub id")
    labels = {
        "id2label": dict(enumerate(rows.labels)),
        "label2id": {name: i for i, name in enumerate(rows.labels)},
    }
    try:
        model = auto.from_pretrained(
            base.path, dtype=torch.float32, ignore_mismatched_sizes=True, **(labels if rows.labels else {})
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CoterieError(f"cannot be loaded for {given.task} ({reason})", given.base, "check task and base") from None
    config = MixtureConfig(
        method=given.method,
        experts={n: e.source for n, e in sources.items()} if isinstance(sources, dict) else sources,
        parameters=given.parameters,
        modules=given.modules,
        also_train=given.also_train,
        seed=given.seed,
    )
    return wrap(model, config, given.train)


def _further(given: TrainRecipe, rows: Rows, mixture: Any, auto: Any) -> Any:
    """A mixture to train further; its head must fit the data.

    Raises:
        CoterieError: it is of another task, or has other classes.
    """
    if type(mixture) not in auto._model_mapping.values():
        raise CoterieError(f"is a {type(mixture).__name__}", given.base, f"{given.task} needs another class")
    names = [mixture.config.id2label[i] for i in range(mixture.config.num_labels)] if rows.labels else []
    default = [f"LABEL_{i}" for i in range(len(names))]
    if rows.labels and (len(names) != len(rows.labels) or names not in (rows.labels, default)):
        raise CoterieError(
            f"the mixture's classes are {', '.join(names)}, and the data's {', '.join(rows.labels)}",
            "data.labels",
            "give the value of each class in this order: labels: {VALUE: CLASS}",
        )
    if given.method is None or not get(given.method).trained:
        return wrap(mixture, train=given.train)
    routers = MixtureConfig(  # fresh ones
        method=given.method, parameters=given.parameters, also_train=given.also_train, seed=given.seed
    )
    return wrap(mixture, routers, given.train)


def _arguments(given: TrainRecipe, run: Path, validates: bool, quiet: bool) -> Any:
    from transformers import TrainingArguments

    chosen = {**USUAL, "eval_strategy": "epoch" if validates else "no", "disable_tqdm": quiet, **given.training}
    try:
        return TrainingArguments(
            output_dir=str(run), seed=given.seed, data_seed=given.seed, remove_unused_columns=False, **chosen
        )
    except (TypeError, ValueError, ImportError) as error:
        raise CoterieError(" ".join(str(error).split())[:300], "training", "mend the key") from None


def _collator(given: TrainRecipe, processor: Any, model: Any) -> Any:
    import transformers as tf

    if given.task == "image-classification":
        return tf.default_data_collator
    if given.task == "text-classification":
        return tf.DataCollatorWithPadding(processor)
    if given.task == "token-classification":
        return tf.DataCollatorForTokenClassification(processor)
    return tf.DataCollatorForSeq2Seq(processor, model=model if given.task == "seq2seq" else None)


def _noting(folder: Path) -> Any:
    """A callback that writes each whole checkpoint into the folder's journal, for which it is kept."""
    from transformers import TrainerCallback

    class Noting(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                with (folder / JOURNAL).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step}) + "\n")

    return Noting()


def _classes_of(logits: Any, labels: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _accuracy(found: Any) -> dict[str, float]:
    counted = found.label_ids != IGNORED
    return {"accuracy": float((found.predictions == found.label_ids)[counted].mean())}


def _evaluate(trainer: Any, rows: Rows, data: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and routing, of all rows and of each task's; of the training's rows (at most 512) routing alone."""
    which = "validation" if "validation" in data else "train"
    split: Split = rows.validation if rows.validation is not None else rows.train
    table = data[which] if which == "validation" else data[which].select(range(min(512, len(data[which]))))
    parts = {"all": list(range(len(table)))}
    if len(rows.tasks) > 1:
        for number, name in enumerate(rows.tasks):
            parts[name] = [i for i in range(len(table)) if split.tasks[i] == number]
    meter = Meter(trainer.model, training=False)
    metrics: dict[str, float] = {}
    load: dict[str, list[float]] = {}
    meter.start()
    try:
        for name, chosen in parts.items():
            if not chosen:
                continue
            found = trainer.evaluate(table.select(chosen), metric_key_prefix="eval")
            routed = meter.read()
            load[name] = [routed.get(f"routing_load/{e}", 0.0) for e in trainer.model.coterie.expert_names]
            kept = {k.removeprefix("eval_"): float(v) for k, v in found.items() if k in ("eval_loss", "eval_accuracy")}
            if not trainer.compute_metrics:
                kept["perplexity"] = math.exp(min(kept["loss"], 700.0))
            if which == "validation":
                metrics |= kept if name == "all" else {f"{name}/{k}": v for k, v in kept.items()}
    finally:
        meter.stop()
    return metrics, load
