"""A mixture to train: experts and routers put into a model that stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ..errors import CoterieError
from ..experts.bank import activation
from ..experts.fresh import Fresh
from ..methods.registry import Mixture, get
from ..mixture.handle import attach
from ..mixture.layer import is_mixture, widths
from ..mixture.probe import probe
from ..mixture.sites import choose_sites, outside_base
from ..mixture.spec import MixtureSpec, insert, reroute
from ..recipe import Modules, nearest
from .adapters import read_adapters, start, suited
from .checkpoints import SavePretrained, forgive

# Where bottleneck adapters stand unless globs say otherwise: behind what ends a sub-layer, under its usual names.
SUBLAYER_ENDS = (
    "*attention.output.dense",
    "*.output.dense",
    "*attention.out_proj",
    "*self_attn.out_proj",
    "*encoder_attn.out_proj",
    "*.o_proj",
    "*.down_proj",
    "*.fc2",
    "*.out_lin",
    "*.lin2",
    "*attn.c_proj",
    "*mlp.c_proj",
    "*SelfAttention.o",
    "*EncDecAttention.o",
    "*DenseReluDense.wo",
)


class MixtureConfig(BaseModel):
    """What to put into a model.

    Attributes:
        method: a trained method that `coterie methods` lists; or an assembly of the axes themselves.
        experts: how many; or their names; or name -> PEFT LoRA adapter (directory or Hub id) that the expert starts
            from: `rank` is then the largest of theirs by default, `modules` the layers that any of them adapts.
        parameters: the method's parameters.
        modules: globs on module paths: the linear layers that get experts. Default: all that a forward pass calls (but
            output heads); of bottleneck adapters, those that end a sub-layer.
        also_train: globs on names of the base's parameters that are trained too, beside experts and routers; None: the
            task head, what a model holds outside of its base model (as PEFT's `modules_to_save` for its task types); of
            a mixture of which not all is trained, only a head that it keeps per expert.
        seed: of the fresh parameters.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    method: str | Mixture = "smear"
    experts: int | list[str] | dict[str, str] = Field(default=8)
    parameters: dict[str, Any] = {}
    modules: Modules = Modules()
    also_train: list[str] | None = None
    seed: int = Field(default=0, ge=0)

    def __init__(self, **keys: Any):
        try:
            super().__init__(**keys)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
                known = [*type(self).model_fields]
                raise CoterieError(f"unknown key {where!r}", "MixtureConfig", nearest(where, known)) from None
            raise CoterieError(f"{where}: {first['msg']}", "MixtureConfig", "see its attributes") from None

    @property
    def names(self) -> list[str]:
        """The experts' names.

        Raises:
            CoterieError: there are none, or two bear one name.
        """
        names = [f"expert {i}" for i in range(self.experts)] if isinstance(self.experts, int) else list(self.experts)
        if not names or len(set(names)) != len(names):
            raise CoterieError(
                f"experts is {self.experts!r}", "MixtureConfig", "give a number above 0, or unlike names"
            )
        return names

    def assemble(self) -> tuple[str, dict[str, Any], Mixture]:
        """The method's name, its parameters and its assembly.

        Raises:
            CoterieError: no such method, one that is built and not trained, or a parameter out of range.
        """
        if isinstance(self.method, Mixture):
            routing = self.method.routing
            if routing.combine != "slots" and routing.k > len(self.names):
                raise CoterieError(
                    f"top_k is {routing.k} and there are {len(self.names)} experts", "method", "lower top_k"
                )
            return "custom", {}, self.method
        method = get(self.method)
        parameters = method.parameters(self.parameters, len(self.names))
        if not method.trained:
            raise CoterieError(
                f"{self.method} is built from experts and not trained",
                "method",
                "make it with coterie.build; a built mixture can be wrapped: coterie.wrap(mixture)",
            )
        return self.method, parameters, method.assemble(**parameters)


Part = Literal["all", "experts", "routers"]


def wrap(model: Any, config: MixtureConfig | None = None, train: Part = "all") -> Any:
    """A mixture to train, as an ordinary transformers model: for the Trainer, TRL, or a loop of one's own.

    Args:
        model: a model, which stays as it is: the mixture's frozen parameters share its memory. Or a mixture (built, or
            loaded), whose routers and experts are to be trained further.
        config: what to put into a model. For a mixture, None trains it as it is (routers that read the experts' own
            rows get rows of their own, if only one of the two is trained); a config puts its method's routers in place
            of the mixture's, and leaves its experts, and the layers that have them, as they are.
        train: which part learns: experts, routers, or all.

    Returns:
        The mixture, in training mode. Only its experts, routers and `also_train` want gradients, and only these are in
        the Trainer's checkpoints (directories named `checkpoint-STEP`); any other `save_pretrained` is complete.

    Raises:
        CoterieError: an unknown method or layer, a rank or number out of range, or routing that would look ahead.
    """
    if not hasattr(model, "named_modules") or not isinstance(config, MixtureConfig | None):
        raise CoterieError(
            f"got a {type(model).__name__} and a {type(config).__name__}",
            "coterie.wrap",
            "give a model (loaded) and a MixtureConfig",
        )
    made = is_a_mixture(model)
    if not made and config is None:
        raise CoterieError("has no experts yet", "coterie.wrap", "give a MixtureConfig")
    if train not in ("all", "experts", "routers"):
        raise CoterieError(f"train is {train!r}", "coterie.wrap", "known: all, experts, routers")
    if made:
        copied = shared_copy(model)
        mixture = _own_routing(copied, train) if config is None else _rerouted(copied, config)
        if config is not None and config.modules != Modules():
            raise CoterieError("a mixture has its layers", "modules", "leave it out, or wrap the dense model")
        globs = None if config is None else config.also_train
        own = {name for name, _ in model.named_parameters() if _inside(name, model.coterie.spec.heads)}
        also = own if globs is None and train != "all" else _also(model, globs) | (own if globs is None else set())
    else:
        assert config is not None
        also = _also(model, config.also_train)
        mixture = _fresh(model, config)
    for name, parameter in mixture.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(name in also if part is None else train in ("all", part))
        if parameter.requires_grad and name in also:
            parameter.data = parameter.data.clone()  # the user's model keeps its own
    if not any(p.requires_grad for p in mixture.parameters()):
        raise CoterieError(f"there is nothing to train: it has no {train}", "train", "train all, or experts")
    if hasattr(mixture, "save_pretrained"):
        mixture.save_pretrained = SavePretrained(mixture)
    mixture.register_load_state_dict_post_hook(forgive)
    return mixture.train()


def is_a_mixture(model: nn.Module) -> bool:
    """Whether a model has mixture layers."""
    return any(is_mixture(module) for module in model.modules())


def part_of(name: str) -> Literal["experts", "routers"] | None:
    """Which part of a mixture a parameter belongs to, by its name; None for the base's."""
    if ".router." in name or name.endswith(".bank.gate") or name.startswith("coterie_router."):
        return "routers"
    return "experts" if ".bank." in name else None


def shared_copy(model: Any) -> Any:
    """A copy whose parameters lie in the same memory. Buffers do not: a batch norm changes its own in training."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()})


def _fresh(model: Any, config: MixtureConfig) -> Any:
    """A copy of a dense model with fresh experts and routers."""
    adapters = read_adapters(model, config.experts) if isinstance(config.experts, dict) else []
    config = suited(config, adapters)
    name, parameters, assembly = config.assemble()
    kind = assembly.experts
    if not isinstance(kind, Fresh):
        raise CoterieError("its experts are fitted, not trained", "method", "use Fresh experts")
    if kind.kind == "bottleneck":
        activation(kind.activation)
    names = ["expert"] if name == "single" and isinstance(config.experts, int) else config.names
    if name == "single" and len(names) > 1:
        raise CoterieError(f"single has one expert, and {len(names)} are named", "experts", "name one")
    mixture = shared_copy(model)
    paths, siblings = _layers(mixture, config, kind)
    lost = [(each.name, path) for each in adapters for path in each.adapted if path not in paths]
    if lost:
        raise CoterieError(
            f"expert {lost[0][0]!r} adapts {lost[0][1]!r}, which gets no experts", "modules", "include it"
        )
    spec = MixtureSpec(name, parameters, assembly.routing, names)
    for path in paths:
        spec.layers[path] = kind.shape(len(names), *widths(mixture.get_submodule(path)))
    spec.siblings = siblings
    insert(mixture, spec)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for path in paths:
            bank = mixture.get_submodule(path).bank
            kind.reset(bank, generator)
            for expert, adapter in enumerate(adapters):
                start(bank, expert, adapter, path)
    return _with_fresh_routers(mixture, spec, generator)


def _rerouted(mixture: Any, config: MixtureConfig) -> Any:
    """A mixture with its experts and the routers of another method, fresh."""
    before = mixture.coterie.spec
    name, parameters, assembly = config.model_copy(update={"experts": before.experts}).assemble()
    spec = replace(before, method=name, parameters=parameters, routing=assembly.routing, layers={}, siblings=[])
    for path, shape in before.layers.items():
        bank = mixture.get_submodule(path).bank
        if not bank.linear or bank.whole:
            raise CoterieError(
                "its experts are masks or adapters with routers of their own kind", path, "train it as it is"
            )
        bank._parameters.pop("gate", None)
        spec.layers[path] = bank.shape = replace(shape, gate_rank=0, gate=False)
    reroute(mixture, spec)
    return _with_fresh_routers(mixture, spec, torch.Generator().manual_seed(config.seed))


def _with_fresh_routers(mixture: Any, spec: MixtureSpec, generator: torch.Generator) -> Any:
    with torch.no_grad():
        for path in spec.layers:
            mixture.get_submodule(path).router.reset(generator)
        if spec.routing.score == "prepass":
            mixture.coterie_router.reset(generator)
    attach(mixture, spec)
    return mixture


def _layers(model: Any, config: MixtureConfig, kind: Fresh) -> tuple[list[str], list[list[str]]]:
    """Paths of the layers that get experts, and groups of them that read the same input."""
    from transformers import PreTrainedModel

    from ..sources.names import LiveSkeleton, Skeleton

    modules, notes = config.modules, list[str]()
    if kind.kind == "bottleneck" and modules.include == ["*"]:
        modules = Modules(
            include=list(SUBLAYER_ENDS), exclude=[*modules.exclude, *(f"{p}*" for p in outside_base(model))]
        )
    seen = probe(Skeleton(type(model), model.config).model) if isinstance(model, PreTrainedModel) else None
    called = None if seen is None else seen.called
    sites = choose_sites(model, set(), modules, "base", called, LiveSkeleton(model).tied, notes, needed=False)
    given = [repr(glob) for glob in (*config.modules.include, *config.modules.exclude)]
    wrong = [note for note in notes if any(glob in note for glob in given)]
    if not sites.layers:
        wrong = ["no layer would become a mixture layer", *wrong]
    if wrong:
        raise CoterieError(": ".join(wrong), "modules", "see model.named_modules() for the names")
    return sites.layers, [] if seen is None else seen.siblings()


def _own_routing(mixture: Any, train: Part) -> Any:
    """Where routing reads the experts' own rows and only one of the two is trained: rows of its own for it."""
    spec = mixture.coterie.spec
    for path, shape in spec.layers.items():
        layer = mixture.get_submodule(path)
        if train == "all" or shape.ranks is None or not shape.gate_rank or shape.gate:
            continue
        rows = layer.bank.score_rows().detach().clone()
        spec.layers[path] = layer.bank.shape = replace(shape, gate=True)
        layer.bank.register_parameter("gate", nn.Parameter(rows))
    attach(mixture, spec)
    return mixture


def _also(model: Any, globs: list[str] | None) -> set[str]:
    """Names of a model's parameters that are trained too.

    Raises:
        CoterieError: a glob matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    if globs is None:
        get_output = getattr(model, "get_output_embeddings", None)
        output = get_output() if get_output else None
        heads = [
            path for path in outside_base(model) if output is None or output not in model.get_submodule(path).modules()
        ]
        return {name for name in names if _inside(name, heads)}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise CoterieError(
                f"no parameter of the base matches {glob!r}", "also_train", "see model.named_parameters()"
            )
    return {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)
