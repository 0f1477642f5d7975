"""What a question gets back, and its document form ``saccade.answer/1``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from engines.confidence import Confidence
from engines.memory import Memory
from engines.messages import Talk
from engines.prompt import Prompt
from engines.sampling import Options

SCHEMA = "saccade.answer/1"
Stopped: TypeAlias = Literal["end", "stop", "length"]


Memories: TypeAlias = dict[str, Memory]


@dataclass(frozen=True, eq=False)
class Turn:
    """A conversation that waits for an answer, how it is to be written, and what each model holds of it."""

    talk: Talk
    options: Options
    memories: Memories


@dataclass(frozen=True, eq=False)
class SmallPass:
    """What the small model gave for one turn; many large passes can share it.

    guidance: float32 [V], one value per visual token of the conversation. milliseconds: stage → what it took.
    """

    turn: Turn
    prompt: Prompt
    text: str
    tokens: tuple[int, ...]
    stopped: Stopped
    seed: int | None
    guidance: np.ndarray
    confidence: Confidence
    milliseconds: dict[str, float]
    # The large model's prompt for the same question, kept so that its image is seen once.
    shared: dict[str, Prompt] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer and how it came about.

    model: who gave it. exited: whether the small model's answer was good enough, None where there
    is no choice. confidence: None without a small model. kept: per prune point (vision stage first) the visual tokens
    that stayed, as indices into those of all images so far, None where no large model ran. keep: the shares that
    were asked for, or those of earlier turns where no image is new. average_retention: of the visual tokens over
    the layers of the model that was pruned, None without an image. prompt_tokens: of the whole conversation, of
    which cached_tokens were there already. seed: of the draws, None where greedy. milliseconds: stage → what it
    took; a stage whose result was shared is counted with the time it took once.
    """

    text: str
    tokens: tuple[int, ...]
    model: Literal["small", "large", "alone"]
    stopped: Stopped
    seed: int | None
    exited: bool | None
    threshold: float | None
    confidence: Confidence | None
    keep: tuple[float, ...]
    kept: tuple[np.ndarray, ...] | None
    average_retention: float | None
    guidance: np.ndarray | None
    prompt_tokens: int
    cached_tokens: int
    visual_tokens: int
    milliseconds: dict[str, float]

    @property
    def score(self) -> float | None:
        """S, the mean of both scores."""
        return self.confidence.score if self.confidence else None

    def document(self) -> dict[str, Any]:
        """Return the answer as JSON knows it."""
        scores = self.confidence
        return {
            "schema": SCHEMA,
            "answer": self.text,
            "model": self.model,
            "exited": self.exited,
            "confidence": scores.confidence if scores else None,
            "consistency": scores.consistency if scores else None,
            "score": self.score,
            "threshold": self.threshold,
            "keep": list(self.keep),
            "average_retention": self.average_retention,
            "kept": None if self.kept is None else [k.tolist() for k in self.kept],
            "tokens": list(self.tokens),
            "new_tokens": len(self.tokens),
            "stopped": self.stopped,
            "seed": self.seed,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "visual_tokens": self.visual_tokens,
            "guidance": None if self.guidance is None else [round(float(a), 6) for a in self.guidance],
            "milliseconds": {
                **{stage: round(ms, 3) for stage, ms in self.milliseconds.items()},
                "total": round(sum(self.milliseconds.values()), 3),
            },
        }
