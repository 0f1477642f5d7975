"""transformers imported as we do knows the names that it knows by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engines import names, notes
from engines.names import FUNCTION, READS, Reader, noted

ROOT = Path(__file__).parents[3]
TOLD = f"""
import json, transformers
both = transformers, transformers.models
reader = sys.modules["{READS}"]
print(json.dumps({{
    "modules": [sorted(m._modules) for m in both],
    "of": [sorted(m._class_to_module.items()) for m in both],
    "lacking": [sorted((name, sorted(map(str, of))) for name, of in m._object_missing_backend.items()) for m in both],
    "all": [sorted(set(m.__all__)) for m in both],
    "function": [type(reader.{FUNCTION}).__name__, reader.{FUNCTION}.__name__],
    "readings": readings(),
}}))
"""
PLAIN = """
import sys
sys.modules["torch"] = None  # seconds, and none of the names are its
readings = lambda: None
"""
OURS = f"""{PLAIN}
from engines import names
made = []
class Counted(names.Reader):
    def __init__(self, module):
        super().__init__(module)
        made.append(self)
names.Reader = Counted
readings = lambda: [reader.readings for reader in made]
from engines.processing import _transformers
_transformers()
"""
ELSEWHERE = OURS.replace("made = []", "made = []\nnames.FUNCTION = 'moved_in_another_version'")


def told(code: str, cache: Path) -> dict[str, Any]:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code + TOLD], capture_output=True, text=True, check=True, env=environment, cwd=cache
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_names_are_those_of_a_plain_import_read_once_or_not_at_all(tmp_path: Path) -> None:
    plain, first = told(PLAIN, tmp_path), told(OURS, tmp_path)
    (note,) = (tmp_path / "saccade" / "names").iterdir()
    second, elsewhere = told(OURS, tmp_path), told(ELSEWHERE, tmp_path)
    assert len(plain["of"][0]) > 2000
    # By us: once, from the note, and, where transformers looks otherwise, not at all.
    assert [document.pop("readings") for document in (plain, first, second, elsewhere)] == [None, [1], [0], []]
    assert plain == first == second == elsewhere
    assert note.parent.stat().st_mode & 0o077 == 0


MEANWHILE = f"""{PLAIN}
import time
from engines.processing import load_ahead
load_ahead()
while "transformers" not in sys.modules:
    time.sleep(0.001)
first = sys.modules["transformers"]
from transformers import CLIPVisionConfig
import transformers
print(transformers.LlamaConfig.__name__, CLIPVisionConfig.__name__, first is not sys.modules["transformers"])
try:
    transformers.no_such_name
except AttributeError as e:
    print("no_such_name" in str(e))
"""


def test_another_thread_may_import_it_meanwhile(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", MEANWHILE], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert (done.stdout.split(), done.stderr) == (["LlamaConfig", "CLIPVisionConfig", "True", "True"], "")


NAMES = {
    frozenset({"vision", "torch"}): {"file": {"A", "B"}},
    frozenset(): {"other": set()},
    "folder": {frozenset({"torch>=2.1"}): {"file": {"C"}}, "empty": {}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(notes, "SETTLED", 0)
    inner = tmp_path / "models" / "inner"
    inner.mkdir(parents=True)
    (inner / "file.py").write_text("__all__ = ['A']")
    (tmp_path / "reader.py").write_text("")
    return tmp_path / "models"


@pytest.fixture
def read(folder: Path) -> Callable[[], int]:
    """Ask for the folder's names; how often it has been read so far."""
    times = 0

    def reading() -> names.Names:
        nonlocal times
        times += 1
        return NAMES

    def ask() -> int:
        assert noted(str(folder), folder.parent / "reader.py", reading) == NAMES
        return times

    return ask


def the_note(folder: Path) -> Path:
    (note,) = (folder.parent / "cache" / "saccade" / "names").iterdir()
    return note


def test_a_note_serves_until_a_file_changes(folder: Path, read: Callable[[], int]) -> None:
    assert [read(), read()] == [1, 1]
    file, times = folder / "inner" / "file.py", (folder / "inner" / "file.py").stat()
    file.write_text("__all__ = ['Z']")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [read(), read()] == [2, 2]
    (folder / "new.py").touch()
    assert [read(), read()] == [3, 3]
    (folder.parent / "reader.py").write_text("# reads otherwise")
    assert [read(), read()] == [4, 4]


@pytest.mark.parametrize(
    "broken", ["", "[]", "{}", '{"schema": "saccade.names/1"}', "names", "schema"], ids=lambda text: text or "empty"
)
def test_a_note_that_is_broken_is_not_believed(folder: Path, read: Callable[[], int], broken: str) -> None:
    assert read() == 1
    note = the_note(folder)
    said = json.loads(note.read_text())
    texts = {"names": json.dumps(said | {"names": [1]}), "schema": json.dumps(said | {"schema": "saccade.names/0"})}
    note.write_text(texts.get(broken, broken))
    assert [read(), read()] == [2, 2]


def test_files_that_may_still_change_are_not_noted(
    folder: Path, read: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "SETTLED", 3600)
    assert [read(), read()] == [1, 2]


def test_without_a_cache_the_folder_is_read(read: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert [read(), read()] == [1, 2]


def test_a_reader_hands_on_what_it_does_not_know(folder: Path) -> None:
    module = ModuleType("reader")
    module.__file__ = str(folder.parent / "utils" / "reader.py")
    asked: list[tuple[Any, ...]] = []

    def plain(*arguments: Any, **options: Any) -> tuple[Any, ...]:
        asked.append((*arguments, *options))
        return asked[-1]

    setattr(module, FUNCTION, plain)
    reader = Reader(module)
    assert getattr(module, FUNCTION) is reader
    inner = str(folder / "inner")
    assert [reader(inner), reader(str(folder), 2), reader(str(folder), deep=True)] == asked
    assert asked == [(inner,), (str(folder), 2), (str(folder), "deep")]
    reader.end()
    assert getattr(module, FUNCTION) is plain
