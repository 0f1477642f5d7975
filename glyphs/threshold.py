"""Chooses the exit threshold of the shipped pair: `python -m glyphs.threshold BUNDLE`.

On held-out questions that no other figure is computed on, the least threshold at which the cascade
answers as many questions right as with any other. Written beside the pair, read by the demo. It is
a choice on a sample, without the guarantee that a calibration would give.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from glyphs.data import held_out_questions

FILE = Path(__file__).with_name("pair") / "threshold.json"
QUESTIONS, SEED = 300, 11


def chosen_threshold(score_N: np.ndarray, small_N: np.ndarray, large_N: np.ndarray) -> tuple[float, float, float]:
    """The least threshold of highest accuracy, its accuracy and its exit rate.

    score_N: S of each question; small_N, large_N: whether that model's answer is right. A question
    exits where its score is above the threshold, so only midpoints between scores can differ.
    """
    scores = np.unique(score_N)
    candidates = [0.0, *((a + b) / 2 for a, b in pairwise(scores)), 1.0]
    best = max(candidates, key=lambda t: (np.where(score_N > t, small_N, large_N).mean(), -t))
    exits_N = score_N > best
    return round(float(best), 3), float(np.where(exits_N, small_N, large_N).mean()), float(exits_N.mean())


def main(bundle: str) -> None:
    """Ask the bundle's pair, choose, write."""
    import saccade

    cascade = saccade.Cascade.open(bundle)
    rows = []
    for question in held_out_questions(QUESTIONS, SEED):
        looked = cascade.look(question.image, question.question)
        large = cascade.answer_large(looked)
        rows.append((looked.confidence.score, looked.text == question.answer, large.text == question.answer))
    score_N, small_N, large_N = (np.array(column) for column in zip(*rows, strict=True))
    threshold, accuracy, exits = chosen_threshold(score_N, small_N, large_N)
    record = {
        "threshold": threshold,
        "questions": QUESTIONS,
        "seed": SEED,
        "accuracy": {
            "cascade": round(accuracy, 4),
            "small": round(float(small_N.mean()), 4),
            "large, pruned": round(float(large_N.mean()), 4),
        },
        "exit_rate": round(exits, 4),
    }
    FILE.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
