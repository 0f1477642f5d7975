"""A conversation with a cascade: each model's cache stays, and is brought up to what was shown when it is needed.

A turn that the other model answered is prefilled as text before the next; see ``engines/talk/memory.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from engines.answer import Answer
from engines.budgets import Keep
from engines.images import Picture
from engines.sampling import OptionKeywords, Options
from engines.stream import Stream
from engines.talk.messages import Content, Message, Talk, asked, talk_from
from graphs.errors import UsageError

if TYPE_CHECKING:
    from engines.cascade import Cascade


class Conversation:
    """Made by ``Cascade.chat``. A turn that fails, or is not heard to its end, leaves it as it was."""

    def __init__(
        self,
        cascade: Cascade,
        messages: Sequence[Mapping[str, Any]] = (),
        keep: Keep = None,
        threshold: float | None = None,
        **options: Unpack[OptionKeywords],
    ) -> None:
        """Take what was said before; UsageError for a message or an option that cannot be."""
        self._cascade, self._keep, self._threshold = cascade, keep, threshold
        cascade.refuse_unservable(keep, threshold, options.get("draft", True))
        if threshold is None and cascade.promises:
            cascade.promises.note("calibrated thresholds hold for single questions, not for a conversation's turns")
        Options(**options)
        self._options = options
        self._talk = talk_from(messages)
        self._memories = cascade.memories()

    @property
    def talk(self) -> Talk:
        """Every message so far."""
        return self._talk

    def ask(self, content: Content, images: Picture | Sequence[Picture] | None = None) -> Answer:
        """Say something, with images in front of it or between its parts, and return the answer."""
        return self.stream(content, images).finish()

    def stream(self, content: Content, images: Picture | Sequence[Picture] | None = None) -> Stream:
        """The same as ``ask``, piece by piece; the turn counts once the stream has ended.

        UsageError while it is read where another turn has ended since.
        """
        talk = self._talk
        return Stream(self._recorded(talk, (*talk, asked(content, images))), self._cascade.lock)

    def answer(self) -> Answer:
        """Answer the last message, where it is the user's and waits."""
        return self.stream_answer().finish()

    def stream_answer(self) -> Stream:
        """The same as ``answer``, piece by piece."""
        talk = self._talk
        if not talk or talk[-1].role != "user":
            raise UsageError("the last message is not the user's, so nothing waits for an answer; ask something")
        return Stream(self._recorded(talk, talk), self._cascade.lock)

    def reset(self, messages: int = 0) -> None:
        """Forget everything but the first ``messages``."""
        with self._cascade.lock:
            self._talk, self._memories = self._talk[:messages], self._cascade.memories()

    def _recorded(self, before: Talk, talk: Talk) -> Iterator[str | Answer]:
        self._refuse_another_past(before)
        turn = self._cascade.turn(talk, self._memories, **self._options)
        for part in self._cascade.parts(turn, self._keep, self._threshold):
            if isinstance(part, Answer):
                self._refuse_another_past(before)
                self._talk = (*talk, Message("assistant", (part.text,)))
                for memory in self._memories.values():
                    memory.settle(talk)
            yield part

    def _refuse_another_past(self, before: Talk) -> None:
        if self._talk is not before:
            raise UsageError(
                "the conversation went on before this answer was finished, so this answer was dropped; ask again"
            )
