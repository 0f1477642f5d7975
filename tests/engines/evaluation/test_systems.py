"""What is told about systems, on rows that were written by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from engines.evaluation.charts import Chart, Point, Series, number_axis, score_axis, share_axis
from engines.evaluation.contenders import Contender
from engines.evaluation.data import Example
from engines.evaluation.settings import Setting
from engines.evaluation.sweep import as_bits, from_bits
from engines.evaluation.systems import Worths, curves_of, reliability_of, systems_of

SCORES = (0.95, 0.91, 0.42, 1.0)
SMALL, LARGE, TRUTHS = ("yes", "no", "yes", "yes"), ("yes", "yes", "no", "yes"), ("Yes", "Yes", "No", "No")
PRUNED = Setting((0.5,), "sgl", (1,))


def one(text: str, model: str, ms: float, flops: int) -> dict[str, Any]:
    return {
        "text": text, "tokens": 2, "prompt_tokens": 9, "visual_tokens": 4, "kept_tokens": 2, "kept": None,
        "retention": 0.5 if model == "large" else None, "flops": {f"{model}_prefill": flops},
        "milliseconds": {f"{model}_prefill": ms},
    }  # fmt: skip


ROWS = [
    {
        "small": {"0": one(small, "small", 1.0, 10) | {"score": score}},
        "large": {PRUNED.name: one(large, "large", 4.0, 50)},
    }
    for small, large, score in zip(SMALL, LARGE, SCORES, strict=True)
]
EXAMPLES = [
    Example(str(i), (), "?", (truth,), "", category, group)
    for i, (truth, category, group) in enumerate(
        zip(TRUTHS, ("ocr", "ocr", "ocr", "count"), ("a", "a", "b", "c"), strict=True)
    )
]
PLAN = SimpleNamespace(needs_guidance=True)
CONTENDERS = cast(
    list[Contender],
    [
        SimpleNamespace(
            path=Path("p.bundle"), pair=True, small=0, plan=PLAN, cascade=SimpleNamespace(threshold=0.9, promises=None)
        )
    ],
)
WORTHS = Worths.of(ROWS, EXAMPLES, "yesno")


def test_small_large_and_cascade_by_hand() -> None:
    small, large, cascade = systems_of(CONTENDERS, ROWS, WORTHS, [PRUNED], [])
    assert (small["accuracy"], large["accuracy"]) == (0.25, 0.75)
    # Three exit above 0.9: right, wrong, wrong; the large model is right about the third.
    assert (cascade["threshold"], cascade["exit_rate"], cascade["accuracy"]) == (0.9, 0.75, 0.5)
    assert (small["ms_per_question"], large["ms_per_question"], cascade["ms_per_question"]) == (1, 5, 2)
    flops = [system["estimated_flops_per_question"] for system in (small, large, cascade)]
    assert flops == [10, 60, 22]  # 22.5, rounded
    assert large["estimated_flops_by_stage"] == {"small_prefill": 10, "large_prefill": 50}
    assert (large["average_retention"], large["kept_tokens"], large["new_tokens"]) == (0.5, 2, 2)


def test_categories_groups_and_the_score_of_mme() -> None:
    large = systems_of(CONTENDERS, ROWS, WORTHS, [PRUNED], [])[1]
    assert large["by_category"] == {
        "count": {"questions": 1, "accuracy": 0, "accuracy_plus": 0},
        "ocr": {"questions": 3, "accuracy": 1, "accuracy_plus": 1},
    }
    assert (large["accuracy_plus"], large["score"]) == (pytest.approx(2 / 3), 200)


def test_reliability_by_hand() -> None:
    (found,) = reliability_of(CONTENDERS, ROWS, WORTHS)
    filled = {b["from"]: (b["questions"], b["mean_score"], b["accuracy"]) for b in found["bins"] if b["questions"]}
    assert filled == {0.4: (1, 0.42, 0), 0.9: (3, pytest.approx((0.95 + 0.91 + 1) / 3), pytest.approx(1 / 3))}
    error = (1 * 0.42 + 3 * ((0.95 + 0.91 + 1) / 3 - 1 / 3)) / 4
    assert found["expected_calibration_error"] == pytest.approx(error)


def test_curves_are_the_systems_at_each_threshold() -> None:
    (curve,) = curves_of(CONTENDERS, ROWS, WORTHS, [PRUNED])
    assert [point["threshold"] for point in curve["points"]][::3] == [0, 0.95]
    for point in curve["points"]:
        cascade = systems_of(CONTENDERS, ROWS, WORTHS, [PRUNED], [point["threshold"]])[2]
        for key in ("accuracy", "exit_rate", "ms_per_question"):
            assert point[key] == pytest.approx(cascade[key])


def test_without_flops_nothing_is_made_up() -> None:
    rows = [{**row, "large": {PRUNED.name: {**row["large"][PRUNED.name], "flops": None}}} for row in ROWS]
    small, large, cascade = systems_of(CONTENDERS, rows, WORTHS, [PRUNED], [])
    assert small["estimated_flops_per_question"] == 10
    assert large["estimated_flops_per_question"] is cascade["estimated_flops_by_stage"] is None
    (curve,) = curves_of(CONTENDERS, rows, WORTHS, [PRUNED])
    assert "estimated_flops_per_question" not in curve["points"][0]


@pytest.mark.parametrize("tokens", [1, 7, 8, 577])
def test_kept_tokens_survive_as_bits(tokens: int) -> None:
    kept = np.flatnonzero(np.random.default_rng(tokens).random(tokens) < 0.3)
    assert from_bits(as_bits(kept, tokens), tokens).tolist() == kept.tolist()


@pytest.mark.parametrize("most", [0.0, 0.003, 0.7, 61.0, 99.0, 1e6])
def test_ticks_are_round_and_inside(most: float) -> None:
    axis = number_axis("ms", [most])
    assert axis.low == axis.ticks()[0] == 0 < axis.high
    assert 3 <= len(axis.ticks()) <= 7
    assert axis.ticks()[-1] <= axis.high
    assert len({axis.written(tick) for tick in axis.ticks()}) == len(axis.ticks())


def test_a_chart_puts_points_where_its_axes_say() -> None:
    chart = Chart("t", score_axis("x"), share_axis("y"), (Series("a", (Point(0, 0, ""), Point(0.5, 1, ""))),))
    assert (chart.across(0), chart.across(1)) == (chart.left, chart.right)
    assert (chart.down(0), chart.down(1)) == (chart.bottom, chart.top)
    placed = [tuple(map(float, pair.split(","))) for pair in chart.path(chart.series[0]).split()]
    assert placed == [(chart.left, chart.bottom), ((chart.left + chart.right) / 2, chart.top)]
