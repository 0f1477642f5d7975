"""The peer in Hugging Face transformers: its prompts and answers are those of the family's own Processor class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exporter.reference import Reference
from graphs.errors import UsageError
from tests.families.cases import CASES, PROMPTS, conversation, pictures
from tests.families.conftest import Sample

NEW_TOKENS = 6
QUESTION = " which digit is red ?"


@pytest.fixture
def reference(sample: Sample) -> Reference:
    return Reference(sample.folder)


@pytest.mark.slow
def test_its_answers_are_those_of_generate(sample: Sample, reference: Reference) -> None:
    """One image, several with text between them, none; the settings of the Processor class written out by the test."""
    for shapes in (PROMPTS[0], PROMPTS[2], []):
        images = pictures(shapes)
        got = reference.reply(conversation(images), NEW_TOKENS)
        text = sample.processor.apply_chat_template(conversation(images), tokenize=False, add_generation_prompt=True)
        inputs = sample.processor(images=[images] if images else None, text=[text], return_tensors="pt")
        out = sample.model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True
        )
        prompt = inputs["input_ids"].shape[1]
        assert list(got.prompt) == inputs["input_ids"][0].tolist()
        assert list(got.tokens) == out.sequences[0, prompt:].tolist()
        torch.testing.assert_close(torch.from_numpy(got.first_logits), out.logits[0][0])


@pytest.mark.slow
def test_a_question_is_a_conversation_of_one_message(reference: Reference) -> None:
    for shapes in ([], PROMPTS[0], PROMPTS[2]):
        images = pictures(shapes)
        given = None if not images else images[0] if len(images) == 1 else images
        content = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": QUESTION}]
        wanted = reference.reply([{"role": "user", "content": content}], 2)
        got = reference.answer(given, QUESTION, 2)
        assert (got.prompt, got.tokens) == (wanted.prompt, wanted.tokens)


def test_several_turns_and_none(tmp_path: Path) -> None:
    reference = Reference(CASES["llava"].checkpoint(tmp_path / "llava"))
    (picture,) = pictures(PROMPTS[0])
    said = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    first, whole = reference.reply(said[:1], 1), reference.reply(said, 1)
    assert whole.prompt[: len(first.prompt)] == first.prompt
    assert len(whole.prompt) > len(first.prompt)
    with pytest.raises(UsageError, match="the conversation is empty"):
        reference.reply([])
