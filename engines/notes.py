"""Notes in the user's own cache, of what was found in files; they hold while the files are the same ones.

Same is what has the same device, inode, size and both times: no program can set the second of them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from graphs.atomic import atomic_file

SETTLED = 2.0  # seconds; a younger change may be followed by one that a clock of coarse ticks gives the same time


def cache_home() -> Path:
    """Where this user's caches of Saccade lie; RuntimeError where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saccade"


def mark_of(stat: os.stat_result) -> list[int]:
    """What tells that a file is the same one; the change time, in ns, is last."""
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def read_note(note: Path) -> object:
    """What a note of this user's holds, None for another's; OSError or ValueError where there is none to be read."""
    return json.loads(note.read_text("utf-8")) if note.stat().st_uid == os.getuid() else None


def write_note(note: Path, document: object, youngest: int) -> None:
    """Write a note on files, unless one changed just now; youngest: the last change of one, in ns."""
    if time.time() - youngest / 1e9 < SETTLED:
        return
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_file(note) as partial:
        partial.write_text(json.dumps(document), "utf-8")
