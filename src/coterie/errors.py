"""The one exception that coterie raises for bad input."""

from __future__ import annotations


class CoterieError(ValueError):
    """Bad input, said in one sentence: where it is, what is wrong and how to mend it.

    Args:
        what: the fault, as a clause that can stand alone.
        where: the file, tensor, key or argument that it is in.
        mend: what the user can do about it.
    """

    def __init__(self, what: str, where: str | None = None, mend: str | None = None):
        self.what, self.where, self.mend = what, where, mend
        super().__init__((f"{where}: " if where else "") + what + (f"; {mend}" if mend else ""))
