"""Peak anonymous memory of a stretch of work."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from pathlib import Path

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int | None:
    """This process's anonymous resident memory (RssAnon), in bytes; None where the system does not say."""
    if not _STATUS.exists():
        return None
    line = next((row for row in _STATUS.read_text().splitlines() if row.startswith("RssAnon")), None)
    return int(line.split()[1]) * 1024 if line else None


def give_back() -> None:
    """Have the C library return what is free in its heaps to the system, after a layer's work.

    glibc keeps freed blocks of up to 32 MiB, in heaps that fragment with the number of layers (benchmarks/memory.py).
    Mapping every large block by itself instead costs a page fault at every touch and threads that wait for each other.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """The highest anonymous memory inside a `with` block, sampled every 20 ms.

    Attributes:
        bytes: the peak. Where the system does not tell anonymous from file-backed memory: the peak of both.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes() or 0)
            if self._stop.wait(0.02):
                return

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.bytes:
            unit = 1 if sys.platform == "darwin" else 1024
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
