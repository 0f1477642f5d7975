"""Writing artefacts so that nothing half-written ever bears the final name.

A folder or file is written under ``.{name}.partial-{pid}-…`` beside its target, synced, and renamed.
While it is written its partial is locked; the lock dies with the process, so the next run on the same
target knows which partials were left by a killed one, and removes them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.errors import OperationFailed, UsageError

RENAME_EXCHANGE = 2  # linux/fs.h
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}  # why a folder cannot be renamed to a name
TRIES = 9  # names of a partial, each of which another run may take for a dead one's


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False, *, holds: str | None = None) -> Iterator[Path]:
    """Yield a new folder beside ``target`` to write into; on success it becomes ``target``, else it is removed.

    overwrite: replace an existing target, but only one that has the file ``holds`` (so that a slip of
    ``-o`` cannot remove a folder of the user's). Without it an existing, non-empty target is a UsageError, also one
    that appears while the block runs. A full disk becomes OperationFailed; SIGTERM and SIGHUP end the block like an
    interrupt does.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 (resolve() would follow a link at the target)
    _end_exchange(target)
    _check_target(target, overwrite, holds)
    with _disk_full_in_words(target), _signals_raise(), _partial_of(target, Path.mkdir) as partial:
        yield partial
        _sync_tree(partial)
        _place_folder(partial, target, overwrite, holds)
        _sync(target.parent)


@contextmanager
def atomic_file(target: Path, *, overwrite: bool = True, beside: Path | None = None) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; on success it replaces ``target``, else it is removed.

    overwrite: without it a target that exists, or appears while the block runs, is a UsageError; what is no plain file
    always is, a link too. beside: write beside this one instead, on the same disk; for a target whose folder may hold
    no other file.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 (resolve() would follow a link at the target)
    _check_file(target, overwrite)
    near = Path(os.path.abspath(beside)) if beside else target  # noqa: PTH100
    with _disk_full_in_words(target), _signals_raise(), _partial_of(near, Path.touch) as partial:
        yield partial
        _sync(partial)
        _place_file(partial, target, overwrite)
        _sync(target.parent)


def refuse_overlap(out: Path, source: Path, what: str, *, within: bool = False) -> None:
    """UsageError where writing ``out`` would replace what is read, or lie in it; ``what`` is how messages call that.

    within: it may lie there, for not the whole folder is read.
    """
    written, read = Path(out).resolve(), Path(source).resolve()
    if read.is_relative_to(written):
        raise UsageError(f"{out} holds {what} itself, which would be replaced; give another place")
    if not within and written.is_relative_to(read):
        raise UsageError(f"{out} lies in {what}, which is read; give a place outside it")


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, ours or a library's, means that no more could be written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    said = str(error)  # safetensors words it "(os error 28)"; shutil collects the system's own sentences
    return any(f"(os error {code})" in said or os.strerror(code) in said for code in DISK_FULL)


@contextmanager
def _disk_full_in_words(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if is_disk_full(e):
            raise OperationFailed(
                f"the disk is full while writing {target}; nothing was left there; make room and run it again"
            ) from e
        raise


@contextmanager
def _partial_of(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new partial of ``target``, locked; whatever bears its name afterwards is removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{target.parent} is a file, so nothing can be written below it; give another place") from None
    _remove_stale(target)
    for _ in range(TRIES):
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")
        with ExitStack() as held:
            held.callback(_remove, partial)
            make(partial)
            # Until the lock is had, another run's _remove_stale takes it for a dead one's.
            with suppress(FileNotFoundError, BlockingIOError):
                held.enter_context(locked(partial))
                if partial.exists():
                    held_until_here = held.pop_all()
                    break
    else:
        raise OperationFailed(f"other runs write to {target} at the same time; wait for them, or give another place")
    with held_until_here:
        yield partial


def _check_target(target: Path, overwrite: bool, holds: str | None) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder; give another place to write to")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target} exists and is not empty; give another place, or --overwrite to replace it")
    if holds and not (target / holds).is_file():
        raise UsageError(
            f"{target} has no {holds}, so saccade did not write it and it is not replaced; give another place"
        )


def _check_file(target: Path, overwrite: bool) -> None:
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISDIR(mode):
        raise UsageError(f"{target} is a folder; give a file name to write to")
    if stat.S_ISLNK(mode):
        raise UsageError(f"{target} is a symbolic link, which is not replaced; give the name of a plain file")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{target} is a device, pipe or socket, which is not replaced; give the name of a plain file")
    if not overwrite:
        raise UsageError(f"{target} exists; give another name, or --overwrite to replace it")


def _place_folder(partial: Path, target: Path, overwrite: bool, holds: str | None) -> None:
    """Give a finished folder its name; what came to stand there meanwhile is checked like what stood there before."""
    try:
        partial.rename(target)  # nothing but an empty folder gives way
    except OSError as e:
        if e.errno not in TAKEN:
            raise
        _check_target(target, overwrite, holds)
        if not overwrite:
            raise UsageError(f"something else created {target} while it was being written; run it again") from None
        _exchange(partial, target)  # the partial's name now bears the old one, removed on the way out


def _place_file(partial: Path, target: Path, overwrite: bool) -> None:
    _check_file(target, overwrite)
    if not overwrite:
        try:
            os.link(partial, target)
        except FileExistsError:
            _check_file(target, overwrite)
            raise UsageError(f"something else created {target} while it was being written; run it again") from None
        except OSError:  # a file system without hard links; checked a moment ago
            partial.rename(target)
        return
    partial.replace(target)


def _remove_stale(target: Path) -> None:
    """Remove the partials of ``target`` whose writer is dead: their lock can be had."""
    for left in target.parent.glob(f".{_escaped(target.name)}.partial-*"):
        with suppress(OSError), locked(left):
            _remove(left)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the advisory lock of a file or folder; OSError where another process has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders' names in one step where the system can, else put ``b`` aside until ``a`` bears its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2") and libc.renameat2(-100, bytes(a), -100, bytes(b), RENAME_EXCHANGE) == 0:
        return
    aside = _aside(b)
    try:
        with locked(b):
            try:
                b.rename(aside)
                a.rename(b)
            except BaseException:
                with suppress(OSError):
                    aside.rename(b)
                raise
            aside.rename(a)
    except BlockingIOError:
        raise OperationFailed(f"another run is replacing {b} right now; wait for it and run this again") from None


def _aside(target: Path) -> Path:
    """Where an old folder lies for a moment; no name of a partial, for a kill in that moment must not cost it."""
    return target.with_name(f".{target.name}.saccade-aside")


def _end_exchange(target: Path) -> None:
    """After a kill in the middle of ``_exchange``: the old folder back, or away where the new one stands."""
    if not target.name:
        return
    aside = _aside(target)
    with suppress(OSError), locked(aside):
        try:
            aside.rename(target)  # nothing but an empty folder gives way
        except OSError as e:
            if e.errno in TAKEN - {errno.ENOTDIR}:
                _remove(aside)


def _sync_tree(folder: Path) -> None:
    for here, _, names in os.walk(folder):
        for name in names:
            _sync(Path(here, name))
        _sync(Path(here))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP are noted, and end the process behind it. In other threads it does nothing.

    For libraries whose C++ no exception may cross: they make others of it, or abort.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _signals.wait = _signals.wait, True
    try:
        yield
    finally:
        _signals.wait = outer
        if _signals.noted and not outer:
            raise SystemExit(128 + _signals.noted)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit, unless the program handles them itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _exit_on)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
            _signals.noted = 0


@dataclass
class _Signals:
    """noted: the number of the first that came, 0 for none. wait: whether it is raised later."""

    noted: int = 0
    wait: bool = False


_signals = _Signals()


def _exit_on(number: int, _: Any) -> None:
    _signals.noted = _signals.noted or number
    if not _signals.wait:
        raise SystemExit(128 + number)
