"""Where the small model looks: what each visual token receives from the text, summed and never normalised.

Legend: V visual tokens, T keys of the cache (P_0 + S), k kept.
Source: SGL, arXiv 2412.03324 §3.2: A = A^P + A^D over all layers and heads; the prefill's text rows
and every generated token that is fed back (the last one never is). The graph sums over layers, heads
and rows in fp32; over steps the graph does too where it writes its cache in place, else the host, in fp32,
or, where a session makes it later, one product for all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from engines.sessions.session import Later
from graphs.errors import OperationFailed, UsageError
from graphs.plan import PruningPlan, kept_count

if TYPE_CHECKING:
    from engines.sessions.session import Value
    from engines.talk.prompt import Prompt


class GuidanceSum:
    """A^P plus one A^D per fed-back token, over the visual rows of a conversation, int64 [V].

    On top of a cache A^P is that of the chunk's guide rows alone: the newest question's. A decoder that writes its
    cache in place sums on the device: ``so_far`` is the handle that goes from step to step, copied when it is asked.
    """

    def __init__(self, visual_rows: np.ndarray, to_host: Callable[[Value], np.ndarray]) -> None:
        self._visual, self._to_host = visual_rows, to_host
        self._total = np.zeros(len(self._visual), np.float32)
        self.so_far: Value | None = None
        self._later: Later | None = None

    def add(self, received: Value) -> None:
        """Take what one run gave (``engines.decoder.Step.received``); the conversation's rows are the first keys."""
        if isinstance(received, np.ndarray):
            self._total += received[self._visual]
        elif isinstance(received, Later):
            self._later = self._later.and_then(received) if self._later else received
        else:
            self.so_far = received

    @property
    def total(self) -> np.ndarray:
        """A so far, float32 [V]; one copy to the host where it lies on the device, made now where it is made later."""
        if self._later:
            self._total += self._to_host(self._later)[0, self._visual]
            self._later = None
        return self._total if self.so_far is None else self._to_host(self.so_far)[0, self._visual]


def top_visual(guidance_V: np.ndarray, keep: float) -> np.ndarray:
    """Return the int(V·keep) visual tokens of highest guidance, ascending; ties go to the lower index."""
    if not np.isfinite(guidance_V).all():
        raise OperationFailed(
            "the guidance is not a number for some visual tokens; replay the golden tensors with: saccade verify"
        )
    order = np.argsort(-guidance_V.astype(np.float64), kind="stable")
    return np.sort(order[: kept_count(len(guidance_V), keep)])


def priority_of_rows(guidance_V: np.ndarray, is_visual_S: np.ndarray) -> np.ndarray:
    """Scatter guidance on the visual rows of a prompt, float32 [S]; text rows need none."""
    priority_S = np.zeros(len(is_visual_S), np.float32)
    priority_S[is_visual_S] = guidance_V
    return priority_S


def random_guidance(tokens: int, seed: int) -> np.ndarray:
    """Return a seeded uniform score per visual token, float32 [V]: the baseline of every comparison."""
    return np.random.default_rng(seed).random(tokens, dtype=np.float32)


def drawn_priority(plan: PruningPlan, tokens: int) -> np.ndarray | None:
    """Return the seeded scores of a plan that prunes by a draw, None for any other plan."""
    return next((random_guidance(tokens, p.seed) for p in plan.points if p.score == "random"), None)


def priority_of(prompt: Prompt, guidance_V: np.ndarray) -> np.ndarray:
    """Return a priority for each row of the prompt's chunk, float32 [S]; UsageError where guidance does not fit it."""
    if np.shape(guidance_V) != (prompt.all_visual_tokens,):
        raise UsageError(
            f"guidance has shape {np.shape(guidance_V)}, but there are {prompt.all_visual_tokens} visual tokens; "
            "give one score for each"
        )
    if not np.isfinite(guidance_V).all():
        raise UsageError("guidance holds values that are not finite numbers; give one score per visual token")
    return priority_of_rows(prompt.of_visual(guidance_V), prompt.is_visual)
