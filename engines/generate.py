"""Greedy generation: one prefill, then a token at a time, each with its probability and its guidance.

Legend: S prompt rows, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from engines.clock import Clock
from engines.confidence import log_probs
from engines.decoder import Chunk, Keep, Step
from engines.guidance import GuidanceSum
from graphs.errors import UsageError

if TYPE_CHECKING:
    from engines.cache import Cache
    from engines.model import Model, Prompt


class Generation:
    """Iterate over it for the token ids, once; its fields are complete when it ends.

    tokens: ids chosen so far, the end token included. log_prob: of each, natural logarithm.
    first_logits: float32 [vocab], what the first token was chosen from.
    kept: per prune point the prompt rows that went on. guidance: float32 [V], where the plan gives it.
    stopped: "end" after an end token, "length" at max_new_tokens or the last position.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        max_new_tokens: int,
        keep: Keep = None,
        priority_S: np.ndarray | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, but an answer has at least 1 token")
        self._model, self._prompt = model, prompt
        self._keep, self._priority_S = keep, priority_S
        room = model.spec.language.max_positions - prompt.next_position
        self._limit = min(max_new_tokens, room)
        self._guidance = GuidanceSum(prompt.is_visual) if model.spec.plan.guidance else None
        self.tokens: list[int] = []
        self.log_prob: list[float] = []
        self.first_logits: np.ndarray | None = None
        self.kept: tuple[np.ndarray, ...] = ()
        self.cache: Cache | None = None
        self.stopped: Literal["end", "length"] = "length"
        self.prefill_ms = 0.0
        self.decode_ms = 0.0

    def __iter__(self) -> Iterator[int]:
        clock = Clock()
        step = self._model.decoder.run(self._prompt.chunk, keep=self._keep, priority_S=self._priority_S)
        self.kept = step.kept
        token = self._taken(step)
        self.prefill_ms = clock.lap()
        yield token
        while token not in self._model.spec.tokens.eos:
            if len(self.tokens) == self._limit:
                return
            clock = Clock()
            fed = Chunk(self._model.embed_text([token]), np.zeros(1, bool))
            token = self._taken(self._model.decoder.run(fed, self.cache))
            self.decode_ms += clock.lap()
            yield token
        self.stopped = "end"

    def finish(self) -> Generation:
        """Run to the end."""
        for _ in self:
            pass
        return self

    @property
    def guidance(self) -> np.ndarray | None:
        """A over the visual tokens so far, float32, None where the plan gives no guidance."""
        return self._guidance.total if self._guidance else None

    def _taken(self, step: Step) -> int:
        if self.first_logits is None:
            self.first_logits = step.logits[-1].copy()
        token = int(step.logits[-1].argmax())
        self.tokens.append(token)
        self.log_prob.append(float(log_probs(step.logits[-1:], [token])[0]))
        self.cache = step.cache
        if self._guidance and step.received is not None:
            self._guidance.add(step.received)
        return token
