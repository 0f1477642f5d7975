"""What was asked so far, on disk: a JSONL file, a header that names bundles, data and settings, then a line a question.

A run that was interrupted goes on from it; two runs do not write to one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from engines.evaluation.data import Example
from graphs.atomic import locked
from graphs.errors import BadArtefact, UsageError
from graphs.files import unreadable

SCHEMA = "saccade.eval-journal/4"
REMEDY = "give another folder, or remove this one"
Row: TypeAlias = dict[str, Any]


def opened_journal(path: Path, header: Row, examples: Sequence[Example]) -> list[Row]:
    """The rows of a journal with this header, made where there is none; a line that was cut short is left out.

    Raises UsageError for the journal of another header, BadArtefact for a file that is none, and for rows that are not
    the first examples' in their order.
    """
    wanted = {"schema": SCHEMA, **header}
    first_line = json.dumps(wanted) + "\n"
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as e:
        raise unreadable(path, e, "give another folder") from None
    if b"\n" not in content and first_line.encode().startswith(content):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"), alone(path):
            if path.read_bytes() == content:
                path.write_text(first_line, "utf-8")
                return []
        return opened_journal(path, header, examples)  # another run began it meanwhile
    try:
        first, *rows = [json.loads(line) for line in _whole_lines(content)] or [None]
    except (ValueError, RecursionError):
        raise BadArtefact(f"{path} is not a journal of an evaluation; {REMEDY}") from None
    if first != wanted:
        raise UsageError(f"{path} was written for another bundle, data or settings; {REMEDY}")
    for i, row in enumerate(rows):
        if i >= len(examples) or not _is_of(row, examples[i]):
            raise BadArtefact(
                f"{path}, line {i + 2}, is not the answer to question {i + 1}, as if two runs had written; {REMEDY}"
            )
    return rows


@contextmanager
def appending(path: Path, done: int) -> Iterator[Callable[[Row], None]]:
    """How a row is added behind the ``done`` that were read; each is on disk when the call returns.

    UsageError where another run writes to the journal, or wrote to it since it was read.
    """
    with alone(path):
        content = path.read_bytes()
        lines = _whole_lines(content)
        if len(lines) != 1 + done:
            raise UsageError(f"another run wrote to {path} meanwhile; give the same command again")
        os.truncate(path, content.rfind(b"\n") + 1)
        with path.open("a", encoding="utf-8", errors="replace") as file:  # of file names that are no UTF-8

            def add(row: Row) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()

            yield add


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other runs from writing to a file; UsageError where one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except BlockingIOError:
            raise UsageError(f"another run writes to {path}; wait until it is done or give another folder") from None
        except OSError as e:
            raise unreadable(path, e, "give another folder") from None
        yield


def _whole_lines(content: bytes) -> list[bytes]:
    return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]


def _is_of(row: object, example: Example) -> bool:
    return (
        isinstance(row, dict)
        and row.get("digest") == example.digest
        and all(isinstance(row.get(part), dict) for part in ("small", "large"))
    )
