"""The recipe: the YAML that names a build, validated before anything is read."""

from __future__ import annotations

import difflib
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import CoterieError

Policy = Literal["base", "average", "per_expert"]
DTYPES = ("float32", "bfloat16", "float16")


def nearest(word: str, known: list[str]) -> str:
    """A hint: the known word closest to `word`, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Expert(_Strict):
    """Where an expert is read from, and by how much its delta is scaled (never its score)."""

    source: str = Field(min_length=1)
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0


class Modules(_Strict):
    """Globs on module paths that choose the linear layers that become mixture layers."""

    include: list[str] = ["*"]
    exclude: list[str] = []


class Recipe(_Strict):
    """A build: which method, which base model, which experts.

    Attributes:
        method: a name that `coterie methods` lists.
        base: directory or Hub id (`id@revision`) of the base model.
        experts: name -> source (directory or Hub id; a full fine-tune or a PEFT adapter), or `{source, weight}`.
        parameters: the method's parameters.
        modules: globs on module paths. Output heads become mixture layers only where a glob names them.
        others: what everything that is not a mixture layer follows, or `{glob: policy}` on tensor names.
        architecture: transformers class of the result; default: the class that the sources share.
        dtype: floating dtype of what is written; default: the base's.
        vocabulary: `base` keeps the base's embedding rows where an expert's vocabulary differs; `error` refuses.
    """

    method: str
    base: str = Field(min_length=1)
    experts: dict[str, Expert] = Field(min_length=1)
    parameters: dict[str, Any] = {}
    modules: Modules = Modules()
    others: Policy | dict[str, Policy] = "base"
    architecture: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vocabulary: Literal["error", "base"] = "error"

    @field_validator("experts", mode="before")
    @classmethod
    def _sources(cls, experts: Any) -> Any:
        if isinstance(experts, dict):
            return {n: {"source": str(e)} if isinstance(e, (str, Path)) else e for n, e in experts.items()}
        return experts

    @field_validator("base", mode="before")
    @classmethod
    def _path(cls, base: Any) -> Any:
        return str(base) if isinstance(base, Path) else base

    @model_validator(mode="after")
    def _names(self) -> Recipe:
        for name in self.experts:
            if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
                raise ValueError(f"expert name {name!r} is empty or holds control characters")
        return self

    @property
    def names(self) -> list[str]:
        """The experts' names in order."""
        return list(self.experts)


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; a recipe must not lose an expert that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise CoterieError(
                    f"key {key!r} is not text", f"line {key_node.start_mark.line + 1}", "put it in quotes"
                )
            if key in seen:
                raise CoterieError(
                    f"{key!r} occurs twice", f"line {key_node.start_mark.line + 1}", "rename one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(error: ValidationError, where: str) -> CoterieError:
    first = error.errors()[0]
    path = ".".join(str(p) for p in first["loc"] if p != "function-after[_names(), Recipe]")
    if first["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"modules": Modules, "experts": Expert}
        model = models.get(str(first["loc"][0]), Recipe) if len(first["loc"]) > 1 else Recipe
        hint = nearest(str(first["loc"][-1]), list(model.model_fields))
        return CoterieError(f"unknown key {str(first['loc'][-1])!r}", where, hint)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "too_short" and path == "experts":
        message = "the list of experts is empty"
    return CoterieError(f"{path or 'recipe'}: {message}", where, "see `coterie build --help` for the recipe's keys")


def read_recipe(recipe: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """Read and validate a recipe.

    Args:
        recipe: path of a YAML file, or its content as a dict, or a `Recipe`.

    Raises:
        CoterieError: the file cannot be read, is not YAML, or a key is unknown, missing or of the wrong kind.
    """
    if isinstance(recipe, Recipe):
        return recipe
    where = "recipe"
    if isinstance(recipe, (str, Path)):
        where = str(recipe)
        if not Path(recipe).is_file():
            raise CoterieError("no such file", where, "give the path of a recipe")
        try:
            recipe = yaml.load(Path(recipe).read_text(encoding="utf-8"), Loader=_UniqueKeys)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
            if isinstance(error, CoterieError):
                raise CoterieError(error.what, f"{where}, {error.where}", error.mend) from None
            reason = " ".join(str(error).split())
            raise CoterieError(f"cannot be read as YAML ({reason})", where, "see examples/ for recipes") from None
    if not isinstance(recipe, dict):
        raise CoterieError("is not a mapping of keys to values", where, "see examples/ for recipes")
    try:
        return Recipe.model_validate(recipe)
    except ValidationError as error:
        raise _explain(error, where) from None
