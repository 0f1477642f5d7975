"""What an answer is worth, in [0, 1], beside the answers that are known to be right.

Each metric says where it is from; ``METRICS`` is the table of all. A graded one gives values between 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PEOPLE = 4  # with fewer answers VQA accuracy cannot reach 1


@dataclass(frozen=True)
class Metric:
    """value(answer, truths) in [0, 1]; needs: how many truths there must be for the best answer to get 1."""

    value: Callable[[str, Sequence[str]], float]
    meaning: str
    source: str
    graded: bool = False
    needs: int = 1


def plain(text: str) -> str:
    """Lower case, white space single."""
    return " ".join(text.casefold().split())


def exact(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the truths, case and white space aside."""
    return float(plain(answer) in map(plain, truths))


def contains(answer: str, truths: Sequence[str]) -> float:
    """1 where one of the truths is a part of the answer, case and white space aside."""
    return float(any(plain(truth) in plain(answer) for truth in truths))


def anls(answer: str, truths: Sequence[str]) -> float:
    """Best similarity 1 − distance / longer length, 0 where it is below a half."""
    return max(_similarity(plain(answer), plain(truth)) for truth in truths)


def relaxed(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is a number within 5 % of a truth, or equal to one that is no number (or 0)."""
    return float(any(_close(answer, truth) for truth in truths))


def vqa(answer: str, truths: Sequence[str]) -> float:
    """Mean over all people of min(1, agreeing others / 3), both sides normalised as the official code does.

    The official code repairs contractions by a table ("dont" is "don't"); here both lose their apostrophes.
    """
    said, known = answer.strip(), [truth.strip() for truth in truths]
    if len(set(known)) > 1:
        said, known = _spoken(said), [_spoken(truth) for truth in known]
    agree = [said == truth for truth in known]
    return float(np.mean([min(1.0, (sum(agree) - mine) / 3) for mine in agree]))


METRICS = {
    "exact": Metric(exact, "the answer is a truth, case and white space aside", "GQA, arXiv 1902.09506 §4"),
    "contains": Metric(contains, "a truth is a part of the answer", "OCRBench, arXiv 2305.07895 §3"),
    "vqa": Metric(vqa, "min(1, agreeing people / 3), on average", "VQA, arXiv 1505.00468 §5", True, PEOPLE),
    "anls": Metric(anls, "normalised edit similarity, from a half on", "ST-VQA, arXiv 1905.13648 §4", True),
    "relaxed": Metric(relaxed, "a number within 5 %, other answers exact", "ChartQA, arXiv 2203.10244 §5"),
}


def distance(a: str, b: str) -> int:
    """Levenshtein's edit distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def _similarity(a: str, b: str) -> float:
    far = distance(a, b) / max(len(a), len(b), 1)
    return 1 - far if far < 0.5 else 0.0


def _close(answer: str, truth: str) -> bool:
    said, known = _number(answer), _number(truth)
    if said is not None and known:
        return abs(said - known) <= 0.05 * abs(known)
    return plain(answer) == plain(truth)


def _number(text: str) -> float | None:
    """A finite number, a percentage divided by 100."""
    bare = text.strip()
    try:
        value = float(bare.rstrip("%"))
    except ValueError:
        return None
    if not np.isfinite(value):
        return None
    return value / 100 if bare.endswith("%") else value


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMERALS = {
    "none": "0",
    **{word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}


def _spoken(text: str) -> str:
    """An answer as VQA's evaluation compares it: marks, full stops, articles and apostrophes gone, numerals as digits.

    A mark beside a space goes (every mark, where a comma stands between digits), any other becomes a space.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", text) is not None
    for mark in _MARKS:
        goes = grouped or f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if goes else " ")
    text = re.sub(r"\.(?!\d)", "", text).replace("'", "").lower()
    return " ".join(_NUMERALS.get(word, word) for word in text.split() if word not in ("a", "an", "the"))
