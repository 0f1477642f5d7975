"""The same quantities from the product's own runtime: guidance, scores and pruned answers of `saccade.Cascade`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from glyphs.findings.exits import scores_of
from glyphs.findings.guidance import Source, cuts_of
from glyphs.findings.models import best_visual
from glyphs.findings.work import NEW_TOKENS, Work
from graphs.console import track

QUESTIONS = 100


def check(work: Work, small: str, folder: Path, questions: int = QUESTIONS) -> dict[str, Any]:
    """Hold the first questions' answers, guidance, S and kept tokens, and the pruned answers, to `Cascade`'s."""
    import saccade

    for role, name in (("small", small), ("large", "large")):
        saccade.export(work.checkpoints[name], folder / role, policy="sgl", role=role, overwrite=True)
    cascade = saccade.Cascade.from_exports(folder / "small", folder / "large", threads=1)
    heard, scores = work.heard(small), scores_of(work.heard(small))
    source = Source(small, tuple(range(heard.received.shape[1])))
    guidance_NV = source.scores(work)
    cuts = cuts_of(*work.heard("large").received.shape[1::2])[:3]
    questions = min(questions, work.n)
    far = {"guidance": 0.0, "S_confidence": 0.0, "S_consistency": 0.0, "guidance of swapped tokens": 0.0}
    answers, pruned, kept = 0, [0] * len(cuts), [0] * len(cuts)
    for i in track(range(questions), f"the same of {questions} questions from saccade.Cascade"):
        question = work.questions[i]
        looked = cascade.look(question.image, question.question, max_new_tokens=NEW_TOKENS)
        answers += list(looked.tokens) == [t for t in heard.tokens[i].tolist() if t >= 0]
        far["guidance"] = max(far["guidance"], float(np.abs(looked.guidance - guidance_NV[i]).max()))
        for name, value in vars(looked.confidence).items():
            far[f"S_{name}"] = max(far[f"S_{name}"], abs(value - float(scores[f"S_{name}"][i])))
        for c, cut in enumerate(cuts):
            answer = cascade.answer_large(looked, cut.keep)
            pruned[c] += (answer.text == question.answer) == bool(source.rights(work, cut)[i])
            ours = best_visual(guidance_NV[i : i + 1], cut.count)[0]
            kept[c] += np.array_equal(answer.kept[-1], ours)
            if len(swapped := np.setxor1d(answer.kept[-1], ours)):
                gap = float(np.ptp(guidance_NV[i, swapped]))
                far["guidance of swapped tokens"] = max(far["guidance of swapped tokens"], gap)
    return {
        "questions": questions,
        "small_answers_equal": answers,
        "largest_difference": {name: float(f"{value:.1e}") for name, value in far.items()},
        "retentions": [cut.retention for cut in cuts],
        "same_kept_tokens": kept,
        "same_right_or_wrong": pruned,
    }
