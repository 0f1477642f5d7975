"""Every family's export in OpenVINO: the golden tensors in fp32 and bf16, and Hugging Face's tokens."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from engines.bundles.golden import replay
from engines.cascade import Cascade
from engines.model import Model
from engines.sessions.session import open_session
from engines.stream import Stream
from engines.talk.messages import Message, asked
from tests.engines.openvino.conftest import needs_openvino
from tests.families.cases import pictures
from tests.families.conftest import Sample

pytestmark = [pytest.mark.slow, needs_openvino]


def test_golden_tensors_in_fp32(sample: Sample) -> None:
    open_stage = partial(open_session, target="openvino", threads=1)
    replays = list(replay(sample.onnx.folder, sample.onnx.spec, open_stage))
    assert {r.stage for r in replays} == set(sample.onnx.spec.stages)
    assert all(r.agrees for r in replays), [t.problem for r in replays for t in r.tensors if not t.agrees]
    assert max(r.max_error for r in replays) < 1e-5
    assert {r.overlap for r in replays if r.stage == "decoder"} == {1.0}


def test_golden_tensors_in_bf16(sample: Sample) -> None:
    """The runtime chooses node by node what it keeps in fp32: caches and what enters them must still agree."""
    if sample.case.name not in ("llava", "qwen2_5_vl"):
        pytest.skip("one axis of positions and three axes are these families'")
    open_stage = partial(open_session, target="openvino", threads=1, dtype="bfloat16")
    replays = [r for r in replay(sample.onnx.folder, sample.onnx.spec, open_stage) if r.stage == "decoder"]
    assert len(replays) == 3
    assert max(r.max_error for r in replays) < 0.1


def test_a_conversation_is_that_of_onnx_runtime(sample: Sample) -> None:
    if sample.case.name not in ("llava", "qwen2_5_vl", "internvl"):
        pytest.skip("one axis of positions, three axes and tiles are these families'")
    told = [conversation(Cascade(None, model_on(sample, target))) for target in ("cpu", "openvino")]
    assert told[0] == told[1]


def model_on(sample: Sample, target: str) -> Model:
    return Model(sample.onnx.folder, sample.onnx.spec, target, threads=1)


def conversation(cascade: Cascade) -> list[tuple[object, ...]]:
    """Three turns with two images, pruned by guidance that is drawn: tokens, and what was kept."""
    memories, said, talk = cascade.memories(), [], ()
    for turn, (question, shapes) in enumerate([("which digit ?", [(40, 64)]), ("and ?", []), ("red ?", [(50, 50)])]):
        talk = (*talk, asked(question, pictures(shapes)))
        ready = cascade.turn(talk, memories, max_new_tokens=5)
        visual_tokens = sum(sum(seen.tokens) for _, seen in memories["large"]._looked(talk))
        guidance = np.random.default_rng(turn).random(visual_tokens, dtype=np.float32)
        answer = Stream(cascade.parts(ready, (0.5, 0.25), 1.0, guidance)).finish()
        memories["large"].settle(talk)
        talk = (*talk, Message("assistant", (answer.text,)))
        said.append((answer.tokens, [kept.tolist() for kept in answer.kept], answer.cached_tokens))
    return said
