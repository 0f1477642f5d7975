"""Writing and reading files of artefacts: atomically, as clones where the disk can, never through links."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
from pathlib import Path, PurePosixPath
from typing import Literal

from graphs.atomic import DISK_FULL, atomic_file, atomic_folder, is_disk_full, refuse_overlap, signals_wait
from graphs.errors import BadArtefact, UsageError

__all__ = [
    "atomic_file",
    "atomic_folder",
    "clone_or_copy",
    "digests_of",
    "is_disk_full",
    "path_inside",
    "refuse_foreign_folder",
    "refuse_overlap",
    "sha256_of",
    "sha256_of_piece",
    "signals_wait",
    "unreadable",
]

PIECE, READ = 1 << 26, 1 << 18  # bytes with a digest of their own; bytes read at once, which a cache holds
FICLONE = 0x40049409  # linux/fs.h


def clone_or_copy(source: Path, target: Path) -> Literal["clone", "copy"]:
    """Make ``target`` the content of ``source``: a copy-on-write clone where the file system can, else a copy.

    Never a link: onnx's loaders refuse hard and symbolic links in external data.
    """
    with source.open("rb") as src, target.open("wb") as dst:
        try:
            fcntl.ioctl(dst, FICLONE, src.fileno())
            return "clone"
        except OSError as e:
            if e.errno in DISK_FULL:
                raise
    shutil.copyfile(source, target)
    return "copy"


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read as a stream."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digests_of(path: Path) -> tuple[str, tuple[str, ...]]:
    """The file's SHA-256 and, where it is longer than one piece, that of every piece, in one reading."""
    whole, pieces = hashlib.sha256(), []
    with path.open("rb") as f:
        while data := f.read(PIECE):
            whole.update(data)
            pieces.append(hashlib.sha256(data).hexdigest())
    return whole.hexdigest(), tuple(pieces) if len(pieces) > 1 else ()


def sha256_of_piece(path: Path, index: int) -> str:
    """The SHA-256 of one piece of a file."""
    digest, left = hashlib.sha256(), PIECE
    with path.open("rb") as f:
        f.seek(index * PIECE)
        while left and (data := f.read(min(left, READ))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def path_inside(folder: Path, name: str) -> Path | None:
    """``folder / name``, or None where that is no place inside: absolute, ``..``, a symbolic link, no file's name."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        return None
    path = folder
    for part in parts:
        path = path / part
        try:
            if path.is_symlink():
                return None
        except ValueError:  # no text that names a file
            return None
        except OSError as e:
            if e.errno == errno.ENAMETOOLONG:
                return None
            raise
    return path


def refuse_foreign_folder(folder: Path, *ours: str) -> None:
    """UsageError where a folder to write results into is a file, or holds things and none of ``ours`` (patterns)."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} exists and is not a folder; give another place to write to")
    if folder.is_dir() and any(folder.iterdir()) and not any(True for name in ours for _ in folder.glob(name)):
        raise UsageError(
            f"{folder} is not empty and has no {ours[0]}, so saccade did not write it and nothing is written into "
            "it; give another place"
        )


def unreadable(path: Path, error: OSError, remedy: str) -> BadArtefact:
    """The error for a file that cannot be read, with what to do about it."""
    why = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
    return BadArtefact(f"{path} {why}; {remedy}")
