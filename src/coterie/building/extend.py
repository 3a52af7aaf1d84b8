"""Experts added to a mixture, or taken out of it: the other experts are taken over as it holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import CoterieError
from ..experts.fit import LayerReport, TruncatedSVD
from ..methods.registry import get
from ..mixture.load import read_spec
from ..mixture.spec import MixtureSpec
from ..recipe import nearest, read_recipe
from ..sources.checkpoint import Checkpoint
from ..sources.locate import locate
from .build import SHARD_BYTES, write
from .kept import Kept
from .prepare import prepare
from .report import BuildReport, Followed


def add_experts(mixture: str | Path, experts: dict[str, Any], out: str | Path, **options: Any) -> BuildReport:
    """A mixture with further experts, without the sources of those that it has.

    The result is what a build of all of them gives: bit for bit what is of an expert alone; of SMILE, the gate rank
    that all experts of a layer share is again the least that any of them allows.

    Args:
        mixture: a directory or Hub id of a built mixture, light or standing alone.
        experts: name -> source, or `{source, weight}`, as in a recipe.
        out: the directory to make; it appears only when it is complete.
        **options: base (where the base is, if it has moved: the base itself is read again), and `force`, `token`,
            `device`, `jobs`, `max_shard_bytes`, `console` as of `coterie.build`.

    Returns:
        The account of the new mixture.

    Raises:
        CoterieError: a name is taken, experts of this method cannot be told apart any more (masks over one delta,
            averages), the base is another, or the mixture was not written by a build.
    """
    before = _Before(mixture, options.get("token"))
    taken = [name for name in experts if name in before.names]
    if taken:
        raise CoterieError(f"there is an expert {taken[0]!r} already", str(mixture), "give another name")
    if not experts:
        raise CoterieError("no expert to add", str(mixture), "give NAME=SOURCE")
    return before.rebuilt(before.names, experts, Path(out), **options)


def remove_experts(mixture: str | Path, names: Sequence[str], out: str | Path, **options: Any) -> BuildReport:
    """A mixture without some of its experts; arguments, result and errors as of `add_experts`."""
    before = _Before(mixture, options.get("token"))
    for name in names:
        if name not in before.names:
            raise CoterieError(f"no expert {name!r}", str(mixture), nearest(name, before.names))
    left = [name for name in before.names if name not in names]
    if not left or not names:
        what = "no expert would be left" if names else "no expert to remove"
        raise CoterieError(what, str(mixture), "name some of its experts")
    before.require_known_ranks(left)
    return before.rebuilt(left, {}, Path(out), **options)


class _Before:
    """A mixture as a build wrote it.

    Raises:
        CoterieError: none did, or its experts are nothing without each other.
    """

    def __init__(self, source: str | Path, token: str | None):
        self.where, self.location = str(source), locate(str(source), token)
        self.spec = MixtureSpec.from_dict(read_spec(self.location))
        self.names = self.spec.experts
        self.account = self.location.json("mixture.json") or {}
        self.checkpoint = Checkpoint.open(self.location)
        anew = "build it anew, from all its sources"
        if get(self.spec.method).trained:
            raise CoterieError("was trained, and its routers know its experts alone", self.where, "train one anew")
        if (
            not {"recipe", "report", "kinds"} <= set(self.account)
            or self.account["recipe"]["method"] != self.spec.method
        ):
            raise CoterieError("was not written by a build, or was changed since", self.where, anew)
        self.recipe, self.report = self.account["recipe"], self.account["report"]
        mixture = get(self.spec.method).assemble(**self.spec.parameters)
        if not hasattr(mixture.experts, "gate_rank"):
            raise CoterieError(f"experts of {self.spec.method} are parts of one delta that all share", self.where, anew)
        averaged = [n for n, f in self.report["others"].items() if f["policy"] == "average" and f["changed_by"]]
        if averaged:
            raise CoterieError(f"it holds the average of all experts at {averaged[0]!r}", self.where, anew)
        self.experts = mixture.experts

    def require_known_ranks(self, left: Sequence[str]) -> None:
        """Refuse where the mixture does not tell what a build of the experts that are left would make.

        Raises:
            CoterieError: a gate rank was clamped by an expert of which fewer directions are kept, or a bias was left
                out that a lone expert keeps.
        """
        experts = self.experts
        if isinstance(experts, TruncatedSVD) and not experts.energies and experts.rank != "full":
            short = experts.rank == "dense" or experts.rank < experts.gate_rank
            clamped = [layer["path"] for layer in self.report["layers"] if 0 < layer["gate_rank"] < experts.gate_rank]
            if short and clamped:
                raise CoterieError(
                    f"the gate rank of {clamped[0]!r} was clamped, and the mixture does not say by which expert",
                    self.where,
                    "build it anew, from all its sources",
                )
        biases = [
            name for name in left for why in self.report["left_out"].get(f"expert {name}", {}).values() if "bias" in why
        ]
        if len(left) == 1 and biases:
            raise CoterieError(
                f"biases of {left[0]!r} were left out, which it would keep alone", self.where, "build it by itself"
            )

    def rebuilt(
        self,
        keep: Sequence[str],
        more: dict[str, Any],
        out: Path,
        *,
        base: str | None = None,
        force: bool = False,
        token: str | None = None,
        device: str = "cpu",
        jobs: int | None = None,
        max_shard_bytes: int = SHARD_BYTES,
        console: Console | None = None,
    ) -> BuildReport:
        """The mixture of some of its experts and of more."""
        given = {**self.recipe, "experts": {name: self.recipe["experts"][name] for name in keep} | more}
        given["architecture"] = self.report["architecture"]
        if base is not None:
            given["base"] = base
        recipe = read_recipe(given)
        account = self.account
        kept = Kept(
            list(keep),
            self.spec,
            self.checkpoint,
            {layer["path"]: LayerReport(**layer) for layer in self.report["layers"]},
            {name: Followed(**followed) for name, followed in self.report["others"].items()},
            self.report["left_out"],
            account["kinds"],
            {source: hashes for source, hashes in account["tensors_read"].items() if source != "base"},
        )
        ready = prepare(recipe, token, kept)
        if ready.inputs.stored.fingerprint() != account["base"]["fingerprint"]:
            raise CoterieError(
                f"its base is not the one at {recipe.base} (their fingerprints differ)",
                self.where,
                "say where it is: base=DIR_OR_ID@REVISION (--base)",
            )
        light = self.spec.base is not None
        how: dict[str, Any] = {"light": light, "device": device, "jobs": jobs, "token": token, "console": console}
        return write(ready, out, force, **how, engine="local", resume=False, max_shard_bytes=max_shard_bytes)
