"""PEFT LoRA adapters, as their factors are on disk."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import CoterieError
from .checkpoint import Checkpoint
from .delta import Delta, Dense, LowRank
from .experts import ExpertSource, same, shape_error
from .locate import Location
from .names import Skeleton

# The keys of a LoraConfig that are read here, or that say nothing of what the trained adapter computes. Any other key
# that is set may mean something else than `W + scale B A`, and is refused.
_READABLE = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode", "runtime_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "bias", "lora_bias", "modules_to_save", "fan_in_fan_out", "init_lora_weights", "lora_dropout",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "megatron_config", "megatron_core", "eva_config", "corda_config", "loftq_config",
    "qalora_group_size",
}  # fmt: skip
# Initialisations that subtract the adapter from the base: such an adapter does not belong to the base as published.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterExpert(ExpertSource):
    """A PEFT LoRA (or DoRA) adapter directory.

    Read exactly: rank and alpha patterns, rsLoRA, biases of the low-rank pair, trained biases, `modules_to_save`,
    LoRA on embeddings, convolutions and routed experts in one parameter (`target_parameters`), DoRA (as a dense delta).
    Everything else is refused by name.
    """

    kind = "adapter"

    def __init__(
        self, name: str, location: Location, skeleton: Skeleton, weight: float = 1.0, keep_vocabulary: bool = False
    ):
        config = location.json("adapter_config.json") or {}
        super().__init__(name, weight, {})
        self.location, self.skeleton, self.config = str(location.path), skeleton, config
        self._keep_vocabulary = keep_vocabulary
        self._check()
        self.checkpoint = Checkpoint.open(location, stem="adapter_model")
        self._parts: dict[str, dict[str, str]] = {}  # module path -> {lora_A, lora_B, ...: name on disk}
        self._values: dict[str, str] = {}  # tensor in memory -> name on disk, for whole tensors
        self._fused: dict[str, dict[str, str]] = {}  # 3-D parameter in memory -> {lora_A, lora_B: name on disk}
        self._scale: dict[str, float] = {}
        for disk in self.checkpoint.tensors:
            self._place(disk)
        for path, parts in self._parts.items():
            self._validate(path, parts)
        for name, parts in self._fused.items():
            self._validate_fused(name, parts)

    def _refuse(self, what: str, mend: str) -> CoterieError:
        return CoterieError(what, f"adapter {self.name!r} ({self.location})", mend)

    def _check(self) -> None:
        kind = self.config.get("peft_type")
        if kind == "XLORA":
            raise self._refuse(
                "it is an X-LoRA model, several adapters and a router (which PEFT 0.20 and 0.21 do not save)",
                "name the adapters that its adapter_config.json lists as experts, and train a router: method xlora",
            )
        if kind != "LORA":
            raise self._refuse(f"its type is {kind!r}, and only LORA (and DoRA) is a low-rank delta", "merge it first")
        for key, value in self.config.items():
            if value and key not in _READABLE:
                raise self._refuse(
                    f"it uses {key!r}, which is not known to be a plain low-rank delta", "merge it first"
                )
        start = str(self.config.get("init_lora_weights", True)).lower()
        if start.startswith(_CHANGES_BASE):
            raise self._refuse(
                f"it was initialised by {start!r}, which also changes the base",
                "convert it (PEFT: path_initial_model_for_weight_conversion) or merge it into its base",
            )
        patterns = []
        for key in ("alpha_pattern", "rank_pattern"):
            pattern = self.config.get(key) or {}
            if not isinstance(pattern, dict):
                raise self._refuse(f"{key!r} is no mapping in adapter_config.json", "restore it")
            patterns += [(f"{key}.{name}", number) for name, number in pattern.items()]
        for key, value in [("r", self.config.get("r")), ("lora_alpha", self.config.get("lora_alpha")), *patterns]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
                raise self._refuse(f"{key!r} is {value!r} in adapter_config.json", "restore a positive number")

    def _place(self, disk: str) -> None:
        name = disk.removeprefix("base_model.model.")
        match = re.fullmatch(
            r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?", name
        )
        if match:
            fused = self._parameter(match[1])
            if fused is not None:
                self._fused.setdefault(fused, {})[match[2]] = disk
                self._scale.setdefault(fused, self._scaling(fused))
                return
            path = self._module(match[1], disk)
            self._parts.setdefault(path, {})[match[2] + ("_bias" if match[3] == ".bias" else "")] = disk
            self._scale.setdefault(path, self._scaling(match[1]))
            return
        if ".original_module." in name:  # PEFT stores it beside what replaces it, and never uses it
            self.left_out[disk] = "the original of a module that modules_to_save replaces"
            return
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        memory, pattern = self.skeleton.in_memory(name)
        if memory in self.skeleton.tensors and pattern is None:
            ours, theirs = self.skeleton.tensors[memory].shape, self.checkpoint.tensors[disk].shape
            if ours != theirs and self._keep_vocabulary and self.skeleton.is_vocabulary(memory):
                self.left_out[disk] = f"vocabulary of {theirs[0]} rows; the base's {ours[0]} are kept"
            elif memory in self._values:  # PEFT stores a saved module's bias twice where all biases are trained
                if not torch.equal(self.checkpoint.read(disk), self.checkpoint.read(self._values[memory])):
                    raise self._refuse(f"{disk!r} and {self._values[memory]!r} differ and are one tensor", "remove one")
                self.left_out[disk] = f"repeats {self._values[memory]}"
            else:
                self._values[memory] = disk
        elif self.skeleton.belongs(name):
            raise self._refuse(f"tensor {disk!r} has no place in the base model", "use the base it was trained on")
        else:
            self.left_out[disk] = f"not part of {type(self.skeleton.model).__name__}"

    def _parameter(self, path: str) -> str | None:
        """The parameter that factors at this path adapt by themselves; PEFT wraps a module's first one innermost."""
        module = path
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        wanted = self.config.get("target_parameters") or ()
        names = [n for n in self.skeleton.tensors if n.rpartition(".")[0] == module]
        names = [n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)]
        depth = path.count(".base_layer", len(module))
        return names[-1 - depth] if depth < len(names) else None

    def _module(self, path: str, disk: str) -> str:
        memory, pattern = self.skeleton.in_memory(f"{path}.weight")
        if memory not in self.skeleton.tensors or pattern is not None:
            raise self._refuse(
                f"tensor {disk!r} adapts module {path!r}, which the base model lacks", "use the base it was trained on"
            )
        return memory.removesuffix(".weight")

    def _scaling(self, path: str) -> float:
        """PEFT's rule: the first pattern that matches the end of the module's name, else the adapter's own values."""

        def value(patterns: dict[str, Any] | None, default: float) -> float:
            for pattern, number in (patterns or {}).items():
                try:
                    if re.match(rf"(.*\.)?({pattern})$", path):
                        return float(number)
                except re.error:
                    raise self._refuse(f"pattern {pattern!r} is no regular expression", "mend the pattern") from None
            return default

        alpha = value(self.config.get("alpha_pattern"), self.config["lora_alpha"])
        rank = value(self.config.get("rank_pattern"), self.config["r"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _validate(self, path: str, parts: dict[str, str]) -> None:
        tag = "lora_embedding_" if "lora_embedding_A" in parts or "lora_embedding_B" in parts else "lora_"
        for part in (f"{tag}A", f"{tag}B"):
            if part not in parts:
                raise self._refuse(f"module {path!r} has no {part}", "fetch the adapter again")
        up, down = (self.checkpoint.tensors[parts[tag + side]].shape for side in "BA")
        weight = tuple(self.skeleton.tensors[f"{path}.weight"].shape)
        module = self.skeleton.module(path)
        if isinstance(module, (Conv1D, nn.Embedding)):
            weight = weight[::-1]
        if "lora_magnitude_vector" in parts and not isinstance(module, (nn.Linear, Conv1D)):
            raise self._refuse(f"it is DoRA on {path!r}, which is no linear layer", "merge it into its base")
        fits = (
            len(up) == len(down) == len(weight) and up[0] == weight[0] and down[1:] == weight[1:] and up[1] == down[0]
        )
        if not fits:
            raise shape_error(f"{path}.weight", (up[0] if up else 0, *down[1:]), weight, self)

    def _validate_fused(self, name: str, parts: dict[str, str]) -> None:
        count, *widths = self.skeleton.tensors[name].shape
        if set(parts) != {"lora_A", "lora_B"} or len(widths) != 2 or count < 2:
            raise self._refuse(f"parameter {name!r} has no pair of factors for each expert", "fetch the adapter again")
        down, up = (self.checkpoint.tensors[parts[part]].shape for part in ("lora_A", "lora_B"))
        widths = widths if self._turned(name) else widths[::-1]
        if [down[-1], up[0]] != widths or down[0] != up[-1] or down[0] % count:
            raise shape_error(name, (count, up[0], down[-1]), (count, *widths[::-1]), self)

    def _turned(self, name: str) -> bool:
        """Whether a parameter holds its experts as (in, out)."""
        return bool(getattr(self.skeleton.module(name.rpartition(".")[0]), "is_transposed", False))

    def _fused_delta(self, name: str) -> torch.Tensor:
        """The delta of routed experts in one parameter, float64: lora_A lies expert by expert, lora_B rank by rank."""
        count = len(self.skeleton.tensors[name])
        down, up = (self.checkpoint.read(self._fused[name][part]).double() for part in ("lora_A", "lora_B"))
        delta = up.reshape(len(up), -1, count).permute(2, 0, 1) @ down.reshape(count, -1, down.shape[-1])
        return self._scale[name] * (delta.transpose(1, 2) if self._turned(name) else delta)

    def _factors(self, path: str, tag: str = "lora_") -> LowRank:
        up, down = (self.checkpoint.read(self._parts[path][tag + side]) for side in "BA")
        return LowRank(up.double() * self._scale[path], down.double())

    @property
    def adapted(self) -> list[str]:
        """Paths of the modules that it has factors for."""
        return [*self._parts, *self._fused]

    @property
    def saved(self) -> dict[str, str]:
        """The tensors that it holds whole: name in memory -> name on disk."""
        return dict(self._values)

    def factors(self, path: str) -> LowRank | None:
        """The factors of a linear layer, float64; None where it has none.

        Raises:
            CoterieError: what it does to this module is more than `W + up @ down`.
        """
        if path not in self.adapted:
            return None
        self.pair(path)
        return self._factors(path)

    def pair(self, path: str) -> tuple[str, str, float]:
        """Where the factors of an adapted linear layer are: both names on disk, and s in `W + s up @ down`.

        Raises:
            CoterieError: what it does to this module is more than that.
        """
        if path in self._fused:
            raise self._refuse(f"{path!r} holds the factors of many experts", "choose a merge of dense deltas")
        parts, module = self._parts[path], self.skeleton.module(path)
        if set(parts) != {"lora_A", "lora_B"} or not isinstance(module, (nn.Linear, Conv1D)):
            extra = ", ".join(sorted(set(parts) - {"lora_A", "lora_B"})) or type(module).__name__
            raise self._refuse(
                f"it is no plain pair of factors on {path!r} ({extra})", "choose a merge of dense deltas"
            )
        return parts["lora_B"], parts["lora_A"], self._scale[path]

    def has(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        low_rank = self._parts.get(path, {})
        return (
            name in self._values
            or name in self._fused
            or (leaf == "weight" and bool(low_rank))
            or (leaf == "bias" and "lora_B_bias" in low_rank)
        )

    def value(self, name: str, base: torch.Tensor | None, any_shape: bool = False) -> torch.Tensor | None:
        path, _, leaf = name.rpartition(".")
        value = self.checkpoint.read(self._values[name]) if name in self._values else None
        if value is not None and base is not None and value.shape != base.shape and not any_shape:
            raise shape_error(name, tuple(value.shape), tuple(base.shape), self)
        parts = self._parts.get(path, {})
        start = value if value is not None else base
        if name in self._fused:
            return None if start is None else (start.double() + self._fused_delta(name)).to(start.dtype)
        if leaf == "bias" and "lora_B_bias" in parts:
            extra = self.checkpoint.read(parts["lora_B_bias"]).double() * self._scale[path]
            return extra.float() if start is None else (start.double() + extra).to(start.dtype)
        if leaf != "weight" or not parts or start is None:
            return value
        if "lora_embedding_A" in parts:
            low_rank = self._factors(path, "lora_embedding_")
            return (start.double() + (low_rank.up @ low_rank.down).T).to(start.dtype)
        transposed = isinstance(self.skeleton.module(path), Conv1D)
        if start.ndim > 2:
            low_rank = self._factors(path)
            delta = torch.einsum("or,r...->o...", low_rank.up.flatten(1), low_rank.down)
            return (start.double() + delta).to(start.dtype)
        change = self.delta(path, start, transposed)
        matrix = torch.zeros_like(start) if change is None else change.dense()
        return start + (matrix.T if transposed and change is not None else matrix).to(start.dtype)

    def delta(self, path: str, base: torch.Tensor, transposed: bool) -> Delta | None:
        name, parts = f"{path}.weight", self._parts.get(path)
        if parts is None:
            saved = self._values.get(name)
            if saved is None:
                return None
            value = self.checkpoint.read(saved)
            if value.shape != base.shape:
                raise shape_error(name, tuple(value.shape), tuple(base.shape), self)
            matrix = value.float() - base.float()
            return None if same(value, base) else Dense(matrix.T if transposed else matrix)
        low_rank = self._factors(path)
        if (
            "lora_magnitude_vector" in parts
        ):  # DoRA, arXiv:2402.09353, eq. 5: m (W + BA) / |W + BA|, norms per output row
            weight = (base.T if transposed else base).double()
            tuned = weight + low_rank.up @ low_rank.down
            magnitude = self.checkpoint.read(parts["lora_magnitude_vector"]).double().reshape(-1, 1)
            change = tuned * (magnitude / torch.linalg.vector_norm(tuned, dim=1, keepdim=True)) - weight
            # An untrained DoRA leaves the rounding of its stored magnitudes, and no delta.
            return Dense(change) if change.norm() > torch.finfo(torch.float32).eps * 10 * weight.norm() else None
        return low_rank if low_rank.up.any() and low_rank.down.any() else None

    def bias(self, path: str, base: torch.Tensor | None) -> torch.Tensor | None:
        if base is None and self.has(f"{path}.bias"):
            value = self.value(f"{path}.bias", None)
            return value if value is not None and value.any() else None
        return super().bias(path, base)

    def rank_bound(self, path: str) -> int | None:
        parts = self._parts.get(path)
        if parts is None or "lora_magnitude_vector" in parts or "lora_A" not in parts:
            return None if self.has(f"{path}.weight") else 0
        return self.checkpoint.tensors[parts["lora_A"]].shape[0]

    def bytes(self, name: str) -> int:
        path, _, leaf = name.rpartition(".")
        disk = [self._values[name]] if name in self._values else []
        disk += self._fused.get(name, {}).values()
        disk += [d for part, d in self._parts.get(path, {}).items() if (part == "lora_B_bias") == (leaf == "bias")]
        return sum(self.checkpoint.tensors[d].bytes for d in disk)
