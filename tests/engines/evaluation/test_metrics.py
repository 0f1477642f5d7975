"""Each metric on cases worked out by hand from its source."""

from __future__ import annotations

import pytest

from engines.evaluation.asked import METRIC_NAMES
from engines.evaluation.metrics import METRICS, distance

TEN = ["yes"] * 6 + ["no"] * 3 + ["maybe"]


@pytest.mark.parametrize(
    ("metric", "answer", "truths", "worth"),
    [
        ("exact", " Red\n cube", ["blue", "red cube"], 1),
        ("exact", "red", ["red cube"], 0),
        ("exact", "red.", ["red"], 0),
        ("contains", "It is a Red  cube.", ["red cube"], 1),
        ("contains", "red", ["red cube"], 0),
        # six agree: leaving one of them out five are left, else six; both are at least 3
        ("vqa", "yes", TEN, 1),
        # three agree: the seven others give min(1, 3/3), each of the three min(1, 2/3)
        ("vqa", "no", TEN, (7 * 1 + 3 * 2 / 3) / 10),
        # one agrees: the nine others give 1/3, the one itself 0
        ("vqa", "maybe", TEN, 9 * (1 / 3) / 10),
        ("vqa", "Yes!", TEN, 1),
        ("vqa", "a two", ["2"] * 9 + ["two dogs"], 1),
        ("vqa", "dont know", ["don't know"] * 9 + ["no"], 1),
        ("vqa", "1,000", ["1000"] * 9 + ["no"], 1),
        ("vqa", "black-white", ["black white"] * 9 + ["black"], 1),
        ("vqa", "3.5 m.", ["3.5 m"] * 9 + ["4"], 1),
        # no preparation where all agree, as in the official code
        ("vqa", "Yes", ["yes"] * 10, 0),
        # one edit in four letters; two in four are a half, which counts nothing
        ("anls", "Rest", ["best"], 0.75),
        ("anls", "robt", ["best"], 0),
        ("anls", "bet", ["worst", "best"], 0.75),
        ("relaxed", "105", ["100"], 1),
        ("relaxed", "105.1", ["100"], 0),
        ("relaxed", "-95", ["-100"], 1),
        ("relaxed", "5.2%", ["5%"], 1),
        ("relaxed", "5", ["5%"], 0),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "Blue", ["blue"], 1),
        ("relaxed", "nan", ["1"], 0),
        ("relaxed", "12 apples", ["12"], 0),
    ],
)
def test_an_answer_is_worth_what_the_source_says(metric: str, answer: str, truths: list[str], worth: float) -> None:
    assert METRICS[metric].value(answer, truths) == pytest.approx(worth)


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_distance_is_levenshteins(a: str, b: str, edits: int) -> None:
    assert distance(a, b) == distance(b, a) == edits


def test_the_command_knows_every_metric_and_only_graded_ones_lie_between() -> None:
    assert tuple(METRICS) == METRIC_NAMES
    assert {name for name, metric in METRICS.items() if metric.graded} == {"vqa", "anls"}
    assert all("arXiv" in metric.source for metric in METRICS.values())
