"""An fp16 export runs with fp16 caches, and its scores are in float64 all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundles.build import build_bundle
from engines.cascade import Cascade
from tests.conftest import Outcome
from tests.engines.openvino.conftest import needs_openvino
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


@pytest.mark.parametrize(("options", "said"), [((), True), (("--precision", "fp32"), False)])
def test_a_build_says_what_every_opening_will_convert(
    half: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome], options: tuple[str, ...], said: bool
) -> None:
    built = saccade_cli("build", half, "-o", tmp_path / "b", "--target", "cpu", *options)
    assert (built.code, "fp16 weights are converted to fp32 whenever" in built.stderr) == (0, said), built.stderr


@needs_openvino
@pytest.mark.parametrize(("precision", "tolerance"), [(None, "2e-02"), ("bf16", "1e-01"), ("int8", "")])
def test_an_fp16_export_verifies_and_runs_on_openvino(
    half: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome], precision: str | None, tolerance: str
) -> None:
    """Its caches come to the host in fp32, the golden ones are in fp16."""
    bundle = tmp_path / "b"
    build_bundle([half], bundle, target="openvino", precision=precision)
    told = saccade_cli("verify", bundle, "--target", "openvino")
    assert (told.code, told.stdout.count(" agrees ")) == (0, 6), told.stderr
    assert told.stdout.count(f"of {tolerance}") >= 6
    ran = saccade_cli("run", bundle, "what is red ?", "--target", "openvino")
    assert (ran.code, bool(ran.stdout.strip())) == (0, True), ran.stderr
