"""Names taken meanwhile, kinds of files that are not replaced, runs that meet, outputs that hold inputs."""

import ctypes
import errno
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from graphs import atomic
from graphs.errors import OperationFailed, UsageError
from graphs.files import atomic_file, atomic_folder, refuse_overlap, signals_wait


def folder_of_work(path):
    path.mkdir()
    (path / "work").write_text("years")


def link_to_work(path):
    (path.parent / "work").write_text("years")
    path.symlink_to("work")


APPEARS = {
    folder_of_work: "not empty",
    lambda path: path.write_text("years"): "not a folder",
    link_to_work: "not a folder",
}


def write_while(context, appears):
    with context as partial:
        (partial / "new" if partial.is_dir() else partial).write_text("new")
        appears()


@pytest.mark.parametrize("appears", APPEARS)
def test_what_appears_while_a_folder_is_written_is_kept(tmp_path, appears):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=APPEARS[appears]):
        write_while(atomic_folder(out), lambda: appears(out))
    assert (out / "work" if out.is_dir() else out).read_text() == "years"
    assert not list(tmp_path.glob(".*"))


def test_what_appears_while_a_folder_is_overwritten_is_replaced_where_it_is_ours(tmp_path):
    with pytest.raises(UsageError, match="saccade did not write it"):
        write_while(atomic_folder(tmp_path / "a", True, holds="spec.json"), lambda: folder_of_work(tmp_path / "a"))
    write_while(atomic_folder(tmp_path / "b", True, holds="work"), lambda: folder_of_work(tmp_path / "b"))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_one_is_written_is_kept(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "f"
    with pytest.raises(UsageError, match="--overwrite"):
        write_while(atomic_file(target, overwrite=False), lambda: target.write_text("years"))
    assert target.read_text() == "years"
    with pytest.raises(UsageError, match="--overwrite"), atomic_file(target, overwrite=False):
        pass
    with atomic_file(tmp_path / "g", overwrite=False) as partial:
        partial.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "g"]
    assert (tmp_path / "g").stat().st_nlink == 1


def test_only_a_plain_file_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    os.mkfifo("pipe")
    (tmp_path / "plain").write_text("years")
    Path("link").symlink_to("plain")
    Path("nowhere").symlink_to("gone")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    kinds = {name: Path(name).lstat().st_mode for name in ("pipe", "link", "nowhere", "socket")}
    for name, mode in kinds.items():
        with pytest.raises(UsageError, match=f"{name} is a .*, which is not replaced"), atomic_file(Path(name)):
            pass
        assert Path(name).lstat().st_mode == mode
    assert (tmp_path / "plain").read_text() == "years"


