"""Which runs on ONNX Runtime's CPU give back what they took: large ones, but for those that prune."""

from __future__ import annotations

from typing import Any

import pytest

from engines.sessions import ort_session
from engines.sessions.ort_session import GIVE_BACK, OrtSession
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of


def test_a_large_run_gives_back_what_it_took_unless_it_prunes(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_session, "LARGE", 1000)  # a prefill of this pair and its pixels; no decode step
    real, told = OrtSession._options_of, list[tuple[str, bool, bool]]()

    def noted(self: OrtSession, values: Any, prunes: bool) -> Any:
        options = real(self, values, prunes)
        assert [option.get_run_config_entry(GIVE_BACK) for option in options] == ["cpu:0"] * len(options)
        told.append((self._file.stem, prunes, bool(options)))
        return options

    monkeypatch.setattr(OrtSession, "_options_of", noted)
    cascade = tiny_pair.cascade()
    looked = cascade.look(picture_of(1), "which digit ?", max_new_tokens=NEW_TOKENS)
    for keep, prunes in ((1.0, False), (0.25, True)):
        told.clear()
        cascade.answer_large(looked, keep, max_new_tokens=NEW_TOKENS)
        decoder = [(pruned, gave) for stage, pruned, gave in told if stage == "decoder"]
        assert decoder[0] == (prunes, not prunes)
        assert set(decoder[1:]) <= {(False, False)}
