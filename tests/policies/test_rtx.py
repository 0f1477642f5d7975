"""Every op that a policy puts into a graph becomes part of a TensorRT-RTX engine by its body, in fp16."""

from __future__ import annotations

import pytest

from engines.trt.bounds import Bounds, profiles_of
from engines.trt.engine import engine_from_onnx
from engines.trt.reading import reading_from
from graphs.compare import compare
from graphs.lowering import Lowering
from graphs.lowering.export import lowered_export
from graphs.ops import OPS
from tests.engines.rtx.conftest import golden, run_onnx
from tests.policies.test_decoder_policies import POLICIES
from tests.policies.test_vision_policies import PLANS

pytest.importorskip("tensorrt_rtx")
BOUNDS = Bounds(max_prompt=128, max_length=128, max_tail=4, max_images=2)
# (plan, role), stage, the ops that are there
CASES = {
    "star": (PLANS["star"], "vision", {"ReceivedFromAll", "KeepTopK"}),
    "visionzip": (PLANS["visionzip, fastv"], "vision", {"AttentionReceived", "KeepTopK", "MergeContext"}),
    "tome": (PLANS["tome"], "vision", {"MergePairs"}),
    "sparsevlm": (
        POLICIES["sparsevlm"][:1],
        "decoder",
        {"TextRaters", "RatedReceivedInCache", "KeepTopK", "CompactRows"},
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_policys_ops_build(name: str, exported, tmp_path) -> None:
    plan, stage, ops = CASES[name]
    made = exported(*plan)
    (tmp_path / "half").mkdir()
    lowered = lowered_export(made.folder, made.spec, tmp_path / "half", Lowering("float16", capacity=128))
    assert ops <= set(lowered.ops[stage].values()) <= set(OPS)
    profiles = profiles_of(stage, lowered.spec, BOUNDS.fitted(lowered.spec, None))
    out = tmp_path / "stage.engine"
    answer = engine_from_onnx(lowered.file(stage), out, sms=[89], profiles=profiles, ops=lowered.ops[stage])
    reading = reading_from(answer["reading"])
    assert reading.served == dict.fromkeys(lowered.ops[stage], "body")
    assert reading.unused == ()
    assert out.stat().st_size == answer["bytes"]


@pytest.mark.parametrize("name", list(CASES))
def test_a_policys_lowered_stage_equals_the_canonical_one(name: str, exported, tmp_path) -> None:
    plan, stage, _ = CASES[name]
    made = exported(*plan)
    lowered = lowered_export(made.folder, made.spec, tmp_path, Lowering("float32", capacity=64))
    for case in golden(made.folder):
        if case.stage == stage:
            wanted = made(stage, **case.inputs)
            for output, got in run_onnx(lowered, case).items():
                assert compare(output, got, wanted[output], 1e-5).agrees, (case.name, output)
