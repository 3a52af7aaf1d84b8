"""What the commands of the command line share: options, and how results are shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import CoterieError

Out = Annotated[Path, typer.Option("-o", "--out", help="The directory to make; it appears only when it is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program instead of tables.")]
Cache = Annotated[Path | None, typer.Option(help="Where trained experts and finished cells are kept.")]
Token = Annotated[str | None, typer.Option("--token", help="Hub token; default: the one `hf auth login` stored.")]


def terminal(stderr: bool = False) -> Any:
    """A terminal's width, or one that tables fit in."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)


def show(result: Any, as_json: bool) -> None:
    """A report as a table, or as JSON."""
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    else:
        terminal().print(result.table())


def pairs(given: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE options as a dict; the name may hold anything but '=', and occurs once."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise CoterieError(
                f"{text!r} has no '='", option, f"write NAME={'SOURCE' if option == '--expert' else 'VALUE'}"
            )
        if name in found:
            raise CoterieError(f"{name!r} is given twice", option, "rename one of them")
        found[name] = value
    return found


def number(text: str) -> bool | int | float | str:
    """The value that a text on the command line stands for."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def cache_directory() -> Path:
    """Where trained experts and finished cells are kept by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"


def check_device(device: str) -> None:
    """Refuse a device that cannot be used.

    Raises:
        CoterieError: it cannot.
    """
    import torch

    try:
        torch.zeros(1, device=device).tolist()  # which "meta" has not
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise CoterieError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]})", "--device", "use cpu"
        ) from None
