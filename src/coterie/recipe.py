"""The recipe: the YAML that names a build, validated before anything is read."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import CoterieError

if TYPE_CHECKING:
    from typing_extensions import Self

Policy = Literal["base", "average", "per_expert"]
DTYPES = ("float32", "bfloat16", "float16")


def nearest(word: str, known: list[str]) -> str:
    """A hint: the known word closest to `word`, or all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def nearby(path: Path, kind: Callable[[Path], bool]) -> str | None:
    """A hint for a path that does not exist: what of that kind lies where its first missing part should be."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = [each.name for each in missing.parent.iterdir() if kind(each)]
    except OSError:
        return None
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f"did you mean {str(missing.with_name(close[0]))!r}?" if close else None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Expert(_Strict):
    """Where an expert is read from, and by how much its delta is scaled (never its score).

    Attributes:
        statistics: a safetensors file of what its router is made of, for methods that need that (phatgoose); default:
            what lies beside an expert of a library.
    """

    source: str = Field(min_length=1)
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    statistics: str | None = None


class Modules(_Strict):
    """Globs on module paths that choose the linear layers that become mixture layers."""

    include: list[str] = ["*"]
    exclude: list[str] = []


class _Named(_Strict):
    """What every recipe has: experts under names."""

    experts: Any

    @field_validator("experts", mode="before", check_fields=False)
    @classmethod
    def _sources(cls, experts: Any) -> Any:
        if isinstance(experts, dict):
            return {n: {"source": str(e)} if isinstance(e, (str, Path)) else e for n, e in experts.items()}
        return experts

    @field_validator("base", mode="before", check_fields=False)
    @classmethod
    def _path(cls, base: Any) -> Any:
        return str(base) if isinstance(base, Path) else base

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name in self.experts:
            if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
                raise ValueError(f"expert name {name!r} is empty or holds control characters")
        return self

    @property
    def names(self) -> list[str]:
        """The experts' names in order."""
        return list(self.experts)


