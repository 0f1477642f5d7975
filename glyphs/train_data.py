"""Packed training batches: several questions on one image share its prefix in one sequence.

A row is [prefix P][block][block]...[padding]; P holds the system words and the V = 144 image tokens.
A block is one question with its answer; it sees the prefix and itself, and its positions start again
at P. T = tail length, S = P + T.
"""

from dataclasses import dataclass

import numpy as np

from glyphs.data import KINDS, pick_question
from glyphs.scenes import COUNTS, DENSE_COUNTS, PATCH, SIDE, Scenes, draw, sample_scenes

CELLS = SIDE // PATCH
NO_DIGIT, NO_COLOUR = 10, 7
IGNORE = -100
TAIL = 104
TAIL_FIELDS = ("tail_ids", "tail_labels", "tail_hints", "tail_keyword", "tail_offsets", "tail_block")
CELL_FIELDS = ("cell_digit", "cell_colour", "cell_centre")


@dataclass(frozen=True)
class Batch:
    """pixels: uint8 [N,H,W,3]; tail_*: int64 [N,T], block -1 is padding; cell_*: int64 [N,V]."""

    pixels: np.ndarray
    tail_ids: np.ndarray
    tail_labels: np.ndarray
    tail_hints: np.ndarray
    tail_keyword: np.ndarray
    tail_offsets: np.ndarray
    tail_block: np.ndarray
    cell_digit: np.ndarray
    cell_colour: np.ndarray
    cell_centre: np.ndarray


def cells_of(scenes: Scenes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What covers the centre of each patch: digit, colour, and whether a glyph's centre lies in it; int64 [N,V]."""
    n = len(scenes)
    digit, colour, centre = (
        np.full((n, CELLS, CELLS), NO_DIGIT),
        np.full((n, CELLS, CELLS), NO_COLOUR),
        np.zeros((n, CELLS, CELLS), int),
    )
    middle = np.arange(CELLS) * PATCH + PATCH / 2
    for i, g in zip(*np.nonzero(scenes.digit >= 0), strict=False):
        rows = np.abs(middle - scenes.y[i, g]) <= scenes.size[i, g] / 2
        columns = np.abs(middle - scenes.x[i, g]) <= scenes.size[i, g] / 2
        inside = rows[:, None] & columns[None, :]
        digit[i][inside], colour[i][inside] = scenes.digit[i, g], scenes.colour[i, g]
        centre[i, int(scenes.y[i, g] // PATCH), int(scenes.x[i, g] // PATCH)] = 1
    return digit.reshape(n, -1), colour.reshape(n, -1), centre.reshape(n, -1)


def pack(
    blocks: list[tuple[list[int], list[int]]], keywords: dict[int, int], tail: int = TAIL
) -> tuple[np.ndarray, ...]:
    """The six rows of a batch's tail, int64 [T], from (question ids, answer ids with the end token) pairs.

    The label at a position is the token that follows it; the end token is only ever a label. The hint is the
    answer's first token, from the question's keyword on: what is asked for can be looked up there already.
    `keywords` maps the ids of digits to 0..9 and those of colours to 10 and on.
    """
    ids, offsets = np.zeros(tail, np.int64), np.zeros(tail, np.int64)
    labels, hints, block = np.full(tail, IGNORE), np.full(tail, IGNORE), np.full(tail, -1)
    keyword_of = np.full(tail, -1)
    at = 0
    for b, (question, answer) in enumerate(blocks):
        n = len(question) + len(answer) - 1
        ids[at : at + n] = question + answer[:-1]
        keyword = next(i for i, token in enumerate(question) if token in keywords)
        keyword_of[at + keyword : at + n] = keywords[question[keyword]]
        hints[at + keyword : at + len(question) - 1] = answer[0]
        labels[at + len(question) - 1 : at + n] = answer
        offsets[at : at + n], block[at : at + n] = np.arange(n), b
        at += n
    return ids, labels, hints, keyword_of, offsets, block


def training_batch(rng: np.random.Generator, n: int, encode, keywords: dict[int, int], questions: bool = True) -> Batch:
    """n pictures of training scans, each with as many questions as fit.

    `encode(question, answer)` gives the two lists of ids.
    """
    scenes = sample_scenes(rng, n, held_out=False, counts=COUNTS if questions else DENSE_COUNTS)
    rows = []
    for i in range(n):
        blocks, left, asked = [], TAIL, set()
        while questions and left >= 17:
            picked = pick_question(rng, scenes, i, KINDS[rng.integers(len(KINDS))])
            if picked is None or (picked in asked and rng.random() < 0.8):
                continue
            asked.add(picked)
            blocks.append(encode(*picked))
            left -= len(blocks[-1][0]) + len(blocks[-1][1]) - 1
        rows.append(pack(blocks, keywords))
    return batch_of(draw(rng, scenes, stock=0), rows, cells_of(scenes))


def batch_of(pixels: np.ndarray, rows: list[tuple[np.ndarray, ...]], cells: tuple[np.ndarray, ...] | None) -> Batch:
    """A batch of `pack`ed rows; without `cells` one to answer, not to learn from."""
    unknown = np.full((len(rows), CELLS**2), IGNORE)
    tail = dict(zip(TAIL_FIELDS, (np.stack(column) for column in zip(*rows, strict=True)), strict=True))
    return Batch(pixels=pixels, **tail, **dict(zip(CELL_FIELDS, cells or (unknown,) * 3, strict=True)))


def shown_cells(rng: np.random.Generator, cell_digit_NV: np.ndarray) -> np.ndarray:
    """Visual tokens to leave in, int64 [N,K] ascending: all that show a glyph, and background by chance.

    K is drawn anew for each batch, down to the most glyph cells of any of its images.
    """
    n, v = cell_digit_NV.shape
    glyph_NV = cell_digit_NV != NO_DIGIT
    count = max(int(glyph_NV.sum(axis=1).max()), int(rng.random() * v))
    order = np.argsort(np.where(glyph_NV, -1.0, rng.random((n, v))), axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1)
