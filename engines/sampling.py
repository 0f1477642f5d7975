"""How an answer is written: where it ends, and how each token is chosen from its logits.

Legend: V vocabulary. The order is that of transformers' generate: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from graphs.errors import UsageError


class OptionKeywords(TypedDict, total=False):
    """The fields of ``Options`` as keyword arguments."""

    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    repetition_penalty: float | None
    stop: Sequence[str]
    draft: bool


@dataclass(frozen=True)
class Options:
    """Checked when made: UsageError for a value out of range, and for one that would do nothing.

    max_new_tokens: None for the checkpoint's. temperature: 0 is greedy. top_k: only the k likeliest; top_p: only
    the likeliest whose probabilities reach p (Holtzman et al., arXiv 1904.09751). seed: of the draws, None for a
    fresh one, which the answer names. repetition_penalty: above 1 makes what was said unlikelier (Keskar et al.,
    arXiv 1909.05858), None for the checkpoint's. stop: strings before which an answer ends. draft: the large model
    checks the small one's answer at once where it can, which changes no token (``engines/draft.py``).
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    stop: Sequence[str] = ()
    draft: bool = True

    def seeded(self, seed: int | None = None) -> Options:
        """The same with a seed where tokens are drawn and none is named: this one, or a fresh one."""
        if not self.temperature or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(32) if seed is None else seed)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UsageError(
                f"max_new_tokens is {self.max_new_tokens}, but an answer has at least 1 token; give 1 or more"
            )
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature:g}, but must be finite and at least 0; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k is {self.top_k}, but at least 1 token must be left; leave it out for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p:g}, but must be in (0, 1]; leave it out for all")
        if self.repetition_penalty is not None and not 0.01 <= self.repetition_penalty <= 100:
            raise UsageError(
                f"repetition_penalty is {self.repetition_penalty:g}, but must be between 0.01 and 100; 1 is off"
            )
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}, but must be 0 or more; give another")
        idle = [name for name in ("top_k", "top_p", "seed") if getattr(self, name) is not None]
        if not self.temperature and idle:
            raise UsageError(
                f"{', '.join(idle)} would have no effect, because greedy decoding does not sample; "
                "give a temperature too"
            )
        if isinstance(self.stop, str) or not all(self.stop):
            raise UsageError("stop must be a list of strings that are not empty; give each string by itself")


class Sampler:
    """Chooses the tokens of one answer. ``seed``: what it draws with, None where it is greedy."""

    def __init__(self, options: Options, prompt_ids: Sequence[int], penalty: float | None = None) -> None:
        """Start behind a prompt; ``penalty`` is the checkpoint's own, used where the options name none."""
        self._options = options
        self._penalty = options.repetition_penalty or penalty or 1.0
        self._said = set(prompt_ids) if self._penalty != 1 else set()
        self.seed = options.seeded().seed
        if self.seed is not None:
            self._draw = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits_V: np.ndarray) -> int:
        """Return the next token and take note of it; ties go to the lower id."""
        scores_V = penalised(logits_V, self._said, self._penalty)
        if self._options.temperature:
            share_V = probabilities(scores_V, self._options)
            token = int(np.searchsorted(share_V.cumsum(), self._draw.random() * share_V.sum(), side="right"))
        else:
            token = int(scores_V.argmax())
        if self._penalty != 1:
            self._said.add(token)
        return token


def penalised(logits_V: np.ndarray, said: set[int], penalty: float) -> np.ndarray:
    """Return the logits with what was said made unlikelier: positive ones divided, negative ones multiplied."""
    if penalty == 1:
        return logits_V
    scores_V, ids = logits_V.copy(), np.fromiter((i for i in said if i < len(logits_V)), np.int64)
    scores_V[ids] = np.where(scores_V[ids] < 0, scores_V[ids] * penalty, scores_V[ids] / penalty)
    return scores_V


def probabilities(scores_V: np.ndarray, options: Options) -> np.ndarray:
    """Return what is drawn from, float64 [V]: softmax at the temperature over the tokens that top-k and top-p leave.

    top_k keeps every token that ties with the k-th, top_p the shortest run of likeliest ones whose sum reaches p.
    """
    with np.errstate(over="ignore"):  # the likeliest is 0; what is beyond a float's range is never drawn
        wide_V = (scores_V.astype(np.float64) - scores_V.max()) / options.temperature
    if options.top_k is not None and options.top_k < len(wide_V):
        wide_V = np.where(wide_V < np.sort(wide_V)[-options.top_k], -np.inf, wide_V)
    share_V = _softmax(wide_V)
    if options.top_p is not None and options.top_p < 1:
        order = np.argsort(-share_V, kind="stable")
        before_V = share_V[order].cumsum() - share_V[order]
        share_V[order[before_V >= options.top_p]] = 0
    return share_V / share_V.sum()


def _softmax(scores_V: np.ndarray) -> np.ndarray:
    share_V: np.ndarray = np.exp(scores_V - scores_V.max())
    return share_V / share_V.sum()
