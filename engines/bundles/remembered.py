"""What was hashed once is not hashed again while it is the same file: same device, inode, size and both of its times.

As a version control system knows that a file of its tree did not change. A write, a rename into its place, a copy or a
restored modification time all give another inode or another change time, which no program can set. Not seen is what
passes the file system by: a failing disk, or a write to the device itself; ``saccade verify`` and ``saccade pack`` hash
every byte. Notes lie in the user's own cache, one file per bundle and target, and only graphs and weights are taken on
trust: engines, which hold code, are hashed each time they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from engines.bundles.manifest import Manifest
from engines.notes import cache_home, mark_of, read_note, write_note
from graphs.errors import SaccadeError

SCHEMA = "saccade.remembered/1"
Marks = dict[str, list[int]]


def marks_of(bundle: Path, files: Iterable[str]) -> Marks:
    """What tells that files are the same ones; a file that is missing has no mark."""
    marks = {}
    for file in files:
        with suppress(OSError, ValueError):  # a name with NUL
            marks[file] = mark_of((bundle / file).lstat())
    return marks


def is_remembered(bundle: Path, manifest: Manifest, target: str, marks: Marks) -> bool:
    """Whether these very files were checked against this very manifest for the target, by this user."""
    with suppress(OSError, ValueError, RuntimeError):
        return read_note(_note_of(bundle, target)) == _document(manifest, marks)
    return False


def remember(bundle: Path, manifest: Manifest, target: str, before: Marks, after: Marks) -> None:
    """Note that files were checked, unless one changed meanwhile or just now; without a cache nothing is noted."""
    if before != after:
        return
    with suppress(OSError, SaccadeError, RuntimeError):
        youngest = max((mark[-1] for mark in after.values()), default=0)
        write_note(_note_of(bundle, target), _document(manifest, after), youngest)


def _document(manifest: Manifest, marks: Marks) -> dict[str, object]:
    return {"schema": SCHEMA, "manifest": manifest.sha256, "files": marks}


def _note_of(bundle: Path, target: str) -> Path:
    """RuntimeError where the user has no home."""
    name = hashlib.sha256(f"{bundle.resolve()}\0{target}".encode()).hexdigest()
    return cache_home() / "checked" / f"{name}.json"
