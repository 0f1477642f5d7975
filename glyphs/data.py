"""Questions about scenes of handwritten digits, and the held-out set. numpy and Pillow only."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from glyphs.scenes import COLOURS, Scenes, draw, sample_scenes

KINDS = ("which digit", "what colour", "how many", "read")
NAMES = tuple(COLOURS)
RECORDS_SEED, EVAL_SEED = 31, 37  # no other figure is computed on the questions of either


@dataclass(frozen=True)
class Question:
    """image: 96x96 RGB; question: without prompt; answer: tokens separated by single spaces; kind: one of KINDS."""

    image: Image.Image
    question: str
    answer: str
    kind: str


def questions_of(scenes: Scenes, i: int, kind: str) -> list[tuple[str, str]]:
    """Every (question, answer) of the kind that has exactly one answer in scene i."""
    used = scenes.digit[i] >= 0
    digit, colour, x = (field[i][used] for field in (scenes.digit, scenes.colour, scenes.x))
    if kind == "which digit":
        single = [c for c in range(len(NAMES)) if (colour == c).sum() == 1]
        return [(f"which digit is {NAMES[c]}?", str(digit[colour == c][0])) for c in single]
    if kind == "what colour":
        single = [d for d in range(10) if (digit == d).sum() == 1]
        return [(f"what colour is the {d}?", NAMES[colour[digit == d][0]]) for d in single]
    if kind == "how many":
        return [(f"how many {name}?", str((colour == c).sum())) for c, name in enumerate(NAMES)]
    if kind == "read":
        order = np.argsort(x, kind="stable")
        digit, colour = digit[order], colour[order]
        present = [c for c in range(len(NAMES)) if (colour == c).any()]
        return [(f"read the {NAMES[c]} digits in order", " ".join(map(str, digit[colour == c]))) for c in present]
    raise ValueError(f"kind is one of {KINDS}, got {kind!r}")


def pick_question(rng: np.random.Generator, scenes: Scenes, i: int, kind: str) -> tuple[str, str] | None:
    """One question of the kind, or None when the scene has none.

    Three "how many" in four have a glyph to count; half of "read" have at least two to read;
    four "what colour" in five ask for another colour than the scene's commonest.
    """
    choices = questions_of(scenes, i, kind)
    wanted = choices
    if kind == "how many" and rng.random() < 0.75:
        wanted = [c for c in choices if c[1] != "0"]
    if kind == "read" and rng.random() < 0.5:
        wanted = [c for c in choices if " " in c[1]]
    if kind == "what colour":
        # Mostly not the scene's commonest colour: else naming that one, without a look at the digit, is right
        # two times in three, and nothing better is learned (seen: 0.53 after 15,000 steps).
        shown = scenes.colour[i][scenes.digit[i] >= 0]
        commonest = NAMES[int(np.bincount(shown).argmax())]
        if rng.random() < 0.8:
            wanted = [c for c in choices if c[1] != commonest]
    wanted = wanted or choices
    return wanted[int(rng.integers(len(wanted)))] if wanted else None


def held_out_questions(n: int, seed: int = 0) -> list[Question]:
    """n questions on n pictures of scans no model was trained on; kinds take turns.

    The same on every machine; the first m of n do not depend on n.
    """
    rng = np.random.Generator(np.random.PCG64(seed + 1_000_000_007))
    questions: list[Question] = []
    while len(questions) < n:
        kind = KINDS[len(questions) % len(KINDS)]
        asked = None
        while asked is None:
            scenes = sample_scenes(rng, 1, held_out=True)
            asked = pick_question(rng, scenes, 0, kind)
        questions.append(Question(Image.fromarray(draw(rng, scenes)[0]), *asked, kind))
    return questions


def held_out_records(n: int, seed: int = RECORDS_SEED) -> Iterator[dict[str, object]]:
    """n held-out questions as the front door's built-in set: image, question, answers and kind."""
    for q in held_out_questions(n, seed):
        yield {"image": q.image, "question": q.question, "answers": [q.answer], "kind": q.kind}


def eval_records(n: int) -> Iterator[dict[str, object]]:
    """n others, for what is evaluated was calibrated and tuned on those."""
    return held_out_records(n, EVAL_SEED)
