"""Rows that rounding keeps instead of others agree; whatever else is wrong with them does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundles.golden import Replay
from engines.bundles.near_ties import Case, Tensors, compared, kept_first
from engines.words import replays_in_words
from graphs.compare import Comparison
from graphs.plan import VisionPoint
from graphs.spec import ExportSpec, present_names, spec_from_folder

TEXT, VISUAL, ROWS = 4, 60, 44  # rows of text in front, of the image, and of both that are kept
HALF, FULL = 2e-2, 1e-4
Change = Callable[[np.ndarray], np.ndarray]


@pytest.fixture
def spec(exports: dict[str, Path]) -> ExportSpec:
    """One prune point in the decoder, by attention."""
    found = spec_from_folder(exports["alone"])
    assert found.plan.points[0].score == "attention"
    return found


def other(rows: np.ndarray) -> np.ndarray:
    """The fourth visual row of those kept is its neighbour."""
    changed = rows.copy()
    changed[..., TEXT + 3] += 1
    return changed


def tower(spec: ExportSpec, change: Change, allowed: float, features: Change | None = None) -> list[Comparison]:
    def outputs(kept: np.ndarray) -> Tensors:
        return {"kept_vision": kept, "visual_embeds": (10 + kept[:, None]) * np.ones((1, 4), np.float32)}

    wanted = outputs(np.arange(0, 2 * ROWS, 2))
    got = outputs(change(wanted["kept_vision"]))
    if features:
        got["visual_embeds"] = features(got["visual_embeds"])
    return list(compared(Case("vision", "one", {}, wanted), got, spec, allowed))


def decoder(spec: ExportSpec, change: Change, logits: Change | None = None, allowed: float = HALF) -> Replay:
    kept = np.concatenate([np.arange(TEXT), TEXT + np.arange(0, VISUAL, 2)[: ROWS - TEXT]])[None]
    is_visual = np.arange(TEXT + VISUAL)[None] >= TEXT
    names = [name for layer in range(spec.language.layers) for name in present_names(layer)]
    wanted = {"kept_0": kept, **dict.fromkeys([*names, "logits"], np.ones((1, 2), np.float32))}
    got = {**wanted, "kept_0": change(kept), "logits": (logits or np.zeros_like)(wanted["logits"])}
    case = Case("decoder", "prefill", {"is_visual": is_visual}, wanted)
    return Replay("decoder", "prefill", tuple(compared(case, got, spec, allowed)))


def test_a_near_tie_in_a_tower(spec: ExportSpec) -> None:
    told = tower(spec, other, HALF)
    assert all(t.agrees for t in told)
    assert told[0].overlap == pytest.approx((ROWS - 1) / ROWS)
    assert not all(t.agrees for t in tower(spec, other, FULL)), "fp32 has no such ties"


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept[::-1],
        lambda kept: kept + 1,
        lambda kept: kept - 2,
        lambda kept: kept.astype(np.int32),
    ],
    ids=["order", "all others", "below zero", "type"],
)
def test_what_is_no_near_tie_in_a_tower(spec: ExportSpec, change: Change) -> None:
    assert not tower(spec, change, HALF)[0].agrees


@pytest.mark.parametrize("wrong", [lambda x: x + 9, lambda x: x * np.nan, lambda x: x[:, :2]])
def test_features_behind_a_near_tie_are_compared(spec: ExportSpec, wrong: Change) -> None:
    assert not tower(spec, other, HALF, wrong)[1].agrees


def test_a_feature_that_only_one_side_keeps_is_finite(spec: ExportSpec) -> None:
    def unseen(features: np.ndarray) -> np.ndarray:
        changed = features.copy()
        changed[TEXT + 3] = np.nan
        return changed

    assert not tower(spec, other, HALF, unseen)[1].agrees


@pytest.fixture
def merging(spec: ExportSpec) -> ExportSpec:
    """The same with a tower that merges in every layer."""
    point = VisionPoint(score="tome", keep=0.5, per_image=True, tower_layers=2)
    return spec.model_copy(update={"plan": spec.plan.model_copy(update={"vision": point})})


ALL_BUT = ROWS // 2 - 9  # rows of a half that may be others: nine of 22 are two fifths


def swapped(count: int, first: int = 0) -> Change:
    """``count`` rows of each half, from ``first`` on, are others, of the same size."""

    def change(features: np.ndarray) -> np.ndarray:
        changed = features.copy()
        for half in (0, ROWS // 2):
            places = slice(half + first, half + first + count)
            changed[places] = np.roll(features[places], 1, axis=0)
        return changed

    return change


def test_of_a_tower_that_merges_two_fifths_of_either_half_agree(merging: ExportSpec) -> None:
    kept, features = tower(merging, lambda kept: kept, HALF, swapped(ALL_BUT))
    assert kept.agrees
    assert features.agrees
    assert features.overlap == pytest.approx(18 / ROWS)
    assert features.error == 0.0, "of the rows that agree"
    _, features = tower(merging, lambda kept: kept, HALF, swapped(ALL_BUT + 1))
    assert features.problem == f"16 of its {ROWS} rows agree within 0.02, and 40% of either half must"


def test_an_image_that_is_wrong_is_not_made_up_for_by_another(merging: ExportSpec) -> None:
    def second(features: np.ndarray) -> np.ndarray:
        return np.concatenate([features[: ROWS // 2], np.roll(features[ROWS // 2 :], 1, axis=0)])

    assert not tower(merging, lambda kept: kept, HALF, second)[1].agrees
    shifted = tower(merging, lambda kept: np.concatenate([kept[: ROWS // 2], kept[ROWS // 2 :] + 900]), HALF)
    assert not shifted[1].agrees


@pytest.mark.parametrize("factor", [0.0, 9.0])
def test_rows_that_are_no_averages_are_told(merging: ExportSpec, factor: float) -> None:
    def scaled(features: np.ndarray) -> np.ndarray:
        return features * np.where(np.arange(ROWS) % 4 == 3, factor, 1.0)[:, None]

    told = tower(merging, lambda kept: kept, HALF, scaled)[1]
    assert "long, the reference's" in str(told.problem)


def test_of_a_tower_that_merges_rows_are_compared_where_both_keep_them(merging: ExportSpec) -> None:
    def third_others(kept: np.ndarray) -> np.ndarray:
        return kept + (np.arange(ROWS) % 3 == 0)

    kept, features = tower(merging, third_others, HALF)
    assert kept.overlap == features.overlap == pytest.approx(29 / ROWS)
    assert features.agrees
    assert not all(t.agrees for t in tower(merging, lambda kept: kept + 1, HALF))
    assert not all(t.agrees for t in tower(merging, third_others, FULL)), "fp32 has no such ties"


def test_zip_that_averages_nothing_is_no_tower_that_merges(merging: ExportSpec) -> None:
    vision = merging.plan.vision
    assert vision
    plain = vision.model_copy(update={"score": "zip", "merge": 0.0})
    spec = merging.model_copy(update={"plan": merging.plan.model_copy(update={"vision": plain})})
    assert not tower(spec, lambda kept: kept, HALF, swapped(4))[1].agrees
    assert plain.model_copy(update={"merge": 0.1}).merges


def test_what_is_told_of_merged_rows(merging: ExportSpec) -> None:
    told = Replay("vision", "one", tuple(tower(merging, other, HALF, swapped(6, 9))))
    [line] = replays_in_words([told])
    assert told.agrees
    assert "kept rows 97.7% equal" in line
    assert "merged rows 70.4% equal" in line


@pytest.mark.parametrize("wrong", [lambda x: x * np.nan, lambda x: x[:, :2], lambda x: x.astype(np.float16)])
@pytest.mark.parametrize("kept", [lambda kept: kept, other], ids=["alike", "other"])
def test_features_of_a_tower_that_merges_are_finite_and_of_their_shape(
    merging: ExportSpec, kept: Change, wrong: Change
) -> None:
    assert not tower(merging, kept, HALF, wrong)[1].agrees


@pytest.mark.parametrize("change", [lambda kept: kept[::-1], lambda kept: kept - 2, lambda kept: kept.astype(np.int32)])
def test_rows_of_a_tower_that_merges_are_in_their_order(merging: ExportSpec, change: Change) -> None:
    assert not tower(merging, change, HALF)[0].agrees


def test_behind_a_near_tie_in_the_decoder_nothing_is_compared(spec: ExportSpec) -> None:
    told = decoder(spec, other)
    before = {name for layer in spec.plan.segments(spec.language.layers)[0] for name in present_names(layer)}
    assert {t.name for t in told.tensors if t.compared} == before | {"kept_0"}
    assert told.agrees
    [line] = replays_in_words([told])
    assert "97% equal" in line
    assert f"{told.uncompared} tensors behind other kept rows not compared" in line
    assert not decoder(spec, other, allowed=FULL).agrees


@pytest.mark.parametrize(
    "wrong", [lambda x: x * np.nan, lambda x: x[:, :1], lambda x: x.astype(np.float64)], ids=["NaN", "shape", "type"]
)
def test_behind_a_near_tie_numbers_are_finite_and_of_their_shape(spec: ExportSpec, wrong: Change) -> None:
    assert not decoder(spec, other, wrong).agrees


def text_for_image(rows: np.ndarray) -> np.ndarray:
    """The first row of text is dropped for one more of the image."""
    return np.sort(np.concatenate([rows[0, 1:], [TEXT + 1]]))[None]


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[:, ::-1], lambda rows: np.concatenate([rows[:, :-1], rows[:, -1:] * 99], 1), text_for_image],
    ids=["order", "beyond", "text"],
)
def test_what_is_no_near_tie_in_the_decoder(spec: ExportSpec, change: Change) -> None:
    assert not decoder(spec, change).agrees


def test_scores_from_outside_have_no_near_ties(exports: dict[str, Path]) -> None:
    guided = spec_from_folder(exports["large"])
    assert guided.plan.points[0].score == "priority"
    assert not decoder(guided, other).agrees


def test_cuts_come_in_their_order() -> None:
    names = ["logits", "kept_10", "present_k_0", "kept_2", "kept_vision", "kept_0"]
    assert sorted(names, key=kept_first)[:4] == ["kept_vision", "kept_0", "kept_2", "kept_10"]
