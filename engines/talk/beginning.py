"""What a model's conversations begin with alike, a system message above all: computed once, then where each begins.

Nobody says what that is: it is the text in front of any image which two conversations in a row share. Its cache
rows depend on nothing behind them, so a conversation that continues them gives what it gives without; they are kept on
the host, a copy that no run writes to.
Legend: L tokens of a line, S rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engines.cache import Cache, on_host
from engines.decoder import Chunk
from engines.sessions.session import Value
from engines.talk.messages import Message
from graphs.spec import ExportSpec

WORTH = 8  # rows; fewer are not worth a copy of every layer's


@dataclass(frozen=True, eq=False)
class Held:
    """A run that is over: the line whose rows the cache holds, the images in it, and what of them was kept.

    line: int64 [L]. there: bool [L], False where the vision stage dropped a visual token. kept: per prune point the
    visual tokens that stayed. whole: the rows of its prompt on the host, where the model gives guidance. shown: the
    messages that its images are from, in order.
    """

    line: np.ndarray
    there: np.ndarray
    cache: Cache
    kept: tuple[np.ndarray, ...] = ()
    whole: Chunk | None = None
    shown: tuple[Message, ...] = ()


class Beginnings:
    """One model's; ``held`` is what the next conversation may begin with, None until two have begun alike."""

    def __init__(self, spec: ExportSpec, to_host: Callable[[Value], np.ndarray]) -> None:
        self.held: Held | None = None
        self._spec, self._to_host = spec, to_host
        self._last = np.zeros(0, np.int64)

    def learn(self, run: Held, text: int) -> None:
        """Take notice of a conversation's first run, whose line begins with so many tokens of text."""
        line, before = run.line[:text], self._last
        self._last = line
        shared = alike(line, before)
        if shared < WORTH or (self.held and alike(line[:shared], self.held.line) == shared):
            return
        whole = run.whole and Chunk(
            inputs_embeds=np.array(run.whole.inputs_embeds[:, :shared]),
            is_visual=run.whole.is_visual[:shared],
            deepstack={name: np.array(value[:, :shared]) for name, value in run.whole.deepstack.items()},
        )
        cache = on_host(run.cache, self._spec, shared, self._to_host)
        self.held = Held(line[:shared], run.there[:shared], cache, whole=whole)


def alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two lines begin with alike."""
    common = min(len(one), len(other))
    differs = np.flatnonzero(one[:common] != other[:common])
    return int(differs[0]) if len(differs) else common
