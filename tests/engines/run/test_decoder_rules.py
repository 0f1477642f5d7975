"""The host's rules around the decoder graph, without a graph."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engines.budgets import Keep, checked_priority, cuts_behind, cuts_of, image_index, keep_ratios
from engines.decoder import composed, guide_rows
from engines.guidance import GuidanceSum, drawn_priority, priority_of, priority_of_rows, random_guidance, top_visual
from engines.sessions.session import Later
from graphs.errors import OperationFailed, UsageError
from graphs.plan import Guidance, PrunePoint, PruningPlan, average_retention, retention_of

ONE = PruningPlan(name="one", points=(PrunePoint(layer=2, score="priority", keep=0.5),))
TWO = PruningPlan(
    name="two",
    points=(PrunePoint(layer=2, score="attention", keep=0.5), PrunePoint(layer=4, score="attention", keep=0.25)),
)
NONE = PruningPlan(name="none")
VISUAL = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0], bool)


def guided(rows: str) -> PruningPlan:
    return PruningPlan(name="g", guidance=Guidance(layers=(0,), rows=rows))  # type: ignore[arg-type]


def rows_behind(plan: PruningPlan, is_visual_S: np.ndarray, keep: Keep) -> tuple[int, ...]:
    return tuple(cut.rows for cut in cuts_behind(plan, is_visual_S, keep))


@pytest.mark.parametrize(("rows", "wanted"), [("text", 3), ("text_and_last_visual", 4), ("last", 1)])
def test_guide_rows_trail_the_last_image(rows: str, wanted: int) -> None:
    assert guide_rows(guided(rows), VISUAL) == wanted


def test_every_row_of_a_text_chunk_guides() -> None:
    assert guide_rows(guided("text"), np.zeros(4, bool)) == 4
    assert guide_rows(TWO, np.zeros(1, bool)) == 1


def test_image_and_question_belong_in_one_chunk() -> None:
    with pytest.raises(UsageError, match="same chunk"):
        guide_rows(TWO, np.array([0, 1, 1], bool))


def test_all_text_stays_and_each_point_counts_from_the_original() -> None:
    assert rows_behind(ONE, VISUAL, None) == (5 + 4,)
    assert rows_behind(ONE, VISUAL, 0.05) == (5 + 1,)
    assert rows_behind(TWO, VISUAL, None) == (5 + 4, 5 + 2)
    assert rows_behind(TWO, VISUAL, (1, 0.5)) == (13, 9)
    assert rows_behind(NONE, VISUAL, None) == ()


def test_a_chunk_without_an_image_is_not_pruned() -> None:
    text = np.zeros(3, bool)
    assert rows_behind(TWO, text, None) == (3, 3)
    with pytest.raises(UsageError, match="nothing to prune"):
        rows_behind(ONE, text, 0.5)


def test_keep_is_one_share_per_prune_point() -> None:
    assert keep_ratios(ONE, None) == (0.5,)
    assert keep_ratios(ONE, 0.3) == (0.3,)
    assert keep_ratios(NONE, 1) == ()
    for plan, keep in ((TWO, 0.3), (NONE, 0.3), (ONE, (0.3, 0.2))):
        with pytest.raises(UsageError, match="prune points"):
            keep_ratios(plan, keep)
    with pytest.raises(UsageError, match="grow"):
        keep_ratios(TWO, (0.2, 0.3))


def test_kept_rows_compose_over_the_points() -> None:
    first, second = composed(6, [np.array([0, 2, 3, 5]), np.array([0, 3])])
    assert first.tolist() == [0, 2, 3, 5]
    assert second.tolist() == [0, 5]


def test_priority_is_needed_only_where_something_is_pruned() -> None:
    assert checked_priority(None, VISUAL, prunes=False).shape == (1, 13)
    with pytest.raises(UsageError, match="none was given"):
        checked_priority(None, VISUAL, prunes=True)
    with pytest.raises(UsageError, match="rows"):
        checked_priority(np.zeros(3), VISUAL, prunes=True)


def test_guidance_is_summed_in_fp32_over_the_visual_rows() -> None:
    total = GuidanceSum(np.array([1, 3]), np.asarray)
    total.add(np.array([9, 1, 9, 2], np.float32))
    total.add(np.array([9, 0.5, 9, 0.25, 9], np.float32))
    assert total.total.tolist() == [1.5, 2.25]
    assert total.total.dtype == np.float32
    assert priority_of_rows(total.total, np.array([0, 1, 0, 1], bool)).tolist() == [0, 1.5, 0, 2.25]


def test_guidance_that_is_summed_on_the_device_is_copied_when_it_is_asked_for() -> None:
    copied: list[object] = []

    def to_host(handle: object) -> np.ndarray:
        copied.append(handle)
        return np.array([[9, 1.5, 9, 2.25]], np.float32)

    total = GuidanceSum(np.array([1, 3]), to_host)
    for handle in ("first", "second"):
        total.add(handle)
        assert total.so_far == handle
    assert not copied
    assert total.total.tolist() == [1.5, 2.25]
    assert copied == ["second"]


def test_ties_go_to_the_lower_index() -> None:
    assert top_visual(np.array([1, 3, 3, 3, 0], np.float32), 0.4).tolist() == [1, 2]
    with pytest.raises(OperationFailed, match="not a number"):
        top_visual(np.array([1, np.nan]), 0.5)


def test_retention_of_several_points_is_the_share_summed_over_segments() -> None:
    assert retention_of(ONE, 8, (0.5,)) == pytest.approx(average_retention(8, 2, 0.5))
    assert retention_of(TWO, 8, (0.5, 0.25)) == pytest.approx((2 * 1 + 2 * 0.5 + 4 * 0.25) / 8)
    assert retention_of(NONE, 8, ()) == 1


def test_each_image_keeps_its_share_of_what_it_had_and_no_more_than_is_left() -> None:
    points = [PrunePoint(layer=n, score="priority", keep=0.5, per_image=n < 6) for n in (2, 4, 6)]
    first, second, third = cuts_of(PruningPlan(name="each", points=tuple(points)), 3, [8, 1], [8, 4], (0.5, 0.25, 0.5))
    assert first.feeds["pick_0"].tolist() == [0, 1, 2, 3, 4, 5, 6, 11], "one is left of the two that the second keeps"
    assert second.feeds["pick_1"].tolist() == [0, 1, 2, 3, 4, 7]
    assert (first.rows, second.rows, third.rows) == (8, 6, 6)
    assert len(third.feeds["keep_2"]) == 6, "half of twelve, but three are left"


def test_no_more_rows_stay_than_are_left() -> None:
    assert [cut.rows for cut in cuts_of(TWO, 5, [8], [8], (0.25, 0.5))] == [7, 7]
    assert [cut.rows for cut in cuts_of(ONE, 5, [3], [8], None)] == [8]


def test_what_is_merged_is_counted_from_the_rows_that_reach_the_point() -> None:
    point = PrunePoint(layer=2, score="attention", keep=0.25, merge=0.5, recycle=0.5)
    [cut] = cuts_of(PruningPlan(name="merges", points=(point,)), 5, [12], [16], None)
    assert {name: len(value) for name, value in cut.feeds.items()} == {"keep_0": 9, "merge_0": 2, "recycle_0": 6}


def test_a_text_row_is_of_no_image() -> None:
    is_visual = np.array([0, 1, 1, 0, 1], bool)
    assert image_index(is_visual, np.array([0, 0, 1])).tolist() == [-1, 0, 0, -1, 1]
    assert image_index(is_visual, None).tolist() == [-1, 0, 0, -1, 0]


class Made(Later):
    """Guidance of some steps, each 1 for every key."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def and_then(self, later: Made) -> Made:
        return Made(self.steps + later.steps)


