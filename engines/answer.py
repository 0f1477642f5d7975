"""What a question gets back, and its document form ``saccade.answer/1``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from engines.budgets import Keep, keep_ratios
from engines.calibration.record import Calibration
from engines.confidence import Confidence
from engines.draft import Drafted
from engines.generate import Generation
from engines.model import Model
from engines.sampling import Options
from engines.talk.memory import Memory
from engines.talk.messages import Talk
from engines.talk.prompt import Prompt
from graphs.plan import retention_of

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
    took; a stage whose result was shared is counted with the time it took once. calibration: whose threshold it is,
    None where it was given or is the bundle's own. draft: what the small model's answer was good for as a draft, None
    where it was none.
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
    calibration: Calibration | None = None
    draft: Drafted | None = None

    @property
    def score(self) -> float | None:
        """S, the mean of both scores."""
        return self.confidence.score if self.confidence else None

    def stages(self, model: str = "") -> dict[str, float]:
        """Milliseconds by stage, of one model where it is named; opening its sessions happens once and is left out."""
        own = self.milliseconds.items()
        return {stage: ms for stage, ms in own if stage.startswith(model) and not stage.endswith("_open")}

    def spent(self, model: str = "") -> float:
        """Milliseconds of those stages together."""
        return sum(self.stages(model).values())

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
            "calibration": self.calibration.model_dump(mode="json") if self.calibration else None,
            "keep": list(self.keep),
            "average_retention": self.average_retention,
            "kept": None if self.kept is None else [k.tolist() for k in self.kept],
            "tokens": list(self.tokens),
            "new_tokens": len(self.tokens),
            "draft": asdict(self.draft) if self.draft else None,
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


def answer_of(
    model: Model,
    prompt: Prompt,
    run: Generation,
    keep: Keep,
    guidance: np.ndarray | None,
    looked: SmallPass | None,
    threshold: float | None,
) -> Answer:
    """Say what a pruned model's finished run gave, and what was kept for it. looked: None for a model alone."""
    plan, kept = model.spec.plan, kept_of(prompt, run)
    name: Literal["large", "alone"] = "large" if looked else "alone"
    ratios: tuple[float, ...] = ()
    if prompt.visual_tokens:
        ratios = keep_ratios(plan, keep, prompt.visual_tokens)
        if keep is None:  # a count is a share only of what it met: of each image's tokens, where it is per image
            fresh = (int((visual >= prompt.visual_before).sum()) / prompt.visual_tokens for visual in kept)
            ratios = tuple(
                share if budget.count is None else stayed
                for share, budget, stayed in zip(ratios, plan.budgets, fresh, strict=False)
            )
    elif prompt.visual_before:  # no image is new: what earlier turns kept
        ratios = tuple(len(visual) / prompt.visual_before for visual in kept)
    return Answer(
        text=run.text,
        tokens=tuple(run.tokens),
        model=name,
        stopped=run.stopped,
        seed=run.seed,
        exited=False if looked else None,
        threshold=threshold,
        confidence=looked.confidence if looked else None,
        keep=ratios,
        kept=kept,
        average_retention=retention_of(plan, model.spec.language.layers, ratios) if prompt.all_visual_tokens else None,
        guidance=guidance,
        prompt_tokens=len(prompt),
        cached_tokens=prompt.cached,
        visual_tokens=prompt.all_visual_tokens,
        milliseconds={**(looked.milliseconds if looked else {}), **times_of(name, prompt, run)},
        draft=run.drafted,
    )


def answer_of_small(looked: SmallPass, pair: bool, threshold: float | None) -> Answer:
    """Say what the small model's pass gave as an answer. pair: whether there is a large model that sleeps on."""
    return Answer(
        text=looked.text,
        tokens=looked.tokens,
        model="small",
        stopped=looked.stopped,
        seed=looked.seed,
        exited=True if pair else None,
        threshold=threshold if pair else None,
        confidence=looked.confidence,
        keep=(),
        kept=None,
        average_retention=None,
        guidance=looked.guidance,
        prompt_tokens=len(looked.prompt),
        cached_tokens=looked.prompt.cached,
        visual_tokens=len(looked.guidance),
        milliseconds=dict(looked.milliseconds),
    )


def kept_of(prompt: Prompt, run: Generation) -> tuple[np.ndarray, ...]:
    """Per prune point, vision stage first, the conversation's visual tokens that stayed, ascending; () without any."""
    if not prompt.all_visual_tokens:
        return ()
    original_S = np.zeros(len(prompt.is_visual), np.int64)
    original_S[prompt.is_visual] = prompt.of_visual(np.arange(prompt.all_visual_tokens))
    at_vision = () if prompt.kept_visual is None else (prompt.kept_visual + prompt.visual_before,)
    new = (*at_vision, *(original_S[rows[prompt.is_visual[rows]]] for rows in run.kept))
    before = prompt.kept_before
    if not prompt.visual_tokens:  # the vision stage did not run, so only the decoder's points are in ``new``
        return before
    return tuple(np.concatenate([old, fresh]) for old, fresh in zip(before, new, strict=True)) if before else new


def times_of(name: str, prompt: Prompt, run: Generation) -> dict[str, float]:
    """Milliseconds of each stage, named for the model."""
    stages = {**prompt.ms, "prefill": run.prefill_ms, "decode": run.decode_ms}
    return {f"{name}_{stage}": ms for stage, ms in stages.items()}
