"""The walk and its p-values, held to sums written out here, and the promise itself over thousands of samples."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engines.calibration.learn import (
    binomial_tail,
    checked_promise,
    grid,
    hoeffding_bentkus,
    needed_questions,
    walk,
)
from graphs.errors import UsageError

# S, and whether each model was right and both answered alike, on 4,000 held-out questions of the shipped pair (seed
# 2026 of glyphs.data.held_out_questions, the large model pruned before layer 1 to 32.17 %, greedy, fp32).
POOL = Path(__file__).with_name("glyph_scores.npz")


def tail_in_fractions(count: int, questions: int, bound: Fraction) -> float:
    return float(
        sum(
            math.comb(questions, k) * bound**k * (1 - bound) ** (questions - k)
            for k in range(min(count, questions) + 1)
        )
    )


@pytest.mark.parametrize(("questions", "bound"), [(1, "1/2"), (7, "1/50"), (60, "3/10"), (400, "1/50")])
def test_the_binomial_tail_is_the_sum(questions: int, bound: str) -> None:
    exact = Fraction(bound)
    for count in {0, 1, questions // 3, questions - 1, questions, questions + 5}:
        assert binomial_tail(count, questions, float(exact)) == pytest.approx(
            tail_in_fractions(count, questions, exact), rel=1e-9
        )


def test_hoeffding_bentkus_is_the_formula() -> None:
    n, bound = 200, 0.1
    for total in (0.0, 0.3, 7.25, 12.0, 19.9, 20.0, 60.0):
        mean = min(total / n, bound)
        h = (1 - mean) * math.log((1 - mean) / (1 - bound)) + (mean * math.log(mean / bound) if mean else 0)
        bentkus = math.e * tail_in_fractions(math.ceil(total), n, Fraction(1, 10))
        assert hoeffding_bentkus(total, n, bound) == pytest.approx(min(1, math.exp(-n * h), bentkus), rel=1e-9)


def test_it_takes_as_many_questions_as_lossless_ones_reject() -> None:
    for bound, confidence in ((0.02, 0.95), (0.5, 0.5), (0.01, 0.99)):
        least = needed_questions(bound, confidence)
        assert (1 - bound) ** least <= 1 - confidence < (1 - bound) ** (least - 1) or least == 1
        none = np.zeros(least)
        assert walk(none, none, bound, confidence, graded=False).threshold == 0
        assert walk(none, none, bound, confidence, graded=True).threshold == 0
        if least > 1:
            assert walk(none[1:], none[1:], bound, confidence, graded=False).threshold == 1


def test_the_grid_falls_from_next_to_1_to_0() -> None:
    levels = grid()
    assert (np.diff(levels) < 0).all()
    assert (levels[0], levels[-1]) == (0.999999, 0)


def test_the_walk_ends_before_the_first_that_is_not_rejected() -> None:
    rng = np.random.default_rng(0)
    score, loss = rng.random(300), (rng.random(300) < 0.2).astype(float)
    found = walk(score, loss, 0.05, 0.9, graded=False)
    tests = [tail_in_fractions(round(loss[score > t].sum()), 300, Fraction(1, 20)) for t in grid()]
    first = next(i for i, p in enumerate(tests) if p > 0.1)
    assert (found.accepted, found.threshold) == (first, grid()[first - 1])
    assert found.losses == loss[score > found.threshold].sum()
    assert found.p_value == pytest.approx(tests[first - 1], rel=1e-9)


def test_a_score_on_the_threshold_does_not_exit() -> None:
    """So the walk goes down to a level where every question stands, and no further."""
    assert walk(np.full(500, 0.5), np.ones(500), 0.02, 0.95, graded=False).threshold == 0.5


def test_never_exit_where_every_exit_loses() -> None:
    found = walk(np.full(500, 1.0), np.ones(500), 0.02, 0.95, graded=False)
    assert (found.threshold, found.losses, found.p_value, found.accepted) == (1, 0, 1, 0)


def excess(threshold: float, score: np.ndarray, loss: np.ndarray, bound: float) -> bool:
    return bool(np.where(score > threshold, loss, 0).mean() > bound)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("bound", [0.02, 0.1])
def test_the_promise_holds_where_scores_say_little(bound: float, graded: bool) -> None:
    """Every sample is drawn anew from a large made-up population, whose risk crosses the bound slowly."""
    rng = np.random.default_rng(1)
    score = rng.random(200_000)
    loss = (rng.random(200_000) < 0.4 * (1.1 - score)).astype(float)
    if graded:
        loss *= rng.choice([0.3, 0.6, 1.0], 200_000)
    broken, samples = 0, 600
    for _ in range(samples):
        i = rng.integers(0, len(score), 300)
        found = walk(score[i], loss[i], bound, 0.9, graded)
        broken += excess(found.threshold, score, loss, bound)
    assert broken / samples <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / samples)


@pytest.mark.parametrize("answers_known", [True, False])
def test_the_promise_holds_on_the_pair(answers_known: bool) -> None:
    """500 resamplings of a calibration set from a pool of glyph questions; the pool's own risk is the true one."""
    pool = np.load(POOL)
    score = pool["score"].astype(np.float64)
    loss = (pool["large"] & ~pool["small"] if answers_known else ~pool["same"]).astype(float)
    rng, broken, samples, exits = np.random.default_rng(2), 0, 500, []
    for _ in range(samples):
        i = rng.integers(0, len(score), 500)
        found = walk(score[i], loss[i], 0.02, 0.95, graded=False)
        broken += excess(found.threshold, score, loss, 0.02)
        exits.append((score > found.threshold).mean())
    assert broken / samples <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / samples)
    assert np.mean(exits) > 0.05  # a promise kept by never exiting would say nothing


@pytest.mark.parametrize(("max_loss", "confidence"), [(0, 0.9), (1, 0.9), (float("nan"), 0.9), (0.1, 1), (0.1, 0)])
def test_a_promise_of_nothing_or_everything_is_refused(max_loss: float, confidence: float) -> None:
    with pytest.raises(UsageError, match="strictly between 0 and 1"):
        checked_promise(max_loss, confidence)