def test_guidance_that_is_made_later_is_made_once_for_all_steps_and_counted_once() -> None:
    made: list[int] = []

    def to_host(later: Made) -> np.ndarray:
        made.append(later.steps)
        return np.full((1, 4), later.steps, np.float32)

    total = GuidanceSum(np.array([1, 3]), to_host)  # type: ignore[arg-type]
    total.add(np.full(4, 0.5, np.float32))
    total.add(Made(1))
    total.add(Made(1))
    assert total.total.tolist() == total.total.tolist() == [2.5, 2.5]
    total.add(Made(1))
    assert total.total.tolist() == [3.5, 3.5]
    assert made == [2, 1]


def test_guidance_of_a_conversation_is_that_of_the_chunks_own_visual_rows() -> None:
    prompt = SimpleNamespace(
        all_visual_tokens=5, of_visual=lambda values: values[3:], is_visual=np.array([0, 1, 0, 1], bool)
    )
    assert priority_of(prompt, np.arange(5, dtype=np.float32)).tolist() == [0, 3, 0, 4]  # type: ignore[arg-type]


def test_a_plan_of_chance_draws_with_its_own_seed() -> None:
    drawn = [
        drawn_priority(PruningPlan(name="r", points=(PrunePoint(layer=1, score="random", keep=0.5, seed=seed),)), 9)
        for seed in (3, 4)
    ]
    assert [
        d is not None and np.array_equal(d, random_guidance(9, seed)) for d, seed in zip(drawn, (3, 4), strict=True)
    ] == [True, True]
    plan = PruningPlan(name="g", points=(PrunePoint(layer=1, score="priority", keep=0.5),))
    assert drawn_priority(plan, 9) is None
