"""A float16 checkpoint of every family is exported as float16, replays, and answers as Hugging Face does in float32."""

from __future__ import annotations

import numpy as np
import pytest

from engines.bundles.golden import replay
from graphs.compare import TOLERANCES
from tests.families.cases import CASES, PROMPTS, conversation, pictures
from tests.families.conftest import Sample, sample_of

NEW_TOKENS, NEVER = 16, 10_000
TOLERANCE = TOLERANCES["float16"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=list(CASES))
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The Hugging Face model has the same weights, rounded to float16, and computes in float32."""
    return sample_of(request.param, tmp_path_factory.mktemp(f"half_{request.param}"), dtype="float16")


def test_golden_tensors_replay(half: Sample) -> None:
    assert half.onnx.spec.dtype == "float16"
    replays = list(replay(half.folder.parent / "export", half.onnx.spec))
    assert {r.stage for r in replays} == {"vision", "embed", "decoder"}
    assert all(r.agrees and r.overlap in (None, 1.0) for r in replays)


def test_greedy_tokens_are_those_of_generate(half: Sample) -> None:
    """Logits within the tolerance table at every step; where the best two are nearer than that, either may win."""
    onnx, images = half.onnx, pictures(PROMPTS[2])
    seen = onnx.seen(images)
    run = onnx.generate(onnx.prompt(conversation(images), seen), seen, NEW_TOKENS)
    half.model.generation_config.eos_token_id = [NEVER]
    inputs = half.hf_inputs(PROMPTS[2])
    out = half.model.generate(
        **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True
    )
    wanted = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(set(wanted)) >= NEW_TOKENS // 2
    for step, (token, logits) in enumerate(zip(run.tokens, run.logits, strict=True)):
        reference = out.logits[step][0].numpy()
        allowed = TOLERANCE * float(np.abs(reference).max())
        np.testing.assert_allclose(logits, reference, atol=allowed, rtol=0)
        if token != wanted[step]:
            assert reference[wanted[step]] - reference[token] < 2 * allowed
            assert step >= NEW_TOKENS // 2, "too early to say that the answers agree"
            break