class Recipe(_Named):
    """A build: which method, which base model, which experts.

    Attributes:
        method: a name that `coterie methods` lists.
        base: directory or Hub id (`id@revision`) of the base model.
        experts: name -> source (directory or Hub id; a full fine-tune or a PEFT adapter), or `{source, weight,
            statistics}`.
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


class Case(_Strict):
    """A value for the tensors whose names match a glob."""

    filter: str = "*"
    value: Any


class MergeExpert(_Strict):
    """Where an expert of a merge is read from.

    Attributes:
        source: directory or Hub id of a full fine-tune or a PEFT adapter.
        weight: factor on its delta, or a list of `{filter, value}`, of which the first to match a tensor's name holds.
        statistics: a safetensors file that `coterie statistics` made, for the methods that need one.
    """

    source: str = Field(min_length=1)
    weight: Annotated[float, Field(allow_inf_nan=False)] | list[Case] = 1.0
    statistics: str | None = None

    @field_validator("weight")
    @classmethod
    def _numbers(cls, weight: float | list[Case]) -> float | list[Case]:
        for case in weight if isinstance(weight, list) else []:
            if isinstance(case.value, bool) or not isinstance(case.value, (int, float)) or not isfinite(case.value):
                raise ValueError(f"{case.value!r} is no number")
        return weight


class MergeRecipe(_Named):
    """A merge: which method, which experts, on which base model.

    Attributes:
        method: a merge that `coterie methods` lists.
        base: directory or Hub id (`id@revision`) of the base model; None where the method needs none.
        experts: name -> source, or `{source, weight, statistics}`.
        parameters: the method's parameters; each a value, or a list of `{filter: GLOB on tensor names, value}`.
        modules: globs on module paths: the linear layers on which a method for matrices acts.
        others: the merge for what the method does not act on; or `{glob: merge}` on tensor names, before the method.
        head: the expert whose task head (and labels) the result takes.
        norm_budget: the most that a tensor may move: |merged - base| over the mean of the experts' |delta|.
        seed: of the methods that draw random numbers.
        vocabulary: where tokenizers differ: `error`, the `base`'s tokens, or the `union` of all.
        architecture, dtype: as in a build.
    """

    method: str
    base: Annotated[str, Field(min_length=1)] | None = None
    experts: dict[str, MergeExpert] = Field(min_length=1)
    parameters: dict[str, Any] = {}
    modules: Modules = Modules()
    others: str | dict[str, str] | None = None
    head: str | None = None
    norm_budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    architecture: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vocabulary: Literal["error", "base", "union"] = "error"

    @model_validator(mode="after")
    def _head(self) -> Self:
        if self.head is not None and self.head not in self.experts:
            raise ValueError(f"head is {self.head!r}, which is no expert ({nearest(self.head, self.names)})")
        return self


_AnyRecipe = TypeVar("_AnyRecipe", Recipe, MergeRecipe)


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


def _explain(error: ValidationError, where: str, kind: type[_AnyRecipe]) -> CoterieError:
    first = error.errors()[0]
    # Beside keys, pydantic names the branches of a union: `literal[...]`, `function-after[...]`, `float`.
    path = ".".join(str(p) for p in first["loc"] if not re.search(r"\[|^(float|str|dict|constrained-\w+)$", str(p)))
    help_ = f"see `coterie {'build' if kind is Recipe else 'merge'} --help` for the recipe's keys"
    if first["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {
            "modules": Modules,
            "experts": Expert if kind is Recipe else MergeExpert,
        }
        model = models.get(str(first["loc"][0]), kind) if len(first["loc"]) > 1 else kind
        key = str(first["loc"][-1])
        of_merges = model is Recipe and key in MergeRecipe.model_fields
        hint = "only merges have it (`coterie merge`)" if of_merges else nearest(key, list(model.model_fields))
        return CoterieError(f"unknown key {key!r}", where, hint)
    if first["type"] == "missing":
        return CoterieError(f"{path} is missing", where, help_)
    if first["type"] == "too_short" and path == "experts":
        return CoterieError("the list of experts is empty", where, help_)
    if first["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return CoterieError(f"{path} is {first['input']!r}", where, nearest(str(first["input"]), known))
    if first["msg"].startswith("Input should be "):
        wanted = re.sub(r" or instance of \w+", "", first["msg"]).replace("Input should be", "it must be")
        return CoterieError(f"{path} is {first['input']!r}", where, wanted)
    message = first["msg"].removeprefix("Value error, ")
    return CoterieError(f"{path}: {message}" if path else message, where, help_)


def read_recipe(recipe: str | Path | dict[str, Any] | Recipe) -> Recipe:
    """Read and validate the recipe of a build.

    Args:
        recipe: path of a YAML file, or its content as a dict, or a `Recipe`.

    Raises:
        CoterieError: the file cannot be read, is not YAML, or a key is unknown, missing or of the wrong kind.
    """
    return _read(recipe, Recipe)


def read_merge_recipe(recipe: str | Path | dict[str, Any] | MergeRecipe) -> MergeRecipe:
    """Read and validate the recipe of a merge; arguments and errors as those of `read_recipe`."""
    return _read(recipe, MergeRecipe)


def read_yaml(file: str | Path) -> Any:
    """What a YAML file holds; no key may occur twice.

    Raises:
        CoterieError: it cannot be read, or is not YAML.
    """
    where = str(file)
    if Path(file).is_dir():
        raise CoterieError("is a directory", where, "give a recipe, a YAML file")
    if not Path(file).is_file():
        raise CoterieError("no such file", where, nearby(Path(file), Path.is_file) or "give the path of a recipe")
    try:
        return yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, CoterieError):
            raise CoterieError(error.what, f"{where}, {error.where}", error.mend) from None
        reason = " ".join(str(error).split())
        raise CoterieError(f"cannot be read as YAML ({reason})", where, "see examples/ for recipes") from None


def _is_merge(method: Any) -> bool:
    from .merging.registry import known as merges
    from .methods import known as mixtures

    return method not in [each.name for each in mixtures()] and method in [each.name for each in merges()]


def _read(recipe: str | Path | dict[str, Any] | _AnyRecipe, kind: type[_AnyRecipe]) -> _AnyRecipe:
    if isinstance(recipe, kind):
        return recipe
    where = "recipe"
    if isinstance(recipe, (str, Path)):
        where, recipe = str(recipe), read_yaml(recipe)
    if not isinstance(recipe, dict):
        raise CoterieError("is not a mapping of keys to values", where, "see examples/ for recipes")
    if "method" not in recipe and recipe.keys() & {"merge_method", "models", "slices"}:
        raise CoterieError("is a configuration of mergekit's", where, "give it as `coterie merge --mergekit FILE`")
    if kind is Recipe and _is_merge(recipe.get("method")):
        raise CoterieError(f"{recipe['method']!r} is a merge, not a mixture", where, "run `coterie merge`")
    try:
        return kind.model_validate(recipe)
    except ValidationError as error:
        raise _explain(error, where, kind) from None
