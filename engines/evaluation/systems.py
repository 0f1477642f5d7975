"""What each system of an evaluation is worth and takes, from the answers in the journal.

Legend: N questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.evaluation.contenders import Contender
from engines.evaluation.data import Example
from engines.evaluation.metrics import METRICS
from engines.evaluation.settings import RANDOM, Setting
from engines.evaluation.sweep import Row, spent
from engines.sampling import Options

BINS = 10
POINTS = 101  # thresholds of a curve, at most


@dataclass(frozen=True, eq=False)
class Worths:
    """What every answer is worth: small model → float64 [N], setting → float64 [N]; and what questions belong to.

    categories, groups: one a question, "" where there are none.
    """

    small: dict[str, np.ndarray]
    large: dict[str, np.ndarray]
    categories: tuple[str, ...]
    groups: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], examples: Sequence[Example], metric: str) -> Worths:
        """Score the journal's rows, which are in the order of the examples."""
        value = METRICS[metric].value
        scored: dict[str, dict[str, np.ndarray]] = {
            part: {
                name: np.array(
                    [value(row[part][name]["text"], e.answers) for row, e in zip(rows, examples, strict=True)]
                )
                for name in rows[0][part]
            }
            for part in ("small", "large")
        }
        return cls(
            scored["small"], scored["large"], tuple(e.category for e in examples), tuple(e.group for e in examples)
        )


def bars_of(
    one: Contender, thresholds: Sequence[float], setting: Setting, max_new_tokens: int | None = None
) -> list[float]:
    """The thresholds that a pair is tried with: without any what ``run`` would use, a calibrated one where it holds."""
    if thresholds:
        return list(thresholds)
    held = one.cascade.promises and one.cascade.promises.that_holds(
        setting.keep or None, Options(max_new_tokens=max_new_tokens), guided=setting.policy == RANDOM
    )
    return [held.threshold if held else one.cascade.threshold]


def looks(one: Contender, setting: Setting) -> bool:
    """Whether the large model needs the small one's pass before it can be pruned like this."""
    return bool(one.pair and one.plan and one.plan.needs_guidance and setting.policy not in (None, RANDOM))


