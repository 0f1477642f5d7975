"""An engine of two profiles holds each weight once; a decode profile of one fixed row would hold them twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.trt.bounds import Bounds, profiles_of
from engines.trt.engine import engine_from_onnx
from engines.trt.member import EMPTY_ENGINE_BYTES, SIZE_LIMIT
from graphs.lowering import Lowering
from graphs.lowering.export import lowered_export
from tests.tiny import tiny_llava

pytest.importorskip("tensorrt_rtx")


def test_the_decoders_engine_is_little_larger_than_its_weights(tmp_path: Path) -> None:
    from exporter.export import export_checkpoint

    wide = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 1 << 16}
    checkpoint = tiny_llava(tmp_path / "checkpoint", dtype="float16", **wide)
    spec = export_checkpoint(checkpoint, tmp_path / "export", policy="sgl", role="large", fraction=0.4, keep=0.25)
    (tmp_path / "lowered").mkdir()
    lowering = Lowering("float16", capacity=128)
    lowered = lowered_export(tmp_path / "export", spec, tmp_path / "lowered", lowering, link=True)
    profiles = profiles_of("decoder", lowered.spec, Bounds(64, 128, 32, 8, 2).fitted(lowered.spec, None))
    assert list(profiles) == ["prefill", "decode"]
    file, engine = lowered.file("decoder"), tmp_path / "decoder.engine"
    answer = engine_from_onnx(file, engine, sms=[89], profiles=profiles, ops=lowered.ops["decoder"])
    weights = lowered.weight_bytes["decoder"]
    assert weights > 2 * EMPTY_ENGINE_BYTES
    assert weights < answer["bytes"] == engine.stat().st_size <= SIZE_LIMIT * weights
