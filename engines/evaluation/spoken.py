"""An answer as VQA's official evaluation compares it.

Marks, full stops and articles go, numerals become digits, a contraction without its apostrophe gets it. Source: VQA
(arXiv 1505.00468 §5) and its authors' evaluation code (GT-Vision-Lab/VQA, vqaEval.py), read and written anew.
"""

from __future__ import annotations

import re

MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMERALS = {
    "none": "0",
    **{word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())},
}
# One apostrophe, two or more. The official table has neither "I'm" nor what is a word without it ("its", "well").
SINGLE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"""
SEVERAL = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""


def _one_less(word: str) -> list[str]:
    """The word without one of its apostrophes."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {
    **{word.replace("'", ""): word for word in SINGLE.split()},
    **{short: word for word in SEVERAL.split() for short in _one_less(word)},
    "somebody'd": "somebodyd",  # as the official table has it
}


def spoken(text: str) -> str:
    """The answer in the form in which answers are compared."""
    given = text.replace("\n", " ").replace("\t", " ").strip()
    return " ".join(_word(word) for word in _unmarked(given).lower().split() if word not in ARTICLES)


def _unmarked(given: str) -> str:
    """A mark beside a space goes (every mark, where a comma stands between digits), any other becomes a space."""
    grouped = re.search(r"\d,\d", given) is not None
    text = given
    for mark in MARKS:
        goes = grouped or f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", text)


def _word(word: str) -> str:
    number = NUMERALS.get(word, word)
    return CONTRACTIONS.get(number, number)