def systems_of(
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    worths: Worths,
    settings: Sequence[Setting],
    thresholds: Sequence[float],
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """One entry a system: every distinct small model, then each setting's large one and cascades."""
    found = []
    for at, worth_N in worths.small.items():
        name = str(contenders[int(at)].path)
        found.append(_system("small", name, [row["small"][at] for row in rows], worth_N, worths))
    for setting in settings:
        one = contenders[setting.bundle]
        large, worth_N = [row["large"][setting.name] for row in rows], worths.large[setting.name]
        shown = {"keep": list(setting.keep), "policy": setting.policy, "layers": list(setting.layers)}
        if not one.pair:
            found.append(_system("alone", str(one.path), large, worth_N, worths) | shown)
            continue
        at = str(one.small)
        small = [row["small"][at] for row in rows]
        both = [_after(s, b) for s, b in zip(small, large, strict=True)]
        guided = looks(one, setting)
        found.append(_system("large", str(one.path), both if guided else large, worth_N, worths) | shown)
        score_N = np.array([row["score"] for row in small])
        for bar in bars_of(one, thresholds, setting, max_new_tokens):
            exits_N = score_N > bar
            chosen = [s if gone else b for s, b, gone in zip(small, both, exits_N, strict=True)]
            mixed_N = np.where(exits_N, worths.small[at], worth_N)
            entry = _system("cascade", str(one.path), chosen, mixed_N, worths) | shown
            found.append(entry | {"threshold": bar, "exit_rate": float(exits_N.mean())})
    return found


def reliability_of(contenders: Sequence[Contender], rows: Sequence[Row], worths: Worths) -> list[dict[str, Any]]:
    """For each small model of a pair how often it is right at each score S, and the expected calibration error.

    Source of the error: Σ_bins n/N · |accuracy − mean S| over equal bins (Guo et al., arXiv 1706.04599 §2).
    """
    found = []
    for at, worth_N in worths.small.items():
        if not contenders[int(at)].pair:
            continue
        score_N = np.array([row["small"][at]["score"] for row in rows])
        bin_N = np.minimum((score_N * BINS).astype(int), BINS - 1)
        bins: list[dict[str, Any]] = []
        for i in range(BINS):
            here_N = bin_N == i
            some = bool(here_N.any())
            bins.append(
                {
                    "from": i / BINS,
                    "to": (i + 1) / BINS,
                    "questions": int(here_N.sum()),
                    "mean_score": float(score_N[here_N].mean()) if some else None,
                    "accuracy": float(worth_N[here_N].mean()) if some else None,
                }
            )
        error = sum(b["questions"] * abs(b["accuracy"] - b["mean_score"]) for b in bins if b["questions"]) / len(rows)
        found.append(
            {"bundle": str(contenders[int(at)].path), "expected_calibration_error": float(error), "bins": bins}
        )
    return found


def curves_of(
    contenders: Sequence[Contender], rows: Sequence[Row], worths: Worths, settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """For each setting of a pair what its cascade would be worth and take at thresholds from 0 to 1.

    The thresholds are 0, 1 and quantiles of the scores, so each step of the curve is about as many questions.
    """
    found = []
    for setting in settings:
        one = contenders[setting.bundle]
        if not one.pair:
            continue
        at = str(one.small)
        small, large = [row["small"][at] for row in rows], [row["large"][setting.name] for row in rows]
        score_N = np.array([row["score"] for row in small])
        grid = np.unique(
            [0.0, 1.0, *np.quantile(score_N, np.linspace(0, 1, min(POINTS - 2, len(rows))), method="lower")]
        )
        costs = {"ms_per_question": (spent(small), spent(large))}
        if all(row["flops"] is not None for row in (*small, *large)):
            costs["estimated_flops_per_question"] = (_operations(small), _operations(large))
        points = []
        for bar in grid:
            exits_N = score_N > bar
            point = {
                "threshold": float(bar),
                "accuracy": float(np.where(exits_N, worths.small[at], worths.large[setting.name]).mean()),
                "exit_rate": float(exits_N.mean()),
            }
            for name, (small_N, large_N) in costs.items():
                point[name] = float((small_N + np.where(exits_N, 0, large_N)).mean())
            points.append(point)
        found.append({"setting": setting.name, "bundle": str(one.path), "points": points})
    return found


def _operations(answers: Sequence[Row]) -> np.ndarray:
    return np.array([sum(a["flops"].values()) for a in answers], float)


def _after(small: Row, large: Row) -> Row:
    """The large model's answer behind the small one's pass."""
    known = small["flops"] is not None and large["flops"] is not None
    return {
        **large,
        "milliseconds": {**small["milliseconds"], **large["milliseconds"]},
        "flops": {**small["flops"], **large["flops"]} if known else None,
    }


def _system(name: str, bundle: str, answers: Sequence[Row], worth_N: np.ndarray, worths: Worths) -> dict[str, Any]:
    """Means over all questions; a stage that did not run for a question took 0 there.

    average_retention: over the questions with an image for which the pruned model ran, None where there are none.
    """
    spent_N = spent(answers)
    kept = [a["retention"] for a in answers if a["retention"] is not None]
    counted = all(a["flops"] is not None for a in answers)
    return {
        "system": name,
        "bundle": bundle,
        "keep": None,
        "policy": None,
        "layers": None,
        "threshold": None,
        "questions": len(answers),
        "accuracy": float(worth_N.mean()),
        "accuracy_standard_error": float(worth_N.std() / np.sqrt(len(answers))),
        **_grouped(worth_N, worths),
        "exit_rate": None,
        "average_retention": float(np.mean(kept)) if kept else None,
        **{
            key: float(np.mean([a[field] for a in answers]))
            for key, field in (
                ("visual_tokens", "visual_tokens"),
                ("kept_tokens", "kept_tokens"),
                ("prompt_tokens", "prompt_tokens"),
                ("new_tokens", "tokens"),
            )
        },
        "ms_per_question": round(float(spent_N.mean()), 3),
        "ms_per_question_median": round(float(np.median(spent_N)), 3),
        "ms_by_stage": _by_stage([a["milliseconds"] for a in answers], 3),
        "estimated_flops_per_question": round(float(_operations(answers).mean())) if counted else None,
        "estimated_flops_by_stage": _by_stage([a["flops"] for a in answers], 0) if counted else None,
    }


def _by_stage(spent: Sequence[dict[str, float]], digits: int) -> dict[str, float]:
    stages = dict.fromkeys(stage for one in spent for stage in one)
    return {stage: round(float(np.mean([one.get(stage, 0) for one in spent])), digits) for stage in stages}


def _grouped(worth_N: np.ndarray, worths: Worths) -> dict[str, Any]:
    """Accuracy by category; where questions come in groups accuracy+ and MME's score too.

    accuracy+: the share of groups of which every question is right; the score is Σ_categories 100·(accuracy +
    accuracy+), as in MME (arXiv 2306.13394 §2.3).
    """
    category_N, group_N = np.array(worths.categories), np.array(worths.groups)
    names = sorted({name for name in worths.categories if name})
    if not names:
        return {}
    by_category: dict[str, dict[str, float]] = {}
    for name in names:
        here_N = category_N == name
        found = {"questions": int(here_N.sum()), "accuracy": float(worth_N[here_N].mean())}
        if any(group_N[here_N]):
            found["accuracy_plus"] = _whole_groups(worth_N[here_N], group_N[here_N])
        by_category[name] = found
    if not all(worths.groups):
        return {"by_category": by_category}
    return {
        "accuracy_plus": _whole_groups(worth_N, group_N),
        "score": sum(100 * (one["accuracy"] + one["accuracy_plus"]) for one in by_category.values()),
        "by_category": by_category,
    }


def _whole_groups(worth_N: np.ndarray, group_N: np.ndarray) -> float:
    return float(np.mean([worth_N[group_N == group].min() == 1 for group in np.unique(group_N)]))
