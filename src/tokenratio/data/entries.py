"""Cache entries on disk: folders named by a digest, each written completely or not at all."""

import contextlib
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

_UNFINISHED = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}\.tmp")
_DAY = 24 * 60 * 60


def begin_entry(folder: Path) -> Path:
    """Make an unfinished entry next to `folder`, under a name that no other process uses.

    Unfinished entries of killed processes, a day old or more, are removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if _UNFINISHED.fullmatch(other.name):
            with contextlib.suppress(OSError):
                latest = max(path.stat().st_mtime for path in [*other.iterdir()] or [other])
                if time.time() - latest > _DAY:
                    shutil.rmtree(other)
    work = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    work.mkdir()
    return work


def finish_entry(work: Path, folder: Path, find_flaw: Callable[[Path], str | None]) -> None:
    """Move an entry to its final name; an entry that another process finished first is kept.

    Args:
        find_flaw: returns what is wrong with an entry, None if it is whole.
    """
    try:
        os.replace(work, folder)
    except OSError:
        if find_flaw(folder) is not None:
            raise


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
