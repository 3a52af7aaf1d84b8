"""Tables as a picture, for pages that show no terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console, RenderableType


def svg(renderables: list[RenderableType], title: str, width: int = 104) -> str:
    """An SVG of what rich prints, in the reader's own monospaced font (rich's would be fetched from elsewhere).

    Args:
        renderables: what to show, from top to bottom.
        title: the window's title.
        width: columns.
    """
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for each in renderables:
        console.print(each)
    picture = console.export_svg(title=title, unique_id="coterie")
    return re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
