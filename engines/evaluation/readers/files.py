"""What readers share: JSON of a known form, entries with their place, images by their usual names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from graphs.errors import BadArtefact, SaccadeError
from graphs.files import unreadable

Record: TypeAlias = Mapping[str, Any]
Item: TypeAlias = tuple[str, Record | SaccadeError]


@dataclass(frozen=True)
class Files:
    """Where a benchmark lies. images: the folder that file names are relative to."""

    data: Path
    images: Path
    annotations: Path | None = None


def text_of(path: Path, remedy: str) -> str:
    """The file's text; BadArtefact where it cannot be read or is none. remedy: what to do about it."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadArtefact(f"{path} is not UTF-8 text; {remedy}") from None
    except OSError as e:
        raise unreadable(path, e, remedy) from None


def json_of(path: Path, remedy: str) -> Any:
    """The file's JSON; BadArtefact where it is none."""
    try:
        return json.loads(text_of(path, remedy))
    except (ValueError, RecursionError) as e:
        raise BadArtefact(f"{path} is not JSON ({e}); {remedy}") from None


def listed(path: Path, document: Any, key: str | None, remedy: str) -> list[Any]:
    """The list below ``key`` of a file's JSON (None: the whole of it); BadArtefact for another form."""
    found = document.get(key) if key and isinstance(document, dict) else document
    if not isinstance(found, list):
        what = f"a list named {key!r}" if key else "a list"
        raise BadArtefact(f"{path} holds no {what.removeprefix('a ')}, so it is not a file of that benchmark; {remedy}")
    return found


def numbered(path: Path, found: Sequence[Any], name: str) -> Iterator[tuple[str, Any]]:
    """Each entry with where it stands; name: the key of its own number."""
    for i, entry in enumerate(found, 1):
        own = f" ({name} {entry[name]})" if isinstance(entry, dict) and name in entry else ""
        yield f"{path}, entry {i}{own}", entry


def lines_of(path: Path, remedy: str) -> Iterator[tuple[str, str]]:
    """The lines of a text file that say something, each with where it stands."""
    for i, line in enumerate(text_of(path, remedy).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {i}", line


def items(entries: Iterable[tuple[str, Any]], record: Callable[[Any], Record]) -> Iterator[Item]:
    """What ``record`` makes of each entry, or why it makes nothing of it."""
    for where, entry in entries:
        try:
            made: Record | SaccadeError = record(entry)
        except SaccadeError as e:
            made = e
        yield where, made


def an_object(entry: Any) -> Record:
    """The entry, which must be an object."""
    if not isinstance(entry, dict):
        raise BadArtefact(f"this is {type(entry).__name__}, not an object with keys; correct it")
    return entry


def text_at(entry: Record, key: str) -> str:
    """A text, or a number as text, below a key; BadArtefact where there is none."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise BadArtefact(f"{key} is missing or not text, got {value!r:.60}; correct it")
    return str(value).strip()


def texts_at(entry: Record, key: str) -> list[str]:
    """The texts of a list below a key; BadArtefact for anything else."""
    value = entry.get(key)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadArtefact(f"{key} must be a list of texts, got {value!r:.60}; correct it")
    return value


def image_named(folder: Path, *names: str) -> str:
    """The first of these files that is there, below the folder; the first name where none is."""
    try:
        found = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    except (OSError, ValueError) as e:  # too long, or NUL
        raise BadArtefact(f"{names[0]!r:.60} cannot be a file's name ({e.__class__.__name__}); correct it") from None
    return str(found)


def lettered(question: str, options: Mapping[str, str], answer: str) -> tuple[str, list[str]]:
    """A multiple-choice question with its options below it, and the right one's letter and text.

    answer: "" where it is not published. Raises BadArtefact where the right letter is not among the options.
    """
    if len(options) < 2:
        raise BadArtefact(f"there are {len(options)} options to choose from; give at least 2")
    if answer and answer not in options:
        raise BadArtefact(f"the answer {answer!r} is not among the options {', '.join(options)}; correct it")
    lines = [question, *(f"{letter}. {text}" for letter, text in options.items())]
    return "\n".join(lines), [answer, options[answer]] if answer else []
