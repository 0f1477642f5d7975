"""What runs on ONNX Runtime's CPU take: one memory for all, given back by large runs, and threads by the weights."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engines import model as models
from engines.model import Model
from engines.sessions import ort_session
from engines.sessions.ort_session import GIVE_BACK, ONE_ARENA, OrtSession
from graphs.errors import UsageError
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


def test_stages_opened_side_by_side_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def slowly(*given: object) -> None:
        time.sleep(0.05)
        made.append(given)

    monkeypatch.setattr(ort_session.ort, "create_and_register_allocator", slowly)
    ort_session._registered.cache_clear()
    try:
        with ThreadPoolExecutor(4) as threads:
            for begun in [threads.submit(ort_session._one_arena) for _ in range(4)]:
                begun.result()
    finally:
        ort_session._registered.cache_clear()
    assert len(made) == 1


@pytest.mark.parametrize(("few", "asked", "told"), [(True, None, 1), (True, 2, 1), (False, 2, 2), (False, None, 0)])
def test_a_model_of_few_weights_takes_one_thread(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, few: bool, asked: int | None, told: int
) -> None:
    spec = tiny_pair.model("small").spec
    monkeypatch.setattr(models, "FEW_WEIGHTS", spec.weight_bytes + few)
    session = Model(tiny_pair.exports["small"], spec, threads=asked).session("embed")
    assert isinstance(session, OrtSession)
    assert session._session.get_session_options().intra_op_num_threads == told


def test_of_no_threads_nothing_is_run_however_few_the_weights(tiny_pair: TinyPair) -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        Model(tiny_pair.exports["small"], tiny_pair.model("small").spec, threads=0).session("embed")
