"""The recipe of a training: the YAML that `coterie train` reads, validated before anything is loaded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import CoterieError
from ..recipe import Expert, Modules, nearest, read_yaml

Task = Literal["text-classification", "token-classification", "causal-lm", "seq2seq", "image-classification"]
# Of TrainingArguments: what the recipe or the command says.
TAKEN = {
    "output_dir": "it is -o DIR",
    "seed": "it is the recipe's key `seed`",
    "resume_from_checkpoint": "it is --resume",
    "do_train": "training is what this does",
    "do_eval": "give `data: {validation: FILE}`",
    "do_predict": "use `coterie eval`",
    "label_names": "the task says them",
    "remove_unused_columns": "the data holds what the model takes",
    "push_to_hub": "push the directory that comes out: `hf upload`",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Data(_Strict):
    """Files and columns.

    Attributes:
        train, validation: a CSV, JSONL or Parquet file, or task -> file; paths are relative to the working directory.
        input: the column that is read: a text, a list of tokens (token-classification), an image's path; of texts also
            a list of columns, joined by a line break.
        target: the column that is wanted: a class, a list of tags, a text. A language model may have none; where it has
            one, only that is in the loss, and `input` is its prompt.
        task: the column that names a row's task; its numbers are the routers' `task_ids`.
        labels: value in the data -> the class's name, in order; or the classes. Default: those in `train`, sorted.
        max_tokens: longer inputs are cut; targets as well.
    """

    train: str | dict[str, str]
    validation: str | dict[str, str] | None = None
    input: str | list[str] = "text"
    target: str | None = None
    task: str | None = None
    labels: list[str] | dict[str | int | bool, str] | None = None
    max_tokens: int = Field(default=128, ge=1)


class TrainRecipe(_Strict):
    """A training: what is trained, and on what.

    Attributes:
        task: what the model does; chooses transformers' class.
        base: directory or Hub id of a model; or of a mixture, which is trained further.
        data: files and columns.
        method: a name that `coterie methods` lists; None for a mixture as base.
        experts: how many; or their names; or name -> source, with a trained method PEFT adapters to start from, with a
            built one what a mixture is first built from.
        parameters: the method's parameters.
        modules: globs on module paths, as in a build.
        also_train: globs on names of parameters of the base that are trained as well. Default: the task head.
        train: which part learns.
        training: keys of transformers' TrainingArguments.
        seed: of fresh parameters, dropout and the order of the data.
    """

    task: Task
    base: str = Field(min_length=1)
    data: Data
    method: str | None = None
    experts: int | list[str] | dict[str, Expert] = 8
    parameters: dict[str, Any] = {}
    modules: Modules = Modules()
    also_train: list[str] | None = None
    train: Literal["all", "experts", "routers"] = "all"
    training: dict[str, Any] = {}
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("experts", mode="before")
    @classmethod
    def _sources(cls, experts: Any) -> Any:
        if isinstance(experts, dict):
            return {n: {"source": str(e)} if isinstance(e, (str, Path)) else e for n, e in experts.items()}
        return experts


def read_train_recipe(recipe: str | Path | dict[str, Any] | TrainRecipe) -> TrainRecipe:
    """Read and validate the recipe of a training.

    Args:
        recipe: path of a YAML file, or its content as a dict, or a `TrainRecipe`.

    Raises:
        CoterieError: the file cannot be read, or a key is unknown (names the nearest), missing or of the wrong kind.
    """
    if isinstance(recipe, TrainRecipe):
        return recipe
    where = str(recipe) if isinstance(recipe, (str, Path)) else "recipe"
    content = read_yaml(recipe) if isinstance(recipe, (str, Path)) else recipe
    if not isinstance(content, dict):
        raise CoterieError("is not a mapping of keys to values", where, "see examples/ for recipes")
    try:
        given = TrainRecipe.model_validate(content)
    except ValidationError as error:
        raise _explained(error, where) from None
    from transformers import TrainingArguments

    known = [field.name for field in fields(TrainingArguments) if field.init and field.name not in TAKEN]
    for key in given.training:
        if key not in known:
            raise CoterieError(f"unknown key 'training.{key}'", where, TAKEN.get(key) or nearest(key, known))
    needs = given.task not in ("causal-lm",)
    if needs and given.data.target is None:
        raise CoterieError(f"data.target is missing: {given.task} needs a column of what is wanted", where, "add it")
    return given


def _explained(error: ValidationError, where: str) -> CoterieError:
    """The first thing that is wrong, in one sentence."""
    first = error.errors()[0]
    # Beside keys, pydantic names the branches of a union (`int`, `list[str]`, `dict[str,Expert]`).
    path = [str(part) for part in first["loc"] if str(part) not in ("int", "str") and "[" not in str(part)]
    place = ".".join(path)
    if first["type"] == "extra_forbidden":
        nested: dict[str, type[BaseModel]] = {"data": Data, "modules": Modules, "experts": Expert}
        model = nested.get(path[0], TrainRecipe) if len(path) > 1 else TrainRecipe
        return CoterieError(f"unknown key {place!r}", where, nearest(path[-1], list(model.model_fields)))
    if first["type"] == "missing":
        return CoterieError(f"{place} is missing", where, "see `coterie train --help` for the recipe's keys")
    if first["msg"].startswith("Input should be "):
        wanted = first["msg"].replace("Input should be", "it must be")
        return CoterieError(f"{place} is {first['input']!r}", where, wanted)
    return CoterieError(f"{place}: {first['msg']}", where, "see `coterie train --help` for the recipe's keys")
