"""Which threshold keeps the risk below a bound: learn-then-test with fixed-sequence testing.

Source: Angelopoulos, Bates, Candès, Jordan, Lei, "Learn then Test" (arXiv 2110.01052): §2.1 and §3.1 (a p-value for
each "risk > bound"; hypotheses tested in an order that was fixed before the data were seen, each at the full level,
until the first that is not rejected), and its Hoeffding–Bentkus p-value (proposition 2, after Bates et al.,
arXiv 2101.02703). Where losses are 0 or 1 their number is binomial and its tail is exact.
Legend: N questions, T thresholds of the grid. The risk is a share of all questions, those that do not exit counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from graphs.errors import UsageError


@dataclass(frozen=True)
class Walk:
    """How far the walk from "never exit" downwards came.

    threshold: the last one accepted; 1 where not one was. losses: their sum at that threshold. p_value: of its null
    hypothesis "risk > bound"; 1 for "never exit", whose risk is 0 without a test. accepted: thresholds of the grid.
    """

    threshold: float
    losses: float
    p_value: float
    accepted: int


def grid() -> np.ndarray:
    """The thresholds below 1, descending, float64 [T]; the same for all data.

    Scores crowd at 1, so the distance to 1 grows by a fortieth of a decade from 1e-6 to 1e-3, then by 1e-3 to 1.
    """
    near = 10.0 ** (-6 + np.arange(120) / 40)
    return np.round(1 - np.concatenate([near, np.arange(1, 1001) / 1000]), 9)


def needed_questions(bound: float, confidence: float) -> int:
    """The least number of questions on which a walk can accept anything: without a single loss its p is (1−bound)^N."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-bound) - 1e-9)


def binomial_tail(count: int, questions: int, bound: float) -> float:
    """P(Binomial(questions, bound) ≤ count): the p-value of "risk > bound" after ``count`` losses of 1."""
    return float(_tails(questions, bound)[min(count, questions)])


def hoeffding_bentkus(total: float, questions: int, bound: float) -> float:
    """The p-value of "risk > bound" for losses in [0, 1] that sum to ``total``.

    min(exp(−n·h(min(R, bound), bound)), e·P(Binomial(n, bound) ≤ ⌈n·R⌉)), R = total/n and
    h(a, b) = a·log(a/b) + (1−a)·log((1−a)/(1−b)).
    """
    mean = min(total / questions, bound)
    entropy = (1 - mean) * (math.log1p(-mean) - math.log1p(-bound))
    entropy += mean * math.log(mean / bound) if mean else 0.0
    bentkus = math.e * binomial_tail(math.ceil(total), questions, bound)
    return min(1.0, math.exp(-questions * entropy), bentkus)


def walk(score_N: np.ndarray, loss_N: np.ndarray, bound: float, confidence: float, graded: bool) -> Walk:
    """Walk down the grid and stop at the first threshold whose null hypothesis "risk > bound" is not rejected.

    score_N: S of each question. loss_N: what is lost if the question exits, in [0, 1]; 0 or 1 unless graded.
    With probability ``confidence`` over the draw of the questions the risk at the threshold is at most the bound.
    """
    _check(score_N, loss_N, graded)
    levels_T = grid()
    order = np.argsort(score_N, kind="stable")
    from_top_N = np.concatenate([[0.0], np.cumsum(loss_N[order][::-1], dtype=np.float64)])
    exits_T = len(score_N) - np.searchsorted(score_N[order], levels_T, side="right")
    found = Walk(1.0, 0.0, 1.0, 0)
    for i, (level, exits) in enumerate(zip(levels_T.tolist(), exits_T.tolist(), strict=True)):
        total = float(from_top_N[exits])
        test = hoeffding_bentkus(total, len(score_N), bound) if graded else tail_of_sum(total, len(score_N), bound)
        if test > 1 - confidence:
            break
        found = Walk(level, total, test, i + 1)
    return found


def tail_of_sum(total: float, questions: int, bound: float) -> float:
    """``binomial_tail`` of a sum of zeros and ones."""
    return binomial_tail(round(total), questions, bound)


def checked_promise(max_loss: float, confidence: float) -> None:
    """UsageError for a bound or a confidence that promises nothing or everything."""
    for name, value in (("max-loss", max_loss), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UsageError(f"{name} is {value:g}, but it must lie strictly between 0 and 1; 0.02 and 0.95 are usual")


def _check(score_N: np.ndarray, loss_N: np.ndarray, graded: bool) -> None:
    assert score_N.shape == loss_N.shape == (len(score_N),)
    assert len(score_N)
    assert np.isfinite(score_N).all()
    assert ((loss_N >= 0) & (loss_N <= 1)).all()
    assert graded or np.isin(loss_N, (0, 1)).all()


@lru_cache(maxsize=8)
def _tails(questions: int, chance: float) -> np.ndarray:
    """The distribution function of Binomial(questions, chance) at 0 … questions, summed as logs."""
    factorials = np.array([math.lgamma(k + 1) for k in range(questions + 1)])
    k = np.arange(questions + 1)
    logs = factorials[-1] - factorials - factorials[::-1] + k * math.log(chance) + (questions - k) * math.log1p(-chance)
    return np.minimum(np.exp(np.logaddexp.accumulate(logs)), 1.0)
