"""`coterie inspect --html`: everything that can be seen of a mixture, on one page."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CoterieError
from .inspect import inspect
from .page import require_free, write_page
from .routing import Batch, record
from .subspaces import examine
from .texts import batches, numbered, read_texts


def look_inside(
    source: str,
    out: Path,
    texts: Sequence[str] = (),
    tasks: Iterable[tuple[str, str | None, Iterable[Batch]]] = (),
    token: str | None = None,
    base: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the page of a mixture: its weights, and its routing where texts or tasks are given.

    Args:
        source: a mixture directory or Hub id.
        out: the file; a page that was written before is replaced.
        texts: as `--text` takes them; the mixture's tokenizer reads them.
        tasks: (name, the expert made for it or None, batches to call the model with), as `routing.record` takes them.
        token: Hub token.
        base: of a light mixture, where its base is if it has moved.
        tell: is told what is being done.

    Raises:
        CoterieError: not a mixture, a missing extra, texts that cannot be read or that the model cannot be run on, or
            a file that is not ours to replace.
    """
    require_free(out)
    inspection = inspect(source, token)
    given = read_texts(texts, inspection.experts)
    from ..mixture.load import load

    tell("the model")
    more = {"base": base} if base is not None else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that heads are to be selected: routing does not depend on them
        model = load(source, token=token, **more)
    tokenizer = _tokenizer(source, token) if given else None
    layers = examine(model, tell)
    routed = None
    wanted = [*tasks, *((each.task, each.expert, batches(model, tokenizer, each.lines)) for each in given)]
    names = numbered([name for name, _, _ in wanted])
    wanted = [(name, expert, rows) for name, (_, expert, rows) in zip(names, wanted, strict=True)]
    if wanted:
        try:
            routed = record(model, wanted, tell=tell)
        except CoterieError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise CoterieError(
                f"{type(model).__name__} cannot be run on this ({str(error).splitlines()[0]})",
                source,
                "give batches of what it takes (coterie.report.look.look_inside, tasks=)",
            ) from error
    tell("the page")
    title = Path(source).name or source
    write_page(out, title, inspection, layers, routed, tokenizer)


def _tokenizer(source: str, token: str | None) -> Any:
    from transformers import AutoTokenizer

    from ..sources.locate import locate

    try:
        return AutoTokenizer.from_pretrained(locate(source, token).path)
    except (OSError, ValueError, KeyError) as error:
        raise CoterieError(
            f"has no tokenizer that can be loaded ({str(error).splitlines()[0]})", source, "leave out --text"
        ) from None
