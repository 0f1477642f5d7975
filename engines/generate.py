"""Generation: one prefill, then a token at a time, each with its probability and its guidance.

Legend: S rows of the chunk, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from engines.clock import Clock
from engines.confidence import log_probs
from engines.decoder import Chunk, Keep, Step
from engines.guidance import GuidanceSum
from engines.sampling import Options, Sampler

if TYPE_CHECKING:
    from engines.cache import Cache
    from engines.model import Model
    from engines.talk.prompt import Prompt


DEFAULT_NEW_TOKENS = 128


class Generation:
    """Iterate over it for the token ids, once; its fields are complete when it ends.

    tokens: ids chosen so far, the end token included. log_prob: of each, natural logarithm, by the model's own
    logits (temperature 1, no penalty). seed: of the draws, None where greedy.
    first_logits: float32 [vocab], what the first token was chosen from.
    kept: per prune point the chunk's rows that went on. guidance: float32 [V] over the visual tokens of the whole
    conversation, where the plan gives it. stopped: "end" after an end token, "stop" at a stop string, "length" at
    max_new_tokens or the last position.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        options: Options,
        keep: Keep = None,
        priority_S: np.ndarray | None = None,
    ) -> None:
        self._model, self._prompt, self.options = model, prompt, options
        self._keep, self._priority_S = keep if prompt.visual_tokens else None, priority_S
        asked = options.max_new_tokens or model.processor.max_new_tokens or DEFAULT_NEW_TOKENS
        self._limit = min(asked, model.spec.language.max_positions - prompt.next_position)
        self._sampler = Sampler(options, prompt.line.tolist(), model.processor.repetition_penalty)
        self._guidance = GuidanceSum(prompt.visual_rows, model.to_host) if model.spec.plan.guidance else None
        self.tokens: list[int] = []
        self.log_prob: list[float] = []
        self.first_logits: np.ndarray | None = None
        self.kept: tuple[np.ndarray, ...] = ()
        self.cache: Cache | None = None
        self.stopped: Literal["end", "stop", "length"] = "length"
        self.prefill_ms = 0.0
        self.decode_ms = 0.0

    def __iter__(self) -> Iterator[int]:
        clock = Clock()
        prompt = self._prompt
        step = self._model.decoder.run(prompt.chunk, prompt.past, keep=self._keep, priority_S=self._priority_S)
        self.kept = step.kept
        token = self._taken(step)
        self.prefill_ms = clock.lap()
        yield token
        while not self._over():
            clock = Clock()
            fed = Chunk(self._model.embed_text([token]), np.zeros(1, bool))
            so_far = self._guidance.so_far if self._guidance else None
            token = self._taken(self._model.decoder.run(fed, self.cache, so_far=so_far))
            self.decode_ms += clock.lap()
            yield token

    def finish(self) -> Generation:
        """Run to the end."""
        for _ in self:
            pass
        return self

    @property
    def seed(self) -> int | None:
        """What tokens are drawn with, None where they are not drawn."""
        return self._sampler.seed

    @property
    def text(self) -> str:
        """The answer so far, without special tokens and what a stop string begins."""
        written = self._model.processor.written(self.tokens)
        return written[: first_stop(written, self.options.stop)].strip()

    @property
    def guidance(self) -> np.ndarray | None:
        """A over the visual tokens so far, float32, None where the plan gives no guidance."""
        return self._guidance.total if self._guidance else None

    def _over(self) -> bool:
        """Whether the last token was the last; also notes why."""
        if self.tokens[-1] in self._model.spec.tokens.eos:
            self.stopped = "end"
            return True
        if (stop := self.options.stop) and first_stop(self._model.processor.written(self.tokens), stop) is not None:
            self.stopped = "stop"
            return True
        return len(self.tokens) == self._limit

    def _taken(self, step: Step) -> int:
        if self.first_logits is None:
            self.first_logits = step.logits[-1].copy()
        token = self._sampler.choose(step.logits[-1])
        self.tokens.append(token)
        self.log_prob.append(float(log_probs(step.logits[-1:], [token])[0]))
        self.cache = step.cache
        if self._guidance and step.received is not None:
            self._guidance.add(step.received)
        return token


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins, None where there is none."""
    found = [at for string in stop if (at := text.find(string)) >= 0]
    return min(found, default=None)