@pytest.fixture
def no_exchange(monkeypatch):
    """A file system that cannot swap two names."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())


def old_and_new(out):
    with atomic_folder(out, overwrite=True, holds="spec.json") as partial:
        (partial / "spec.json").write_text("new")
    return (out / "spec.json").read_text()


@pytest.mark.usefixtures("no_exchange")
def test_without_an_exchange_of_names_the_old_folder_is_replaced_or_stays(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "spec.json").write_text("old")
    real = Path.rename

    def interrupted(self, target):
        if target == out and not out.exists() and ".partial-" in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        old_and_new(out)
    assert (out / "spec.json").read_text() == "old"
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())
    assert old_and_new(out) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_two_names_costs_no_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "spec.json").write_text("old")
    for between in (lambda: None, out.mkdir):
        out.rename(atomic._aside(out))
        between()
        with pytest.raises(UsageError, match="not empty"), atomic_folder(out):
            pass
        assert (out / "spec.json").read_text() == "old"
    folder_of_work(atomic._aside(out))
    assert old_and_new(out) == "new", "the kill came after the new one had its name"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_partial_that_another_run_sweeps_before_it_is_locked_is_made_again(tmp_path):
    out, made = tmp_path / "out", []

    def make(path):
        path.mkdir()
        if len(made) < 2:
            atomic._remove_stale(out)
        made.append(path)

    with atomic._partial_of(out, make) as partial:
        atomic._remove_stale(out)
        assert partial.is_dir()
    assert len(set(made)) == 3

    def swept(path):
        path.mkdir()
        atomic._remove_stale(out)

    with pytest.raises(OperationFailed, match="other runs write"), atomic._partial_of(out, swept):
        pass
    assert not list(tmp_path.iterdir())


def test_what_is_read_and_what_is_written_lie_apart(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in ("in", "link", "in/x/..", "."):
        with pytest.raises(UsageError, match="holds the export itself, which would be replaced"):
            refuse_overlap(tmp_path / out, tmp_path / "in", "the export")
    with pytest.raises(UsageError, match="lies in the export"):
        refuse_overlap(tmp_path / "link" / "b", tmp_path / "in", "the export")
    refuse_overlap(tmp_path / "input", tmp_path / "in", "the export")
    refuse_overlap(tmp_path / "link" / "b", tmp_path / "in", "the export", within=True)
    with pytest.raises(UsageError, match="would be replaced"):
        refuse_overlap(tmp_path / "in", tmp_path / "in", "the export", within=True)


@pytest.mark.parametrize("opened", [atomic_file, atomic_folder])
def test_what_is_written_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch, opened):
    out, synced, written = tmp_path / "out", [], set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, out.exists())))
    with opened(out) as partial:
        if partial.is_dir():
            (partial / "a").mkdir()
            (partial / "a" / "b").write_text("new")
            written |= {path.stat().st_ino for path in partial.rglob("*")}
        written.add(partial.stat().st_ino)
    assert {inode for inode, named in synced if not named} == written
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_a_file_in_an_old_folders_place_does_not_cost_the_old_folder(tmp_path):
    out = tmp_path / "out"
    folder_of_work(atomic._aside(out))
    out.write_text("years")
    with pytest.raises(UsageError, match="not a folder"), atomic_folder(out, overwrite=True):
        pass
    assert (atomic._aside(out) / "work").read_text() == "years"


@pytest.mark.parametrize(("name", "like"), [("out[12]", "out1"), ("out?", "outs"), ("out*", "out-of-others")])
def test_only_partials_of_that_very_name_are_removed(tmp_path, name, like):
    dead, others = (tmp_path / f".{n}.partial-1-abc" for n in (name, like))
    dead.touch()
    others.touch()
    with atomic_file(tmp_path / name):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([others, tmp_path / name])


def test_signals_are_taken_for_the_while_and_only_where_nobody_handles_them(tmp_path):
    def handled(*_):
        raise AssertionError("no signal was sent")

    old = signal.signal(signal.SIGHUP, handled)
    try:
        with atomic_file(tmp_path / "f"):
            assert signal.getsignal(signal.SIGHUP) is handled
            assert signal.getsignal(signal.SIGTERM) is atomic._exit_on
        assert signal.getsignal(signal.SIGHUP) is handled
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_signal_waits_for_the_end_of_what_no_exception_may_cross(tmp_path):
    reached = []
    with pytest.raises(SystemExit) as ended, atomic_folder(tmp_path / "out"):  # noqa: PT012
        with signals_wait():
            with signals_wait():
                signal.raise_signal(signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")
        reached.append("behind")
    assert (ended.value.code, reached) == (143, ["inner", "outer"])
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "out"), signals_wait():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        raise TypeError("made of it by a library")
    with atomic_folder(tmp_path / "out"), signals_wait():
        pass
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_thread_writes_without_taking_signals(tmp_path):
    def write():
        with atomic_file(tmp_path / "f") as partial:
            partial.write_text("new")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert (tmp_path / "f").read_text() == "new"


def test_a_file_may_be_written_beside_the_folder_that_is_to_hold_no_other(tmp_path):
    (tmp_path / "folder").mkdir()
    with atomic_file(tmp_path / "folder" / "f", beside=tmp_path / "folder") as partial:
        assert partial.parent == tmp_path
        partial.write_text("new")
    assert (tmp_path / "folder" / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
