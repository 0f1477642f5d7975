"""What runs on ONNX Runtime's CPU compute in: one memory for all, of which large runs give back what they took."""

from __future__ import annotations

from typing import Any

import pytest

from engines.sessions import ort_session
from engines.sessions.ort_session import GIVE_BACK, ONE_ARENA, OrtSession
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of


def test_a_large_run_gives_back_what_it_took(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "LARGE", 1000)  # a prefill of this pair and its pixels; no decode step
    real, told = OrtSession._options_of, list[tuple[str, bool]]()

    def noted(self: OrtSession, values: Any) -> Any:
        options = real(self, values)
        assert [option.get_run_config_entry(GIVE_BACK) for option in options] == ["cpu:0"] * len(options)
        told.append((self._file.stem, bool(options)))
        return options

    monkeypatch.setattr(OrtSession, "_options_of", noted)
    cascade = tiny_pair.cascade()
    looked = cascade.look(picture_of(1), "which digit ?", max_new_tokens=NEW_TOKENS)
    for keep in (1.0, 0.25):
        told.clear()
        cascade.answer_large(looked, keep, max_new_tokens=NEW_TOKENS)
        decoder = [gave for stage, gave in told if stage == "decoder"]
        assert decoder[0]
        assert not any(decoder[1:])


def test_all_sessions_compute_in_one_memory(tiny_pair: TinyPair) -> None:
    cascade = tiny_pair.cascade()
    cascade.preload()
    assert cascade.small
    assert cascade.large
    for model in (cascade.small, cascade.large):
        for stage in model.spec.stages:
            session = model.session(stage)
            assert isinstance(session, OrtSession)
            options = session._session.get_session_options()
            assert options.get_session_config_entry(ONE_ARENA) == "1"


def test_a_program_that_has_such_a_memory_already_keeps_it() -> None:
    ort_session._one_arena()
    ort_session._one_arena.cache_clear()
    ort_session._one_arena()  # a second one is refused by ONNX Runtime, and the first is used
