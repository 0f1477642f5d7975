"""An answer on its way: pieces of text, then the whole of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from engines.answer import Answer
from engines.generate import Generation
from graphs.errors import UsageError

UNFINISHED = "\ufffd"  # what a tokenizer decodes part of a character to


class Stream:
    """Iterate over it for pieces of text; ``answer`` is there once it has ended."""

    def __init__(self, parts: Iterator[str | Answer], lock: AbstractContextManager[object] | None = None) -> None:
        """Take what gives the pieces, then the answer. lock: held while one is made, not between them."""
        self._parts, self._lock = parts, lock or nullcontext()
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        while (part := self._next()) is not None:
            if isinstance(part, Answer):
                self._answer = part
            else:
                yield part

    def _next(self) -> str | Answer | None:
        with self._lock:
            return next(self._parts, None)

    @property
    def answer(self) -> Answer:
        """The whole answer; UsageError while there are pieces to come."""
        if self._answer is None:
            raise UsageError("the answer is not complete yet; iterate over the stream to its end first")
        return self._answer

    def finish(self) -> Answer:
        """Run to the end and return the answer."""
        for _ in self:
            pass
        return self.answer


def pieces_of(run: Generation) -> Iterator[str]:
    """Yield the text that each token adds; what a later token could still change is held back.

    The pieces joined are the whole text, wherever decoding more tokens only ever adds to it.
    """
    said = ""
    for _ in run:
        # Before white space in front is dropped, for a stop string may begin with it.
        text = without_begun_stop(run.written.rstrip(), run.options.stop).lstrip()
        if text.startswith(said) and not text.endswith(UNFINISHED) and text != said:
            yield text[len(said) :]
            said = text
    text = run.text
    if text.startswith(said) and text != said:
        yield text[len(said) :]


def without_begun_stop(text: str, stop: Sequence[str]) -> str:
    """The text without an end that may become a stop string."""
    begins = {string[:n].rstrip() for string in stop for n in range(1, len(string))} - {""}
    held = max((len(begin) for begin in begins if text.endswith(begin)), default=0)
    return text[: len(text) - held].rstrip()
