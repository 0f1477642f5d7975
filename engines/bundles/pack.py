"""A bundle as one file: an uncompressed tar whose first member is the manifest, so every byte behind it is checked.

tar, not zip: it is written and read front to back (weights of any size, no directory at the end that could say
otherwise than the entries do), and weights do not compress. Members stand in the manifest's order with nothing of this
machine in their headers, so one bundle gives one sequence of bytes. A header is believed where the manifest agrees.
"""

from __future__ import annotations

import errno
import hashlib
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

from engines.bundles.bundle import checked_manifest
from engines.bundles.manifest import MANIFEST_FILE, REBUILD, FileEntry, Manifest, manifest_from
from graphs.console import step
from graphs.errors import BadArtefact
from graphs.files import atomic_file, atomic_folder, path_inside, refuse_overlap, unreadable

CHUNK = 4 << 20
MOST_MANIFEST = 256 << 20  # what is read into memory before anything is known to be true
MEGA = 1_000_000
AGAIN = "get the file again, or pack the bundle again with: saccade pack"
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


def pack_bundle(bundle: Path | str, out: Path | str, *, overwrite: bool = False) -> Manifest:
    """Write a bundle into the file ``out`` and return its manifest; every digest is checked on the way.

    Weights are files of a bundle, also of exports made in place or of links, so all of it travels. Errors: BadArtefact
    for a bundle that is broken or tampered with, UsageError for an existing file without ``overwrite``, OperationFailed
    for a full disk; nothing is left under the final name then.
    """
    bundle, out = Path(bundle), Path(out)
    manifest = checked_manifest(bundle, check="size")  # the digests of weights are compared while they are written
    refuse_overlap(out, bundle, "the bundle")
    text = (bundle / MANIFEST_FILE).read_bytes()
    if manifest_from(text, bundle / MANIFEST_FILE) != manifest:
        raise BadArtefact(f"{bundle / MANIFEST_FILE} changed while it was packed; pack it again")
    with (
        atomic_file(out, overwrite=overwrite) as partial,
        _progress("packing", manifest) as advance,
        partial.open("wb") as file,
        tarfile.TarFile(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=CHUNK) as tar,
    ):
        tar.addfile(_header(MANIFEST_FILE, len(text)), BytesIO(text))
        for entry in manifest.files:
            _add(tar, bundle, entry, advance)
    return manifest


def unpack_bundle(file: Path | str, out: Path | str, *, overwrite: bool = False) -> Manifest:
    """Write a packed bundle into the folder ``out`` and return its manifest.

    The folder gets its name when every file of the manifest is there with its digest. Errors: BadArtefact for what is
    no packed bundle, is truncated or changed, or holds anything but plain files of the manifest, each once; UsageError
    for a folder that is not empty; OperationFailed for a full disk.
    """
    file = Path(file)
    refuse_overlap(Path(out), file, f"the file {file}")
    try:
        opened = file.open("rb")
    except OSError as e:
        raise unreadable(file, e, "give the file that saccade pack wrote") from None
    with opened as stream, atomic_folder(Path(out), overwrite, holds=MANIFEST_FILE) as work:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                manifest = _unpacked(tar, file, work)
            _check_end(stream, file)
        except (tarfile.TarError, ValueError, RecursionError) as e:  # ValueError: of tarfile, in a header's numbers
            raise BadArtefact(f"{file} is not a packed bundle, or is damaged or truncated ({e}); {AGAIN}") from None
    return manifest


def _header(name: str, size: int) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header


def _add(tar: tarfile.TarFile, bundle: Path, entry: FileEntry, advance: Callable[[int], None]) -> None:
    """Append one file while it is hashed; the digest is known when the last byte is written."""
    try:
        with (bundle / entry.path).open("rb") as file:
            watched = _Hashed(file, advance)
            tar.addfile(_header(entry.path, entry.bytes), watched)
            whole = not file.read(1)
    except OSError as e:
        if e.filename is not None:
            raise unreadable(bundle / entry.path, e, REBUILD) from None
        if e.errno is not None:  # the file that is written
            raise
        whole = False  # tarfile's own, for a file that became shorter
    if not whole or watched.digest.hexdigest() != entry.sha256:
        raise BadArtefact(f"{bundle}: {entry.path} was changed after the build (its digest does not match); {REBUILD}")


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self.digest = hashlib.sha256()
        self._file, self._advance = file, advance

    def read(self, size: int = -1) -> bytes:
        """Read on."""
        block = self._file.read(size)
        self.digest.update(block)
        self._advance(len(block))
        return block


