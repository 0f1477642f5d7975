"""What an answer is worth, in [0, 1], beside the answers that are known to be right.

Each metric says where it is from; ``METRICS`` is the table of all. A graded one gives values between 0 and 1.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engines.evaluation.boxes import ENOUGH, box_in, overlap
from engines.evaluation.spoken import spoken

PUNCTUATION = str.maketrans("", "", string.punctuation)
PEOPLE = 4  # with fewer answers VQA accuracy cannot reach 1


@dataclass(frozen=True)
class Metric:
    """value(answer, truths) in [0, 1].

    needs: how many truths there must be for the best answer to get 1. possible: whether an answer could get 1 at all
    beside these truths; wants: what they must be for that, in words.
    """

    value: Callable[[str, Sequence[str]], float]
    meaning: str
    source: str
    graded: bool = False
    needs: int = 1
    possible: Callable[[Sequence[str]], bool] = lambda truths: True
    wants: str = ""


def plain(text: str) -> str:
    """Lower case, white space single."""
    return " ".join(text.casefold().split())


def exact(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the truths, case and white space aside."""
    return float(plain(answer) in map(plain, truths))


def gqa(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the truths, case, white space and ASCII punctuation aside, as lmms-eval counts."""
    bare = [plain(text.translate(PUNCTUATION)) for text in (answer, *truths)]
    return float(bare[0] in bare[1:])


def contains(answer: str, truths: Sequence[str]) -> float:
    """1 where one of the truths is a part of the answer, case and white space aside."""
    return float(any(plain(truth) in plain(answer) for truth in truths))


def anls(answer: str, truths: Sequence[str]) -> float:
    """Best similarity 1 − distance / longer length, 0 where it is below a half.

    ST-VQA's formula has 0 at a half too; the evaluators whose figures are published (DocVQA's, lmms-eval's) do not.
    """
    return max(_similarity(plain(answer), plain(truth)) for truth in truths)


def relaxed(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is a number within 5 % of a truth, or equal to one that is no number (or 0)."""
    return float(any(_close(answer, truth) for truth in truths))


def vqa(answer: str, truths: Sequence[str]) -> float:
    """Mean over all people of min(1, agreeing others / 3), both sides normalised as the official code does.

    Always, as TextVQA's evaluator does: one variant of VQA's compares as it stands where all people agree, so that
    "Yes" would not be "yes".
    """
    said, known = spoken(_one_line(answer)), [spoken(_one_line(truth)) for truth in truths]
    agree = [said == truth for truth in known]
    return float(np.mean([min(1.0, (sum(agree) - mine) / 3) for mine in agree]))


# The letter itself is a capital: "the answer is a dog" names none.
BEHIND = re.compile(r"\b(?i:answer|option|choice)(?i: is)?:?\s+(?i:option )?\(?([A-Z])\b")
MARKS = re.compile(r"[*#\[\]{}$]|\\boxed|\\text")  # of Markdown and LaTeX
LONE = re.compile(r"(?<![\w'’-])([A-H])(?![\w'’-])")
ARTICLE = re.compile(r"A (?!is\b|and\b|or\b)\w")
NAME = re.compile(r"\b[A-Z]\w+ $")  # "Hepatitis C", "Vitamin C"


def choice(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer names the right option, truths[0] its letter and truths[1] its text.

    A letter stands alone or first with a mark behind it ("B", "(b)", "B. a cat"), or behind "answer is", "answer:",
    "option" or "option is", however these are written; else it is the only capital of A to H that stands alone and is
    no article ("B is correct", "I choose B."). Marks of Markdown and LaTeX do not count ("**B**").
    """
    said = MARKS.sub("", answer).strip()
    for text in (answer.strip(), said):  # as it stands first, for an option may hold marks ("C#")
        if alone := re.fullmatch(r"\(?([A-Za-z])\)?[.:,]?", text):
            return float(alone[1].upper() == truths[0])
        if _named(text, truths):
            return 1.0
    found = re.match(r"\(?([A-Za-z])(?:[).:,]|$)", said) or BEHIND.search(said)
    if not found:
        lone = [
            m for m in LONE.finditer(said) if not (ARTICLE.match(said, m.start()) or NAME.search(said[: m.start()]))
        ]
        found = lone[0] if len({m[1] for m in lone}) == 1 else None
    return float(found is not None and found[1].upper() == truths[0])


def _named(answer: str, options: Sequence[str]) -> bool:
    return plain(answer.rstrip(".")) in {plain(option.rstrip(".")) for option in options}


def yesno(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer says yes or no as the truth does: it is that word or its letter, or begins with it."""
    said = answer.strip().lower().replace(".", "")
    word = {"y": "yes", "n": "no"}.get(said) or next((w for w in ("yes", "no") if w in said[:4]), "")
    return float(word in map(plain, truths))


def iou(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer's box overlaps a truth's by at least a half (intersection over union)."""
    said = box_in(answer)
    return float(said is not None and any(overlap(said, box) >= ENOUGH for box in map(box_in, truths) if box))


METRICS = {
    "exact": Metric(exact, "the answer is a truth, case and white space aside", "string equality"),
    "gqa": Metric(
        gqa, "the answer is a truth, case and punctuation aside", "GQA, arXiv 1902.09506 §4, as lmms-eval counts it"
    ),
    "contains": Metric(contains, "a truth is a part of the answer", "OCRBench, arXiv 2305.07895 §3"),
    "vqa": Metric(vqa, "min(1, agreeing people / 3), on average", "VQA, arXiv 1505.00468 §5", True, PEOPLE),
    "anls": Metric(anls, "normalised edit similarity, from a half up", "ST-VQA, arXiv 1905.13648 §4", True),
    "relaxed": Metric(relaxed, "a number within 5 %, other answers exact", "ChartQA, arXiv 2203.10244 §5"),
    "choice": Metric(
        choice,
        "the right option's letter or text",
        "MMBench, arXiv 2307.06281 §4 (its first step; no judge)",
        possible=lambda truths: len(truths) > 1 and re.fullmatch("[A-Z]", truths[0]) is not None,
        wants="a letter, then that option's text",
    ),
    "yesno": Metric(
        yesno,
        "yes or no, as the truth is",
        "MME, arXiv 2306.13394 §2.3",
        possible=lambda truths: {plain(truth) for truth in truths} <= {"yes", "no"},
        wants="yes or no",
    ),
    "iou": Metric(
        iou,
        "a box that overlaps by at least a half",
        "RefCOCO, arXiv 1608.00272; at least 0.5, as Qwen-VL and InternVL count",
        possible=lambda truths: all(map(box_in, truths)),
        wants="a box, [left, top, right, bottom]",
    ),
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
    return 1 - far if far <= 0.5 else 0.0


def _close(answer: str, truth: str) -> bool:
    said, known = _number(answer), _number(truth)
    if said is not None and known:
        return abs(said - known) / abs(known) <= 0.05
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


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
