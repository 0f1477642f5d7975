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
        # the official table: an apostrophe that is missing is put in, where it stands in the table only
        ("vqa", "shouldnt've", ["shouldn't've"] * 9 + ["no"], 1),
        ("vqa", "its red", ["it's red"] * 9 + ["no"], 0),
        ("vqa", "It's", ["it's"] * 9 + ["no"], 1),
        ("vqa", "none", ["0"] * 9 + ["1"], 1),
        ("vqa", "the red, white", ["red white"] * 9 + ["red"], 1),
        ("vqa", "top/left", ["top left"] * 9 + ["top"], 1),
        ("vqa", "x / y", ["x y"] * 9 + ["x"], 1),
        ("vqa", "4.5", ["4.5"] * 9 + ["45"], 1),
        ("vqa", "two\ndogs", ["2 dogs"] * 9 + ["dogs"], 1),
        # two agree of ten: 8 · 2/3 and 2 · 1/3
        ("vqa", "no", ["yes"] * 8 + ["no"] * 2, (8 * 2 / 3 + 2 / 3) / 10),
        # normalised where all agree too
        ("vqa", "Yes.", ["yes"] * 10, 1),
        ("vqa", "nokia", ["Nokia"] * 10, 1),
        # one edit in four letters; two in four are a half, which counts; three do not
        ("anls", "Rest", ["best"], 0.75),
        ("anls", "bort", ["best"], 0.5),
        ("anls", "12", ["13"], 0.5),
        ("anls", "roby", ["best"], 0),
        # the quotient is compared, as ChartQA's code does: 0.705 / 14.1 is a rounding above 5 %
        ("relaxed", "13.395", ["14.1"], float(abs(13.395 - 14.1) / 14.1 <= 0.05)),
        ("gqa", "Yes.", ["yes"], 1),
        ("gqa", "T-shirt", ["tshirt"], 1),
        ("gqa", "t shirt", ["t-shirt"], 0),
        ("anls", "bet", ["worst", "best"], 0.75),
        ("choice", "B", ["B", "a cat"], 1),
        ("choice", "(b)", ["B", "a cat"], 1),
        # a letter alone is a letter, whatever the options say
        ("choice", "A", ["B", "a"], 0),
        ("choice", "(B).", ["B", "a"], 1),
        ("choice", "B. a dog", ["B", "a cat"], 1),
        ("choice", "A cat.", ["B", "a cat"], 1),
        ("choice", "A cat and a dog", ["A", "two cats"], 0),
        ("choice", "The answer is C", ["C", "a cat"], 1),
        *(
            ("choice", said, ["B", "a dog"], 1)
            for said in (
                *("B dog", "**B**", "[B]", "B is correct", "B\na cat", "Answer:\nB", "I choose B.", "**B.** a cat"),
                *("The answer is **B**", r"$\boxed{B}$", "It must be B, as a cat is no dog", "A cat is seen, so B"),
            )
        ),
        *(("choice", said, ["B", "a dog"], 0) for said in ("B or C", "A and B", "A is right", "Plan-B", "a b c")),
        ("choice", "A is correct", ["A", "a dog"], 1),
        ("choice", "A house", ["A", "a dog"], 0),
        ("choice", "A Persian cat", ["A", "a dog"], 0),
        ("choice", "A 3D model", ["A", "a dog"], 0),
        ("choice", "Hepatitis C", ["C", "flu"], 0),
        ("choice", "$5", ["B", "$5"], 1),
        ("choice", "C#", ["B", "C#"], 1),
        ("choice", "C#.", ["B", "C#"], 1),
        ("choice", "C#", ["C", "Java"], 1),
        ("choice", "[2, 3]", ["B", "[2, 3]"], 1),
        ("choice", "The answer is B", ["C", "a cat"], 0),
        ("choice", "Answer: B", ["B", "a cat"], 1),
        ("choice", "ANSWER: (B)", ["B", "a cat"], 1),
        ("choice", "Option B", ["B", "a cat"], 1),
        ("choice", "The correct option is B.", ["B", "a cat"], 1),
        ("choice", "the answer is option B", ["B", "a cat"], 1),
        ("choice", "The answer is a dog", ["A", "a cat"], 0),
        ("choice", "", ["A", "a cat"], 0),
        ("yesno", "Yes, it is", ["Yes"], 1),
        ("yesno", "n", ["No"], 1),
        ("yesno", "A no", ["no"], 1),  # the word ends with the fourth letter
        ("yesno", "It is not", ["No"], 0),
        ("yesno", "no.", ["Yes"], 0),
        # [100, 100, 300, 200] and [200, 100, 400, 200] share a third; half of a box is a half
        ("iou", "<ref>x</ref><box>(100,100),(300,200)</box>", ["[0.2, 0.1, 0.4, 0.2]"], 0),
        ("iou", "<box>[[100, 100, 300, 200]]</box>", ["[0.1, 0.1, 0.2, 0.2]"], 1),
        ("iou", "[0.10, 0.10, 0.30, 0.20]", ["[0.1, 0.1, 0.3, 0.2]"], 1),
        ("iou", '[{"bbox_2d": [100, 100, 300, 200]}]', ["[0.1, 0.1, 0.3, 0.2]"], 1),
        ("iou", "(300,200),(100,100)", ["[0.1, 0.1, 0.3, 0.2]"], 0),
        ("iou", "[0, 0, 0.5, 0.5]", ["[0, 0, 0.25, 0.5]"], 1),
        ("iou", "on the left", ["[0.1, 0.1, 0.3, 0.2]"], 0),
        ("relaxed", "105", ["100"], 1),
        ("relaxed", "105.1", ["100"], 0),
        ("relaxed", "-95", ["-100"], 1),
        ("relaxed", "5.2%", ["5%"], 1),
        ("relaxed", "5", ["5%"], 0),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "0.0", ["0"], 0),
        ("relaxed", "Blue", ["blue"], 1),
        ("relaxed", "nan", ["1"], 0),
        # what is not finite is no number: it is compared as it stands
        ("relaxed", "Inf", ["inf"], 1),
        ("relaxed", "inf", ["1"], 0),
        ("relaxed", "1", ["inf"], 0),
        ("relaxed", "2", ["-inf"], 0),
        ("relaxed", "12 apples", ["12"], 0),
    ],
)
def test_an_answer_is_worth_what_the_source_says(metric: str, answer: str, truths: list[str], worth: float) -> None:
    assert METRICS[metric].value(answer, truths) == pytest.approx(worth)


@pytest.mark.parametrize(("truths", "possible"), [(["Yes"], True), (["no"], True), (["maybe"], False)])
def test_only_yes_and_no_can_be_answered_with_yes_or_no(truths: list[str], possible: bool) -> None:
    assert METRICS["yesno"].possible(truths) == possible


@pytest.mark.parametrize(("a", "b", "edits"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)])
def test_distance_is_levenshteins(a: str, b: str, edits: int) -> None:
    assert distance(a, b) == distance(b, a) == edits


def test_the_command_knows_every_metric_and_only_graded_ones_lie_between() -> None:
    assert tuple(METRICS) == METRIC_NAMES
    assert {name for name, metric in METRICS.items() if metric.graded} == {"vqa", "anls"}
    assert all("arXiv" in metric.source for name, metric in METRICS.items() if name != "exact")
