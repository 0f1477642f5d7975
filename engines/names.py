"""transformers, imported without reading the text of its 2,500 files at every start, twice.

Its lazy modules learn from the text of every file below ``transformers/models`` which names there are, 0.25 s for
``transformers`` and as much again for ``transformers.models``: it keeps what it read, but in a cache for 128 folders of
some 550, and under another spelling of the first. Here one reading serves both, and none is needed where the user's
cache holds a note of these very files (their path, inode, size and both times, as ``engines.bundles.remembered`` knows
weights). This leans on one function of transformers, which is pinned: where that is not what it was, transformers reads
as it always did. The function is back in its place when the import is over.

Its packages put another object in their own place while they are imported, and who imports one in another thread
meanwhile is handed the first (CPython waits for that module and then gives the one it found before). So the first
one is told to give what the other gives.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from engines.notes import cache_home, mark_of, read_note, write_note

LIBRARY = "transformers"
READS = "transformers.utils.import_utils"
FUNCTION = "create_import_structure_from_path"
FOLDER = "models"
SCHEMA = "saccade.names/1"
NEEDS = "needs "  # before the packages that some names need, in a note: no file is called so
# A tree of folders and files; a frozenset names the packages that what is below it needs, a leaf a file's public names.
Names = dict[Any, Any]


@contextmanager
def read_once() -> Iterator[None]:
    """While transformers is imported here for the first time: what its modules hold is read once, or not at all."""
    if READS in sys.modules:
        yield
        return
    watch = _Watch()
    sys.meta_path.insert(0, watch)
    try:
        yield
    finally:
        watch.end()


class _Watch:
    """A finder of transformers' modules, as Python finds them, which has a word with some when they were executed.

    One gets a ``Reader``, and packages learn to give what stands in their place.
    """

    def __init__(self) -> None:
        self._reader: Reader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.partition(".")[0] == LIBRARY else None
        is_package = spec is not None and spec.submodule_search_locations is not None
        if spec and (loader := spec.loader) and (name == READS or is_package):
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                loader.exec_module = execute  # type: ignore[method-assign]
                execute(module)
                with suppress(Exception):
                    if name == READS:
                        self._reader = Reader(module)
                    else:
                        _give_what_stands_for(module)

            with suppress(AttributeError):
                loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def end(self) -> None:
        with suppress(ValueError):
            sys.meta_path.remove(self)
        if self._reader:
            self._reader.end()


def _give_what_stands_for(module: ModuleType) -> None:
    """Let a module that another object replaced answer as that one does, to who was handed it before."""
    now = sys.modules.get(module.__name__)
    if now is not None and now is not module and not hasattr(module, "__getattr__"):
        module.__getattr__ = partial(getattr, now)  # type: ignore[method-assign]


class Reader:
    """Stands for the function of a module that reads folders, for that of all models. readings: how often it read."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._plain = module, getattr(module, FUNCTION)
        self._file = Path(str(module.__file__))
        self._folder = str(self._file.parents[1] / FOLDER)
        self._found: Names | None = None
        self.readings = 0
        setattr(module, FUNCTION, self)

    def __call__(self, *arguments: Any, **options: Any) -> Names:
        """What transformers finds in a folder, or in that of an ``__init__.py``."""
        if options or list(map(_folder_of, arguments)) != [self._folder]:
            names: Names = self._plain(*arguments, **options)
            return names
        if self._found is None:
            self._found = noted(self._folder, self._file, self._read)
        return self._found

    def _read(self) -> Names:
        self.readings += 1
        names: Names = self._plain(self._folder)
        return names

    def end(self) -> None:
        """Put the function back."""
        setattr(self._module, FUNCTION, self._plain)


def noted(folder: str, reader: Path, read: Callable[[], Names]) -> Names:
    """What the user's note says of a folder, where it is of these very files; else what is read, and noted.

    reader: the file that knows how to read, one of those that a note is of.
    """
    note, files = None, ""
    with suppress(Exception):  # whatever a note holds, and wherever there can be none, reading is right
        note = _note_of(folder)
        files, _ = _mark_of(folder, reader)
        said: Any = read_note(note)
        if said["schema"] == SCHEMA and said["files"] == files:
            return _names_of(said["names"])
    names = read()
    with suppress(Exception):
        after, youngest = _mark_of(folder, reader)
        if note and after == files:
            write_note(note, {"schema": SCHEMA, "files": files, "names": _document(names)}, youngest)
    return names


def _folder_of(place: Any) -> str:
    return str(place).removesuffix(f"{os.sep}__init__.py")


def _mark_of(folder: str, reader: Path) -> tuple[str, int]:
    """A digest of what tells that all files are the same ones, and the youngest change of one, in ns."""
    stats, folders = {str(reader): reader.stat()}, [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders += [entry.path] if entry.name != "__pycache__" else []
                else:
                    stats[entry.path] = entry.stat()
    told = [(file, mark_of(stat)) for file, stat in sorted(stats.items())]
    return hashlib.sha256(repr(told).encode()).hexdigest(), max(mark[-1] for _, mark in told)


def _note_of(folder: str) -> Path:
    """RuntimeError where the user has no home."""
    return cache_home() / "names" / f"{hashlib.sha256(folder.encode()).hexdigest()}.json"


def _document(names: Names) -> dict[str, Any]:
    """Names as JSON: a frozenset becomes one word, a set a list."""
    return {
        NEEDS + " ".join(sorted(key)) if isinstance(key, frozenset) else key: _document(value)
        if isinstance(value, dict)
        else sorted(value)
        for key, value in names.items()
    }


def _names_of(document: dict[str, Any]) -> Names:
    return {
        frozenset(key.removeprefix(NEEDS).split()) if key.startswith(NEEDS) else key: _names_of(value)
        if isinstance(value, dict)
        else set(value)
        for key, value in document.items()
    }
