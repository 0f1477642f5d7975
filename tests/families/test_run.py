"""The runtime itself on every family: the answer is Hugging Face's, the picture is what the tower sees."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engines.cascade import Cascade
from engines.model import Model
from tests.families.cases import PROMPTS, pictures
from tests.families.conftest import Sample

NEW_TOKENS = 16
pytestmark = pytest.mark.slow


def test_answer_is_that_of_generate(sample: Sample) -> None:
    model = Model(sample.onnx.folder, sample.onnx.spec, threads=1)
    (picture,) = pictures(PROMPTS[0])
    answer = Cascade(None, model).ask(picture, "which digit is red ?", keep=(1.0, 1.0), max_new_tokens=NEW_TOKENS)
    sample.model.generation_config.eos_token_id = list(sample.onnx.spec.tokens.eos)
    inputs = sample.hf_inputs(PROMPTS[0])
    out = sample.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert list(answer.tokens) == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.visual_tokens == int((inputs["input_ids"] == sample.onnx.spec.tokens.image).sum())


def test_view_is_the_image(sample: Sample) -> None:
    processor = Model(sample.onnx.folder, sample.onnx.spec).processor
    seen = processor.look(Image.new("RGB", (64, 64), (200, 100, 50)))
    view = np.asarray(processor.view(seen))
    assert np.abs(view.astype(int) - (200, 100, 50)).max() <= 2
    rows, columns = seen.whole[0].shape
    assert view.shape[0] / rows == view.shape[1] / columns
