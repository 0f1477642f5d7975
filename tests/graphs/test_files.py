"""Nothing half-written bears the final name: exceptions, signals, kills, full disks, leftovers."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from graphs import files
from graphs.atomic import DISK_FULL
from graphs.errors import OperationFailed, UsageError
from graphs.files import atomic_file, atomic_folder, clone_or_copy, is_disk_full, path_inside, sha256_of


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as partial:
        (partial / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    def fail(context):
        with context as partial:
            (partial / "a" if partial.is_dir() else partial).write_text("half")
            raise error

    for context in (atomic_folder(tmp_path / "out"), atomic_file(tmp_path / "file")):
        with pytest.raises(error):
            fail(context)
    assert not list(tmp_path.iterdir())


def test_overwriting_is_asked_for_and_only_of_ours(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as partial:  # an empty folder is no loss
        (partial / "spec.json").write_text("1")
    with pytest.raises(UsageError, match="--overwrite"), atomic_folder(out):
        pass
    with (
        pytest.raises(UsageError, match="saccade did not write it"),
        atomic_folder(out, overwrite=True, holds="manifest.json"),
    ):
        pass
    with atomic_folder(out, overwrite=True, holds="spec.json") as partial:
        (partial / "spec.json").write_text("2")
        assert (out / "spec.json").read_text() == "1"
    assert (out / "spec.json").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="is not a folder"), atomic_folder(out / "spec.json"):
        pass
    with pytest.raises(UsageError, match="is a file"), atomic_folder(out / "spec.json" / "x"):
        pass
    with pytest.raises(UsageError, match="is a folder"), atomic_file(out):
        pass


def test_a_file_is_replaced_in_one_step(tmp_path):
    target = tmp_path / "f"
    target.write_text("old")
    with atomic_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


WRITER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from graphs.files import atomic_folder
    with atomic_folder(Path(sys.argv[1])) as partial:
        (partial / "half").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
    """
)


def writer(target):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_sigterm_cleans_up(tmp_path):
    process = writer(tmp_path / "out")
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_final_name_and_the_next_run_cleans_up(tmp_path):
    process = writer(tmp_path / "out")
    process.kill()
    process.wait(20)
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with atomic_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_living_run_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out") as living:
        with atomic_folder(tmp_path / "out") as other:
            (other / "b").touch()
        assert living.is_dir()
        (tmp_path / "out" / "b").unlink()


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in sorted(DISK_FULL)),
        RuntimeError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    assert is_disk_full(error)

    def fail():
        with atomic_folder(tmp_path / "out") as partial:
            (partial / "half").touch()
            raise error

    with pytest.raises(OperationFailed, match="disk is full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_real_write_that_does_not_fit(tmp_path):
    """The limit on file size stands in for the size of a disk: the write itself fails, half-way."""
    script = (
        "import resource, sys; from pathlib import Path; from graphs.files import atomic_folder\n"
        "from graphs.errors import OperationFailed\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with atomic_folder(Path(sys.argv[1])) as p: (p / 'a').write_bytes(bytes(100_000))\n"
        "except OperationFailed as e: sys.exit(str(e))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the disk is full" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_copy_is_the_same_and_no_link(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(100_000))
    assert clone_or_copy(source, target) in ("clone", "copy")
    assert sha256_of(source) == sha256_of(target)
    assert target.stat().st_nlink == 1
    assert not target.is_symlink()
    with target.open("ab") as f:
        f.write(b"more")
    assert source.stat().st_size == 100_000


def test_cloning_a_full_disk_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.fcntl, "ioctl", full)
    with pytest.raises(OSError, match="full"):
        clone_or_copy(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../../b", "a\\b", "link", "link/x", "\0", "x" * 5000, "a/" * 3000]
)
def test_paths_that_leave(tmp_path, name):
    (tmp_path / "link").symlink_to("/etc")
    assert path_inside(tmp_path, name) is None


def test_paths_that_stay(tmp_path):
    assert path_inside(tmp_path, "a/b.onnx") == tmp_path / "a" / "b.onnx"
