"""What conversations begin with alike is computed once, and nothing that is said depends on that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.answer import Answer
from engines.cascade import Cascade
from engines.talk.beginning import WORTH, Beginnings, alike
from tests.engines.openvino.conftest import needs_openvino
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of, question_of

SYSTEM = "what is red ? how many blue 3 4 5 which digit ?"
OTHER = "what is red ? how many green 1 2 which colour ?"
TARGETS = ["cpu", pytest.param("openvino", marks=needs_openvino)]


def asked(cascade: Cascade, turn: int, threshold: float, system: str = SYSTEM, images: int = 1) -> Answer:
    """One conversation of one question, and one behind it, whose answer is given."""
    talk = cascade.chat([{"role": "system", "content": system}], 0.3, threshold, max_new_tokens=NEW_TOKENS)
    talk.ask(question_of(turn), [picture_of(turn + i) for i in range(images)])
    return talk.ask(question_of(turn + 1))


def assert_same(got: Answer, wanted: Answer) -> None:
    assert (got.tokens, got.model, got.prompt_tokens) == (wanted.tokens, wanted.model, wanted.prompt_tokens)
    assert [k.tolist() for k in got.kept or ()] == [k.tolist() for k in wanted.kept or ()]
    np.testing.assert_allclose(got.guidance, wanted.guidance, rtol=1e-4)
    assert got.confidence
    assert wanted.confidence
    assert got.confidence.confidence == pytest.approx(wanted.confidence.confidence, rel=1e-4)
    assert got.confidence.consistency == pytest.approx(wanted.confidence.consistency, rel=1e-4)


def without(cascade: Cascade) -> Cascade:
    """The same models, each conversation from its start."""
    other = Cascade(cascade.small, cascade.large)
    other.reuses_beginnings = False
    return other


def beginnings(cascade: Cascade) -> list[Beginnings]:
    return [model.beginnings for model in (cascade.small, cascade.large) if model]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["small answers", "large answers"])
def test_a_third_conversation_begins_where_two_were_alike(tiny_pair: TinyPair, target: str, threshold: float) -> None:
    cascade = tiny_pair.cascade(target=target)
    for turn in range(4):
        held = [each.held for each in beginnings(cascade)]
        assert [each is not None for each in held] == [turn > 1, turn > 1 and threshold == 1]
        first = cascade.memories()["small"].prompt(cascade.chat([{"role": "system", "content": SYSTEM}]).talk)
        assert first.cached == (0 if turn < 2 else min(len(held[0].line), len(first.line) - 1))  # type: ignore[union-attr]
        assert_same(asked(cascade, turn, threshold), asked(without(cascade), turn, threshold))


def test_what_is_held_is_what_was_alike_and_stays_as_it_is(tiny_pair: TinyPair) -> None:
    cascade = tiny_pair.cascade()
    for turn in range(2):
        asked(cascade, turn, 1.0)
    for each in beginnings(cascade):
        held = each.held
        assert held
        line = cascade.memories()["small"].prompt(cascade.chat([{"role": "system", "content": SYSTEM}]).talk).line
        assert WORTH <= alike(held.line, line) <= len(held.line)
        assert set(held.cache.lengths) == {len(held.line)}
        before: dict[str, Any] = {name: np.array(value) for name, value in held.cache.values.items()}
        for turn in range(2, 5):
            asked(cascade, turn, 1.0, images=turn - 1)
        assert each.held is held
        for name, value in held.cache.values.items():
            assert value.base is None  # type: ignore[union-attr]
            assert np.array_equal(value, before[name])


def test_another_system_message_begins_anew_and_is_learnt_in_its_turn(tiny_pair: TinyPair) -> None:
    cascade = tiny_pair.cascade()
    said = [SYSTEM, SYSTEM, OTHER, SYSTEM, OTHER, OTHER, OTHER]
    lines = []
    for turn, system in enumerate(said):
        assert_same(asked(cascade, turn, 1.0, system), asked(without(cascade), turn, 1.0, system))
        held = beginnings(cascade)[0].held
        lines.append(None if held is None else held.line.tolist())
    assert lines[0] is None
    assert lines[1] == lines[2] == lines[3] == lines[4], "what the two share is the first's own beginning"
    assert lines[5] == lines[6] != lines[1]


def test_text_alone_and_images_before_it_share_what_they_can(tiny_pair: TinyPair) -> None:
    cascade = tiny_pair.cascade()
    for turn in range(2):
        asked(cascade, turn, 1.0)
    wanted = without(cascade).ask(None, SYSTEM, max_new_tokens=NEW_TOKENS)
    assert cascade.ask(None, SYSTEM, max_new_tokens=NEW_TOKENS).tokens == wanted.tokens
    # The same question twice: one row at least is fed.
    again = [cascade.ask(None, SYSTEM, max_new_tokens=NEW_TOKENS) for _ in range(3)][-1]
    assert again.tokens == wanted.tokens
    assert 0 < again.cached_tokens < again.prompt_tokens


def test_a_few_tokens_are_not_worth_it(tiny_pair: TinyPair) -> None:
    cascade = tiny_pair.cascade()
    for turn in range(3):
        answer = cascade.ask(picture_of(turn), question_of(turn), max_new_tokens=NEW_TOKENS)
        assert answer.cached_tokens == 0
    assert [each.held for each in beginnings(cascade)] == [None, None]


def test_what_is_measured_alone_begins_with_nothing(tiny_pair: TinyPair) -> None:
    cascade = without(tiny_pair.cascade())
    for turn in range(3):
        asked(cascade, turn, 1.0)
    assert [each.held for each in beginnings(cascade)] == [None, None]
