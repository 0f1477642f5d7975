"""The held-out questions: the same bytes everywhere, right answers, scans nobody trained on."""

import hashlib

import numpy as np
import pytest

from glyphs.checkpoint import new_tokenizer
from glyphs.data import KINDS, NAMES, eval_records, held_out_questions, held_out_records, questions_of
from glyphs.scenes import MIN_STEP_X, PATCH, SIDE, SIZES, TRAIN_SCANS, draw, sample_scenes, scans
from glyphs.train_data import NO_DIGIT, cells_of

DIGEST_OF_12 = "09a2c01374d9023cf610dddd3a36e9e816da59463912d8d936d983e5038b4e99"


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(np.random.Generator(np.random.PCG64(3)), 200, held_out=True)


def test_held_out_questions_are_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    for q in held_out_questions(12):
        digest.update(q.image.tobytes() + f"{q.question}|{q.answer}|{q.kind}".encode())
    assert digest.hexdigest() == DIGEST_OF_12


def test_first_questions_do_not_depend_on_how_many_follow():
    for a, b in zip(held_out_questions(5), held_out_questions(9), strict=False):
        assert (a.image.tobytes(), a.question, a.answer) == (b.image.tobytes(), b.question, b.answer)
    assert held_out_questions(1, seed=1)[0].image.tobytes() != held_out_questions(1, seed=0)[0].image.tobytes()


def test_what_is_evaluated_is_not_what_was_calibrated():
    ours, theirs = ({r["image"].tobytes() for r in made(40)} for made in (held_out_records, eval_records))
    assert len(ours) == len(theirs) == 40
    assert not ours & theirs


def test_kinds_take_turns_and_images_are_square():
    questions = held_out_questions(8)
    assert [q.kind for q in questions] == [*KINDS, *KINDS]
    assert {(q.image.size, q.image.mode) for q in questions} == {((SIDE, SIDE), "RGB")}


def test_held_out_scans_are_the_last_fifth(scenes):
    assert len(scans()[0]) * 4 // 5 == TRAIN_SCANS
    assert scenes.scan[scenes.digit >= 0].min() >= TRAIN_SCANS
    trained = sample_scenes(np.random.Generator(np.random.PCG64(4)), 200, held_out=False)
    assert trained.scan[trained.digit >= 0].max() < TRAIN_SCANS


def test_each_glyph_shows_a_scan_of_its_digit(scenes):
    used = scenes.digit >= 0
    assert (scans()[1][scenes.scan[used]] == scenes.digit[used]).all()


def test_glyphs_are_larger_than_a_patch_apart_and_inside(scenes):
    assert SIZES[0] >= 2 * PATCH
    for i in range(len(scenes)):
        used = np.flatnonzero(scenes.digit[i] >= 0)
        x, y, s, colour = (f[i][used] for f in (scenes.x, scenes.y, scenes.size, scenes.colour))
        assert (x - s / 2 >= 0).all()
        assert (x + s / 2 <= SIDE).all()
        assert (y - s / 2 >= 0).all()
        assert (y + s / 2 <= SIDE).all()
        for a in range(len(used)):
            for b in range(a):
                assert max(abs(x[a] - x[b]), abs(y[a] - y[b])) >= (s[a] + s[b]) / 2
                assert colour[a] != colour[b] or abs(x[a] - x[b]) >= MIN_STEP_X


def test_glyphs_lie_off_the_patch_grid_and_take_several_patches(scenes):
    used = scenes.digit >= 0
    assert (scenes.x[used] % PATCH).std() > 2
    assert (scenes.y[used] % PATCH).std() > 2
    covered = (cells_of(scenes)[0] != NO_DIGIT).sum(1)
    assert (covered >= 4 * used.sum(1)).all()


def test_answers_follow_from_the_scene(scenes):
    for i in range(len(scenes)):
        glyphs = sorted(
            (x, NAMES[c], d) for x, c, d in zip(scenes.x[i], scenes.colour[i], scenes.digit[i], strict=False) if d >= 0
        )
        for question, answer in questions_of(scenes, i, "read"):
            assert answer.split() == [str(d) for _, c, d in glyphs if c == question.split()[2]]
        for question, answer in questions_of(scenes, i, "how many"):
            assert int(answer) == sum(c == question[len("how many ") : -1] for _, c, _ in glyphs)
        for question, answer in questions_of(scenes, i, "which digit"):
            assert [answer] == [str(d) for _, c, d in glyphs if c == question[len("which digit is ") : -1]]
        for question, answer in questions_of(scenes, i, "what colour"):
            assert [answer] == [c for _, c, d in glyphs if str(d) == question[-2]]


def test_an_unknown_kind_is_refused(scenes):
    with pytest.raises(ValueError, match="kind is one of"):
        questions_of(scenes, 0, "why")


def test_answers_take_one_to_eight_tokens_and_round_trip():
    tokenizer = new_tokenizer()
    lengths = set()
    for q in held_out_questions(200):
        ids = tokenizer(q.answer, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in tokenizer(q.question).input_ids + ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == q.answer
        lengths.add(len(ids) + 1)
    assert min(lengths) >= 1
    assert max(lengths) <= 8
    assert len(lengths) >= 3


def test_pictures_depend_on_the_seed_alone(scenes):
    one, two = (
        draw(np.random.Generator(np.random.PCG64(9)), sample_scenes(np.random.Generator(np.random.PCG64(8)), 3, True))
        for _ in range(2)
    )
    assert one.dtype == np.uint8
    assert one.shape == (3, SIDE, SIDE, 3)
    assert (one == two).all()
