"""A directory that appears whole or not at all; what a killed run leaves is found again, or removed."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CoterieError
from .journal import JOURNAL, LOCK, changes, has_shards

# What marks a directory as coterie's own, which --force may replace.
OURS = ("mixture.json", "merge.json", "extracted.json", "converted.json", "extract.json", "compressed.json")


@contextmanager
def whole_directory(
    out: Path,
    force: bool = False,
    needed: int = 0,
    sources: Iterable[Path] = (),
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> Iterator[Path]:
    """A folder to write in that becomes `out` at the end of the block, or vanishes if the block fails.

    A killed process leaves at most a hidden sibling `.NAME.partial-*`, which the next run for the same `out` goes on
    with (`resume`) or removes, and never a lost result: what is replaced is kept aside until the new directory stands.
    Runs for the same `out` at the same time write in folders of their own.

    Args:
        out: the final directory.
        force: replace an existing directory, if coterie wrote it or it is empty.
        needed: bytes that will be written; refused at once where the device has fewer.
        sources: directories that are read, and so must not be replaced.
        identity: of a build that keeps a journal; one that is interrupted with a shard finished leaves its folder.
        resume: give back what the last killed build left, if it left a finished shard.

    Raises:
        CoterieError: `out` exists, is not ours to replace, or the device has or runs out of space; or what a killed
            build left is of another identity.
    """
    out = out.absolute()
    _put_back(out)
    _require_free(out, force, sources)
    made: list[Path] = []
    staging, lock = _left(out, identity if resume else None)
    keep = found = staging is not None  # what was worth going on with stays so, whatever this run meets
    try:
        for parent in reversed([p for p in out.parents if not p.exists()]):
            parent.mkdir()
            made.append(parent)
        free = shutil.disk_usage(out.parent).free
        needed -= sum(file.stat().st_size for file in staging.iterdir()) if staging else 0
        if needed > free:
            raise CoterieError(
                f"no space left on the device: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free",
                str(out.parent),
                "free some space or choose another device",
            )
        if staging is None:
            # Under its own name only once it is locked, or another run might take it for a dead one's.
            staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
            lock = _lock(staging)
            own = staging.name.removeprefix(f".{out.name}.new-")
            staging = staging.rename(out.with_name(f".{out.name}.partial-{own}"))
        yield staging
        for name in (LOCK, JOURNAL):
            (staging / name).unlink(missing_ok=True)
        staging.chmod(0o755)
        _require_free(out, force, sources)  # another run may have been faster
        old = out.with_name(f".{out.name}.previous")
        if os.path.lexists(out):
            out.rename(old)
        staging.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        keep = False
    except OSError as error:
        raise _io_error(error, out) from None
    except CoterieError:
        raise
    except BaseException:
        keep = found or (identity is not None and staging is not None and has_shards(staging))
        raise
    finally:
        if staging is not None and not keep:
            shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            lock.close()
        for parent in reversed(made):
            if not any(parent.iterdir()):
                parent.rmdir()


def sweep(parent: Path) -> None:
    """Remove what killed runs left in a directory, whatever they were making; what a living one writes in stays."""
    for folder in parent.glob(".*.partial-*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _put_back(out: Path) -> None:
    """A result that a killed run had moved aside."""
    old = out.with_name(f".{out.name}.previous")
    if old.exists() and not out.exists():
        old.rename(out)


def _left(out: Path, identity: Mapping[str, Any] | None) -> tuple[Path | None, BinaryIO | None]:
    """The folder of the last killed build, locked, if it is to be gone on with; all others of dead runs are removed."""
    partial = out.parent.glob(f".{glob.escape(out.name)}.partial-*")
    found: tuple[Path | None, BinaryIO | None] = (None, None)
    for folder in sorted(partial, key=lambda p: p.stat().st_mtime_ns if p.exists() else 0, reverse=True):
        lock = _lock(folder)
        if lock is None:
            continue
        if identity is not None and found[0] is None and has_shards(folder):
            different = changes(folder, identity)
            if different:
                lock.close()
                raise CoterieError(
                    f"the build that was interrupted cannot be gone on with, for this changed: {'; '.join(different)}",
                    str(out),
                    "undo the change, or begin anew: leave out --resume (resume=True)",
                )
            found = folder, lock
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
    return found


def _lock(folder: Path) -> BinaryIO | None:
    """Hold a folder until the file is closed or the process is gone; None where it cannot be held, or is removed."""
    try:
        file = (folder / LOCK).open("ab")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:
            return file
    except OSError:
        pass
    file.close()
    return None


def _require_free(out: Path, force: bool, sources: Iterable[Path]) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise CoterieError(
            "exists already", str(out), "choose another directory, or replace it with --force (force=True)"
        )
    inside = [s for s in sources if out.resolve() in (s.resolve(), *s.resolve().parents)]
    if inside:
        raise CoterieError(f"holds a source of this very build ({inside[0]})", str(out), "choose another directory")
    if out.is_symlink() or not out.is_dir():
        raise CoterieError("is no directory", str(out), "choose another directory")
    if any(out.iterdir()) and not any((out / name).is_file() for name in OURS):
        raise CoterieError("was not written by coterie", str(out), "remove it yourself, or choose another directory")


def _io_error(error: OSError, out: Path) -> CoterieError:
    if error.errno == errno.ENOSPC:
        return CoterieError("no space left on the device", str(out), "free some space or choose another device")
    return CoterieError(f"cannot be written ({error})", str(out), "choose another directory")
