"""What a verb says while it works: progress and warnings on stderr, one JSON document on stdout.

On a terminal a loop shows a rich progress bar. Elsewhere (a log, a pipe) it is a plain line at the
start, one every ten seconds, and one at the end with the time it took. rich is imported only when
a bar is drawn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


class Step(Protocol):
    """A piece of work under way; ``advance`` counts, ``note`` says what is being done right now."""

    def advance(self, count: int = 1) -> None:
        """Count ``count`` units as done."""

    def note(self, text: str) -> None:
        """Replace the remark behind the title."""


def say(message: str) -> None:
    """Write one line of talk to stderr."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201 (this is the place that may)


def warn(message: str) -> None:
    """Write one warning to stderr."""
    say(f"warning: {message}")


def percent(share: float) -> str:
    """A share that was asked for or promised, with every digit that it has: 0.0125 is 1.25%."""
    return f"{100 * share:g}%"


@contextmanager
def step(title: str, total: int | None = None) -> Iterator[Step]:
    """Show that ``title`` is under way until the block ends; ``total`` is the number of units."""
    shown: _Bar | _Lines = _Bar(title, total) if sys.stderr.isatty() else _Lines(title, total)
    started = time.perf_counter()
    try:
        yield shown
    except BaseException:
        shown.close(None)
        raise
    shown.close(time.perf_counter() - started)


def track(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` while a step counts them."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with step(title, total) as shown:
        for item in items:
            yield item
            shown.advance()


def emit_json(document: dict[str, Any]) -> None:
    """Write one document as the last line of stdout; a number that JSON does not know is an error."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, default=_plain)
    text = text.encode("utf-8", "replace").decode("utf-8")  # a file name may hold bytes that are no UTF-8
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def emit(document: dict[str, Any], as_json: bool, words: Callable[[dict[str, Any]], Iterable[str]]) -> None:
    """Write a verb's result on stdout: the document, or what ``words`` make of it, line by line."""
    if as_json:
        emit_json(document)
    else:
        sys.stdout.writelines(f"{line}\n" for line in words(document))
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Turn paths and numpy values into what JSON knows."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


class _Bar:
    """A step on a terminal."""

    def __init__(self, title: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", style="dim"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, remark="")
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, remark=text)

    def close(self, seconds: float | None) -> None:
        self._progress.stop()
        if seconds is not None:
            say(f"{self._title}: done in {seconds:.1f} s")


class _Lines:
    """A step in a log."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._started = time.monotonic()
        self._next_line = self._started + SECONDS_BETWEEN_LINES
        say(f"{title} …")

    def advance(self, count: int = 1) -> None:
        self._done += count
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            said = f"{self._title}: {self._done}" + (f" of {self._total}" if self._total else "")
            say(said + (f", about {self._left():.0f} s left" if self._total and self._done else ""))

    def _left(self) -> float:
        """Seconds, at the pace so far."""
        assert self._total
        return (time.monotonic() - self._started) * (self._total - self._done) / self._done

    def note(self, text: str) -> None:
        """Leave remarks out of a log."""

    def close(self, seconds: float | None) -> None:
        if seconds is not None:
            say(f"{self._title}: done in {seconds:.1f} s")