def _unpacked(tar: tarfile.TarFile, file: Path, work: Path) -> Manifest:
    """The manifest, after every file that it lists was written below ``work`` and its digest compared."""
    first = tar.next()
    if first is None or first.name != MANIFEST_FILE or first.type not in PLAIN or first.size > MOST_MANIFEST:
        raise BadArtefact(f"{file} is not a packed bundle: it does not begin with {MANIFEST_FILE}; {AGAIN}")
    text = b"".join(_blocks(tar, first, file))
    manifest = manifest_from(text, file / MANIFEST_FILE)
    (work / MANIFEST_FILE).write_bytes(text)
    entries = {entry.path: entry for entry in manifest.files}
    if len(entries) != len(manifest.files):
        raise BadArtefact(f"{file}: its manifest lists a file twice; do not use it")
    with _progress("unpacking", manifest) as advance:
        while member := tar.next():
            entry = entries.pop(member.name, None)
            _check_member(file, work, member, entry, manifest)
            assert entry
            digest = hashlib.sha256()
            with _new(work / entry.path, file) as written:
                for block in _blocks(tar, member, file):
                    digest.update(block)
                    written.write(block)
                    advance(len(block))
            if digest.hexdigest() != entry.sha256:
                raise BadArtefact(f"{file}: {entry.path} was changed (its digest does not match); {AGAIN}")
    if entries:
        more = f" (and {len(entries) - 1} more)" if len(entries) > 1 else ""
        raise BadArtefact(f"{file} is damaged or truncated: {min(entries)} is missing{more}; {AGAIN}")
    return manifest


def _new(path: Path, file: Path) -> IO[bytes]:
    """A file that was not there; BadArtefact where the manifest's names lie in each other's way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")
    except (FileExistsError, NotADirectoryError):
        raise BadArtefact(f"{file}: two of its files are {path.name!r} at one place; do not use it") from None
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:
            raise
        raise BadArtefact(f"{file}: a file of it would be {path.name[:40]!r}, too long a path here; {AGAIN}") from None


def _check_member(file: Path, work: Path, member: tarfile.TarInfo, entry: FileEntry | None, manifest: Manifest) -> None:
    """A plain file of the manifest, for the first time, of its size, at a place inside the folder."""
    name = member.name
    if path_inside(work, name) is None:
        raise BadArtefact(f"{file}: {name!r} leaves the folder it is unpacked into; do not use it")
    if member.type not in PLAIN or member.issparse():
        raise BadArtefact(
            f"{file}: {name!r} is a link or another special entry, and a bundle holds files; do not use it"
        )
    if entry is None:
        again = name == MANIFEST_FILE or any(name == known.path for known in manifest.files)
        what = "is in it twice" if again else "is not in its manifest"
        raise BadArtefact(f"{file}: {name!r} {what}; do not use it")
    if member.size != entry.bytes:
        raise BadArtefact(f"{file}: {name} has {member.size} bytes, its manifest says {entry.bytes}; {AGAIN}")


def _blocks(tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> Iterator[bytes]:
    """A member's content; BadArtefact where the file ends before it does."""
    content = tar.extractfile(member)
    assert content
    left = member.size
    while left:
        block = content.read(min(CHUNK, left))
        if not block:
            raise BadArtefact(f"{file} is truncated: it ends within {member.name}; {AGAIN}")
        left -= len(block)
        yield block


def _check_end(stream: IO[bytes], file: Path) -> None:
    """Behind the last member stand tar's two blocks of zeros, zeros up to a whole record, and nothing else."""
    stream.seek(max(0, stream.tell() - tarfile.BLOCKSIZE))  # one of the two was read, if it is there
    end = stream.read(2 * tarfile.RECORDSIZE)
    short = len(end) < 2 * tarfile.BLOCKSIZE
    if not short and (any(end) or len(end) == 2 * tarfile.RECORDSIZE):
        raise BadArtefact(f"{file} continues after its end; {AGAIN}")
    if short or stream.tell() % tarfile.RECORDSIZE:
        raise BadArtefact(f"{file} is truncated: its end is missing; {AGAIN}")


@contextmanager
def _progress(verb: str, manifest: Manifest) -> Iterator[Callable[[int], None]]:
    """A step in whole megabytes, told of single bytes."""
    total = sum(entry.bytes for entry in manifest.files)
    done = 0
    with step(f"{verb}, in MB", -(-total // MEGA)) as shown:

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            shown.advance(done // MEGA - before // MEGA)

        yield advance
