"""The threshold of a bundle from questions: every one is asked of both models, then the walk decides.

Legend: N questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.budgets import Keep
from engines.bundles.manifest import manifest_of
from engines.calibration.learn import Walk, checked_promise, needed_questions, walk
from engines.calibration.promise import Promises, tied_keep
from engines.calibration.record import Baseline, Calibration
from engines.calibration.store import refuse_unwritable, write_calibration
from engines.cascade import Cascade
from engines.evaluation.data import Data, Example
from engines.evaluation.metrics import METRICS
from graphs.console import say, track
from graphs.errors import UnaskableQuestion, UsageError

SCHEMA = "saccade.calibration/1"
AGREEMENT = "agreement"


@dataclass(frozen=True)
class Wanted:
    """What is to be promised and for which runs; see ``Calibration``. metric: None where no answers are known."""

    max_loss: float
    confidence: float
    metric: str | None = None
    baseline: Baseline = "pruned"
    keep: Keep = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Outcome:
    """One question's answers: the small model's, the pruned large one's, the baseline's, and what both took in ms."""

    score: float
    small: str
    large: str
    baseline: str
    small_ms: float
    large_ms: float


def calibrate_bundle(
    bundle: Path, data: Data, wanted: Wanted, target: str | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Ask, walk, write into the manifest; return the document ``saccade.calibration/1``.

    A question that stands there twice counts once, for the promise is about independent ones.

    Raises UsageError for a promise that cannot be made (a bound outside (0, 1), too few questions, a bundle of one
    model), before any question is asked; and what ``Cascade.open`` raises.
    """
    checked_promise(wanted.max_loss, wanted.confidence)
    given, data = len(data.examples), data.once()
    if again := given - len(data.examples):
        say(f"{again} of {given} questions are repeats and are not counted again")
    _refuse_too_few(data, wanted)
    found_on = manifest_of(bundle).sha256
    cascade = Cascade.open(bundle, target, threads, reuses_beginnings=False)
    if not cascade.promises:
        raise UsageError(f"{bundle} holds one model, so there is no choice to calibrate; build a bundle of a pair")
    cascade.refuse_unservable(wanted.keep, None)
    refuse_unwritable(bundle)
    with suppress(UnaskableQuestion):
        outcome_of(cascade, data.examples[0], wanted)  # so that no question pays for what is done once
    outcomes, bad = [], {}
    for i, example in enumerate(track(data.examples, "asking both models")):
        try:
            outcomes.append(outcome_of(cascade, example, wanted))
        except UnaskableQuestion as e:
            bad[i] = data.left_out(example, e)
    if bad:
        _refuse_too_few(data := data.without(bad), wanted)
    graded = bool(wanted.metric and METRICS[wanted.metric].graded)
    score_N = np.array([o.score for o in outcomes])
    found = walk(score_N, losses_of(outcomes, data.examples, wanted.metric), wanted.max_loss, wanted.confidence, graded)
    calibration = calibration_from(found, cascade.promises, data, wanted, float((score_N > found.threshold).mean()))
    manifest = write_calibration(bundle, calibration, found_on)
    return {
        "schema": SCHEMA,
        "bundle": bundle,
        "manifest_sha256": manifest.sha256,
        "never_exit": not found.accepted,
        "calibration": calibration.model_dump(mode="json"),
        "bad": list(data.bad),
        **gains(outcomes, data.examples, wanted.metric, found.threshold),
    }


def outcome_of(cascade: Cascade, example: Example, wanted: Wanted) -> Outcome:
    """Ask both models one question; a full baseline is asked beside the pruned large model."""
    looked = cascade.look(example.images or None, example.question, max_new_tokens=wanted.max_new_tokens)
    large = baseline = cascade.answer_large(looked, wanted.keep)
    if wanted.baseline == "full":
        assert cascade.large is not None
        fresh = cascade.turn(looked.turn.talk, max_new_tokens=wanted.max_new_tokens)
        everything = (1.0,) * len(cascade.large.spec.plan.budgets)
        baseline = cascade.answer_large(replace(looked, turn=fresh, shared={}), everything)
    texts = looked.text, large.text, baseline.text
    return Outcome(looked.confidence.score, *texts, large.spent("small"), large.spent("large"))


def losses_of(outcomes: Iterable[Outcome], examples: Iterable[Example], metric: str | None) -> np.ndarray:
    """What is lost if each question exits, float64 [N]: max(0, worth of the baseline's answer − of the small one's).

    Without a metric 1 where the answers differ, case and white space aside.
    """
    if metric is None:
        exact = METRICS["exact"].value
        return np.array([1 - exact(o.small, (o.baseline,)) for o in outcomes])
    value = METRICS[metric].value
    pairs = zip(outcomes, examples, strict=True)
    return np.array([max(0.0, value(o.baseline, e.answers) - value(o.small, e.answers)) for o, e in pairs])


def calibration_from(found: Walk, ran: Promises, data: Data, wanted: Wanted, exit_rate: float) -> Calibration:
    """The manifest's entry."""
    return Calibration(
        threshold=found.threshold,
        max_loss=wanted.max_loss,
        confidence=wanted.confidence,
        metric=wanted.metric or AGREEMENT,
        baseline=wanted.baseline,
        target=ran.target,
        precision=ran.precision,
        keep=tied_keep(ran.plan, wanted.keep),
        max_new_tokens=wanted.max_new_tokens,
        test="hoeffding-bentkus" if wanted.metric and METRICS[wanted.metric].graded else "binomial",
        data_sha256=data.digest,
        questions=len(data.examples),
        losses=found.losses,
        p_value=found.p_value,
        exit_rate=exit_rate,
    )


def gains(outcomes: list[Outcome], examples: Iterable[Example], metric: str | None, threshold: float) -> dict[str, Any]:
    """What the threshold saves on the questions it was found on, and with answers what every system is worth there.

    ms_per_question: means, sessions open; never_exit is small and pruned large model for every question.
    """
    exits_N = np.array([o.score for o in outcomes]) > threshold
    small_N, large_N = (np.array([getattr(o, f"{name}_ms") for o in outcomes]) for name in ("small", "large"))
    cascade_N = small_N + np.where(exits_N, 0, large_N)
    told: dict[str, Any] = {
        "exit_rate": float(exits_N.mean()),
        "ms_per_question": {
            "cascade": round(float(cascade_N.mean()), 3),
            "never_exit": round(float((small_N + large_N).mean()), 3),
        },
        "saved": round(float(1 - cascade_N.sum() / (small_N + large_N).sum()), 4),
        "accuracy": None,
    }
    if metric:
        value, known = METRICS[metric].value, [e.answers for e in examples]
        worth = {
            name: np.array([value(getattr(o, name), truths) for o, truths in zip(outcomes, known, strict=True)])
            for name in ("small", "large", "baseline")
        }
        worth["cascade"] = np.where(exits_N, worth["small"], worth["large"])
        told["accuracy"] = {name: round(float(worth_N.mean()), 4) for name, worth_N in worth.items()}
    return told


def _refuse_too_few(data: Data, wanted: Wanted) -> None:
    least = needed_questions(wanted.max_loss, wanted.confidence)
    if len(data.examples) < least:
        raise UsageError(
            f"{len(data.examples)} distinct questions are too few to promise a loss of at most {wanted.max_loss:g} "
            f"with confidence {wanted.confidence:g}: even without a single loss it takes {least}; nothing was "
            "written; give more questions or promise less"
        )
