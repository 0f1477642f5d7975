"""The shipped checkpoints: plain transformers loads them, their size and accuracy are what the card says."""

import json

import numpy as np
import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from glyphs.checkpoint import PAIR, PREFIX, SHAPES, SUFFIX, VISUAL_TOKENS
from glyphs.data import held_out_questions
from glyphs.evaluate import answers, exact_share, prompt_from_question

pytestmark = pytest.mark.skipif(
    not (PAIR / "large" / "model.safetensors").exists(), reason="the pair is not trained yet"
)
RANGE = {"large": (0.95, 1.0), "small": (0.70, 0.88)}


@pytest.mark.parametrize("name", SHAPES)
def test_folder_loads_with_the_auto_classes(name):
    tokenizer, image_processor = (
        AutoTokenizer.from_pretrained(PAIR / name),
        AutoImageProcessor.from_pretrained(PAIR / name),
    )
    question = held_out_questions(1)[0]
    pixels = image_processor(images=question.image, return_tensors="np")["pixel_values"][0]
    expected = (np.asarray(question.image, np.float32) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1e-6)
    assert tokenizer.decode(tokenizer("3 7 1", add_special_tokens=False).input_ids) == "3 7 1"


@pytest.mark.parametrize("name", SHAPES)
def test_the_chat_template_gives_the_tokens_of_training(name):
    processor, question = AutoProcessor.from_pretrained(PAIR / name), held_out_questions(1)[0]
    inputs = processor(images=question.image, text=prompt_from_question(processor, question.question))
    ids = lambda text, **options: processor.tokenizer(text, **options).input_ids  # noqa: E731
    prefix = ids(PREFIX.replace("<image>", "<image>" * VISUAL_TOKENS))
    assert list(inputs["input_ids"][0]) == prefix + ids(question.question + SUFFIX, add_special_tokens=False)
    assert prefix.count(processor.image_token_id) == VISUAL_TOKENS == 144


def test_pair_shares_its_tokenizer_and_image_grid():
    files = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja")
    for file in files:
        assert (PAIR / "small" / file).read_bytes() == (PAIR / "large" / file).read_bytes(), file


def test_sizes():
    large, small = (AutoConfig.from_pretrained(PAIR / name).text_config for name in ("large", "small"))
    assert large.num_hidden_layers == 24
    assert small.num_hidden_layers >= 6
    assert small.hidden_size <= large.hidden_size
    assert all(c.num_key_value_heads < c.num_attention_heads and c.head_dim == 16 for c in (large, small))
    assert sum((PAIR / name / "model.safetensors").stat().st_size for name in SHAPES) < 30e6


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_float32_and_complete(name):
    model, report = LlavaForConditionalGeneration.from_pretrained(PAIR / name, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert model.generation_config.eos_token_id == 2
    assert not model.generation_config.do_sample


@pytest.mark.parametrize("name", SHAPES)
def test_the_card_is_in_range_and_the_first_hundred_answers_agree(name):
    card = json.loads((PAIR / "accuracy.json").read_text())
    low, high = RANGE[name]
    assert card["questions"] == 1000
    assert low <= card["exact"][name]["all"] <= high
    questions = held_out_questions(100)
    assert abs(exact_share(questions, answers(PAIR / name, questions))["all"] - card["exact"][name]["all"]) < 0.12
