"""An fp16 export runs with fp16 caches, and its scores are in float64 all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.cascade import Cascade
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of, question_of


@pytest.fixture(scope="module")
def half(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.export import export_checkpoint

    out = tmp_path_factory.mktemp("half") / "small"
    export_checkpoint(tiny_pair.checkpoints["small"], out, policy="sgl", role="small", dtype="float16")
    return out


def test_an_fp16_export_answers_nearly_as_fp32(half: Path, tiny_pair: TinyPair) -> None:
    case = (picture_of(1), question_of(1))
    wide = Cascade.from_exports(tiny_pair.exports["small"], threads=1).look(*case, max_new_tokens=1)
    narrow = Cascade.from_exports(half, threads=1).look(*case, max_new_tokens=NEW_TOKENS)
    assert narrow.prompt.line.tolist() == wide.prompt.line.tolist()
    assert narrow.tokens[0] == wide.tokens[0]
    first = Cascade.from_exports(half, threads=1).look(*case, max_new_tokens=1)
    np.testing.assert_allclose(first.guidance, wide.guidance, rtol=0.05)
    assert first.confidence.confidence == pytest.approx(wide.confidence.confidence, abs=0.02)
    assert narrow.guidance.dtype == np.float32
