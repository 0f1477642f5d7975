"""Questions from several threads take turns, and get the answers that they get one after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from engines.answer import Answer
from engines.cascade import Cascade
from engines.one_at_a_time import DEVICE, lock_of
from engines.sessions.session import Session
from tests.engines.openvino.conftest import needs_openvino
from tests.engines.run.conftest import TinyPair, picture_of, question_of

COUNT, NEW_TOKENS, SECONDS = 4, 6, 60
TARGETS = ["cpu", pytest.param("openvino", marks=needs_openvino)]


class Watched:
    """A session that lets other threads go on in the middle of a run, and counts how many are inside."""

    inside, most = 0, 0

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *given: Any, **named: Any) -> Any:
        Watched.inside += 1
        Watched.most = max(Watched.most, Watched.inside)
        time.sleep(1e-3)
        try:
            return self._session.run(*given, **named)
        finally:
            Watched.inside -= 1


def opened(tiny_pair: TinyPair, target: str, watched: bool = False) -> Cascade:
    found = Cascade.from_exports(tiny_pair.exports["small"], tiny_pair.exports["large"], target=target, threads=1)
    Watched.inside = Watched.most = 0
    for model in (found.small, found.large):
        assert model
        model.watch = (lambda _, session: Watched(session)) if watched else None
    return found


def ask(cascade: Cascade, i: int) -> Answer:
    return cascade.ask(picture_of(i), question_of(i), keep=0.5, threshold=1, max_new_tokens=NEW_TOKENS)


def chat(cascade: Cascade, i: int) -> Answer:
    talk = cascade.chat(keep=0.5, threshold=1, max_new_tokens=NEW_TOKENS)
    talk.ask(question_of(i), picture_of(i))
    return talk.ask(question_of(i + 1))


def look(cascade: Cascade, i: int) -> Answer:
    looked = cascade.look(picture_of(i), question_of(i), max_new_tokens=NEW_TOKENS)
    return cascade.answer_large(looked, keep=0.5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", [ask, chat, look])
def test_answers_are_those_of_one_thread(
    tiny_pair: TinyPair, target: str, way: Callable[[Cascade, int], Answer]
) -> None:
    alone = [way(opened(tiny_pair, target), i) for i in range(COUNT)]
    cascade, together = opened(tiny_pair, target, watched=True), Barrier(COUNT)

    def from_a_thread(i: int) -> Answer:
        together.wait(SECONDS)
        return way(cascade, i)

    with ThreadPoolExecutor(COUNT) as threads:
        answers = list(threads.map(from_a_thread, range(COUNT)))
    assert Watched.most == 1
    for answer, wanted in zip(answers, alone, strict=True):
        assert answer.tokens == wanted.tokens
        assert answer.guidance is not None
        np.testing.assert_allclose(answer.guidance, wanted.guidance, atol=1e-5)
        assert [kept.tolist() for kept in answer.kept or ()] == [kept.tolist() for kept in wanted.kept or ()]


def test_a_stream_that_waits_keeps_nobody_waiting(tiny_pair: TinyPair) -> None:
    cascade = opened(tiny_pair, "cpu")
    wanted = ask(cascade, 0)
    stream = cascade.stream(
        picture_of(0), question_of(0), keep=0.5, threshold=1, max_new_tokens=NEW_TOKENS, draft=False
    )
    pieces = iter(stream)
    first = next(pieces)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(ask, cascade, 1).result(SECONDS).tokens == ask(cascade, 1).tokens
    assert first + "".join(pieces) == wanted.text
    assert stream.answer.tokens == wanted.tokens


def test_what_is_locked_is_a_cascade_or_the_device(tiny_pair: TinyPair) -> None:
    one, other = (opened(tiny_pair, "cpu") for _ in range(2))
    assert one.lock is not other.lock
    on_device = [tiny_pair.model("small", target) for target in ("rtx", "tensorrt", "cuda")]
    assert all(lock_of([model]) is DEVICE for model in on_device)
