"""Commands on experts and mixtures: extract, extract-expert, add, remove, compress, convert."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import Force, Json, Out, Token, check_device, pairs, show, terminal

Moved = Annotated[str | None, typer.Option(help="Where the mixture's base is, if it has moved; it is compared.")]


def extract(
    base: Annotated[str, typer.Argument(help="Directory or Hub id (ID@REVISION) of the base model.")],
    finetuned: Annotated[str, typer.Argument(help="The same of the full fine-tune.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="Rank of every layer.")] = None,
    residual: Annotated[
        float | None, typer.Option(help="Instead: every layer's rank is the least that leaves this share of its delta.")
    ] = None,
    rest: Annotated[
        str, typer.Option(help="Biases, norms, embeddings and the like: leave them out, or save them whole.")
    ] = "leave",
    head: Annotated[str, typer.Option(help="Task heads and output embeddings: leave or save.")] = "leave",
    include: Annotated[list[str] | None, typer.Option(help="Glob on paths of linear layers to adapt.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob on paths of linear layers to leave alone.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the base's.")] = None,
    vocabulary: Annotated[str, typer.Option(help="base: leave out embeddings of another vocabulary.")] = "error",
    architecture: Annotated[str | None, typer.Option(help="transformers class. Default: the fine-tune's.")] = None,
    device: Annotated[str, typer.Option(help="Where deltas are factorised: cpu, cuda, ...")] = "cpu",
    jobs: Annotated[int | None, typer.Option(help="Layers at a time. Default: the cores.")] = None,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write a PEFT LoRA adapter of what a full fine-tune changed, and measure what it lacks."""
    from .extract_adapter import extract as run

    check_device(device)
    report = run(
        base, finetuned, out, rank=rank, residual=residual, rest=rest, head=head, include=include, exclude=exclude,
        dtype=dtype, vocabulary=vocabulary, architecture=architecture, device=device, jobs=jobs, force=force,
        token=token, console=None if as_json else terminal(stderr=True),
    )  # fmt: skip
    show(report, as_json)


def extract_expert(
    directory: Annotated[str, typer.Argument(help="A mixture directory or Hub id.")],
    out: Out,
    name: Annotated[
        str | None, typer.Argument(help="The expert's name; of LoraHub's one adapter, leave it out.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="A PEFT LoRA adapter instead of a dense model.")] = False,
    base: Annotated[str | None, typer.Option(help="The adapter's base, where the mixture does not name it.")] = None,
    force: Force = False,
) -> None:
    """Give one expert as an ordinary dense model: its linear layers and head; the rest as `others` had it."""
    from transformers.utils import logging

    from .extract import extract_expert as run

    logging.disable_progress_bar()
    run(directory, name, out, force=force, adapter=adapter, base=base)
    terminal().print(f"{name or directory}: {out}", markup=False)


def add(
    mixture: Annotated[str, typer.Argument(help="A mixture directory or Hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="NAME=SOURCE...", help="The further experts.")],
    out: Out,
    base: Moved = None,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Add experts to a built mixture; those that it has are taken over, and their sources are not needed."""
    from .extend import add_experts as run

    given = pairs(experts, "coterie add")
    console = None if as_json else terminal(stderr=True)
    show(run(mixture, given, out, base=base, force=force, token=token, console=console), as_json)


def remove(
    mixture: Annotated[str, typer.Argument(help="A mixture directory or Hub id.")],
    experts: Annotated[list[str], typer.Argument(metavar="NAME...", help="The experts to leave out.")],
    out: Out,
    base: Moved = None,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Take experts out of a built mixture."""
    from .extend import remove_experts as run

    console = None if as_json else terminal(stderr=True)
    show(run(mixture, experts, out, base=base, force=force, token=token, console=console), as_json)


def compress(
    base: Annotated[str, typer.Argument(help="Directory or Hub id (ID@REVISION) of the base model.")],
    expert: Annotated[str, typer.Argument(help="The same of the full fine-tune.")],
    out: Out,
    density: Annotated[float, typer.Option(help="Fraction of each tensor's delta that is kept, the largest.")] = 0.1,
    scale: Annotated[
        float, typer.Option(help="What is kept becomes this times the delta's standard deviation times its sign.")
    ] = 1.0,
    architecture: Annotated[str | None, typer.Option(help="transformers class. Default: the fine-tune's.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Tensors at a time. Default: the cores.")] = None,
    force: Force = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Store a fine-tune as the signs of its largest changes (ComPEFT); build and merge read it as an expert."""
    from .compress import compress as run

    report = run(
        base, expert, out, density=density, scale=scale, architecture=architecture, jobs=jobs, force=force,
        token=token, console=None if as_json else terminal(stderr=True),
    )  # fmt: skip
    show(report, as_json)


def convert(
    directory: Annotated[str, typer.Argument(help="A directory or Hub id with pickled weights (*.bin).")],
    out: Out,
    force: Force = False,
) -> None:
    """Rewrite pickled weights as safetensors (read with weights_only, memory-mapped)."""
    from .convert import convert as run

    terminal().print(f"{run(directory, out, force=force)} tensors: {out}", markup=False)
