"""What MkDocs asks for while it builds the site: the tables of methods, from their registrations."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where a page says `<!-- methods: built -->`, `trained` or `merges`."""
    from coterie.merging.registry import known as merges
    from coterie.methods import known as mixtures

    kinds = {
        "built": [method for method in mixtures() if not method.trained],
        "trained": [method for method in mixtures() if method.trained],
        "merges": merges(),
    }
    for kind, methods in kinds.items():
        markdown = markdown.replace(f"<!-- methods: {kind} -->", tables(methods))
    return markdown


def tables(methods: list[Any]) -> str:
    """A section for every method: what it does, where it was published, its parameters."""
    parts = []
    for method in methods:
        lines = [f"### `{method.name}`", "", plain(method.summary), "", f"*{method.cite}*"]
        parameters = method.describe()
        if parameters:
            lines += ["", "| parameter | default | type | meaning |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{p['name']}` | `{p['default']}` | {plain(p['type'])} | {plain(p['meaning'])} |" for p in parameters
            ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """Text that holds signs which Markdown would take for its own."""
    return re.sub(r"([\[\]|*_<])", r"\\\1", text)
