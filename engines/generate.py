"""Generation: one prefill, which may check a draft, then a token at a time, each with its probability and its guidance.

Legend: S rows of the chunk, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from engines.budgets import Keep
from engines.cache import cut
from engines.clock import Clock
from engines.confidence import log_probs
from engines.decoder import Chunk, Step
from engines.draft import Drafted, drafted_by, padded, usable, with_draft
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
    max_new_tokens or the last position. drafted: what the draft was good for, None where there was none.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        options: Options,
        keep: Keep = None,
        priority_S: np.ndarray | None = None,
        draft: Sequence[int] = (),
    ) -> None:
        self._model, self._prompt, self.options = model, prompt, options
        self._keep, self._priority_S = keep if prompt.visual_tokens else None, priority_S
        asked = options.max_new_tokens or model.processor.max_new_tokens or DEFAULT_NEW_TOKENS
        self._limit = min(asked, longest_answer(model, prompt))
        self._draft = usable(model, draft, len(prompt.is_visual), self._limit) if draft else ()
        assert not (self._draft and model.spec.plan.uses_guide)
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
        self.drafted: Drafted | None = None

    def __iter__(self) -> Iterator[int]:
        clock = Clock()
        self._prefill()
        self.prefill_ms = clock.lap()
        yield from self.tokens.copy()
        while not self._over():
            clock = Clock()
            fed = Chunk(self._model.embed_text(self.tokens[-1:]), np.zeros(1, bool))
            so_far = self._guidance.so_far if self._guidance else None
            step = self._model.decoder.run(fed, self.cache, so_far=so_far)
            token = self._taken(step)
            self.cache = step.cache
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
    def written(self) -> str:
        """The answer so far up to a stop string, without special tokens, white space as it was written."""
        text = self._model.processor.written(self.tokens)
        return text[: first_stop(text, self.options.stop)]

    @property
    def text(self) -> str:
        """The same without white space around it."""
        return self.written.strip()

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

    def _prefill(self) -> None:
        """Feed prompt and draft, and take tokens up to the first that the draft has not, or one behind all of it."""
        prompt, draft = self._prompt, self._draft
        step = self._model.decoder.run(
            with_draft(self._model, prompt.chunk, draft),
            prompt.past,
            keep=self._keep,
            tail=len(draft) + 1,
            priority_S=padded(self._priority_S, draft),
        )
        self.first_logits = step.logits[0].copy()
        self.kept = tuple(rows[rows < len(prompt.is_visual)] for rows in step.kept)
        for row in range(len(draft) + 1):
            token = self._taken(step, row)
            if row == len(draft) or token != draft[row] or self._over():
                break
        # The cache holds every token but the last, as after a decode step.
        end = prompt.next_position + len(self.tokens) - 1
        self.cache = cut(step.cache, self._model.spec, end, self._model.to_host) if draft else step.cache
        if draft:
            self.drafted = drafted_by(draft, self.tokens)

    def _taken(self, step: Step, row: int = 0) -> int:
        token = self._sampler.choose(step.logits[row])
        self.tokens.append(token)
        self.log_prob.append(float(log_probs(step.logits[row : row + 1], [token])[0]))
        if self._guidance and step.received is not None:
            self._guidance.add(step.received)
        return token


def longest_answer(model: Model, prompt: Prompt) -> int:
    """Tokens that an answer can have: the positions left, and on an engine what it was built for.

    That is the rows of its caches, and with guidance the rows of the pass that scores the answer.
    """
    most = model.spec.language.max_positions - prompt.next_position
    session = model.session("decoder")
    if past := session.largest("past_k_0"):
        most = min(most, past[2] - len(prompt) + 1)
    if model.spec.plan.guidance and (tail := session.largest("tail")):
        most = min(most, tail[0])
    return max(1, most)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins, None where there is none."""
    found = [at for string in stop if (at := text.find(string)) >= 0]
    return min(found, default=None)
