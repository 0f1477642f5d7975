"""Several turns on every family: a follow-up on the pruned cache is one sequence with the same kept tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engines.cascade import Cascade
from engines.model import Model
from engines.stream import Stream
from engines.talk.beginning import WORTH
from engines.talk.messages import Message, Talk, asked
from tests.families.cases import pictures
from tests.families.conftest import Sample
from tests.families.reference import pruned_forward

NEW_TOKENS = 6
pytestmark = pytest.mark.slow


def hf_inputs(sample: Sample, documents: list[dict[str, Any]], images: list[list[Any]]) -> dict[str, torch.Tensor]:
    """What Hugging Face's own processor makes of a whole conversation."""
    text = sample.processor.apply_chat_template(documents, tokenize=False, add_generation_prompt=True)
    flat = [image for each in images for image in each]
    return dict(sample.processor(images=[flat], text=[text], return_tensors="pt"))


@pytest.mark.parametrize("keep", [(1.0, 1.0), (0.5, 0.2)], ids=str)
def test_follow_ups_are_those_of_one_sequence(sample: Sample, keep: tuple[float, float]) -> None:
    cascade = Cascade(None, Model(sample.onnx.folder, sample.onnx.spec, threads=1))
    memories = cascade.memories()
    talk: Talk = ()
    # OneVision's processor tiles an image only where it is the conversation's one image; ours goes by the message.
    second = [] if sample.case.name == "llava_onevision" else pictures([(50, 50)], seed=1)
    shown = [pictures([(40, 64)]), [], second]
    for turn, question in enumerate(["which digit is red ?", "and what colour ?", "compare"]):
        talk = (*talk, asked(question, shown[turn]))
        inputs = hf_inputs(sample, [message.document() for message in talk], shown[: turn + 1])
        visual_tokens = int((inputs["input_ids"] == sample.onnx.spec.tokens.image).sum())
        guidance = np.random.default_rng(turn).random(visual_tokens, dtype=np.float32)
        ready = cascade.turn(talk, memories, max_new_tokens=NEW_TOKENS)
        answer = Stream(cascade.parts(ready, keep, 1.0, guidance)).finish()
        memories["large"].settle(talk)
        talk = (*talk, Message("assistant", (answer.text,)))
        ids = inputs["input_ids"]
        assert (answer.cached_tokens > 0) is (turn > 0)
        assert answer.prompt_tokens == ids.shape[1]
        assert answer.kept is not None
        is_visual = ids[0] == sample.onnx.spec.tokens.image
        assert answer.visual_tokens == visual_tokens
        if keep == (1.0, 1.0):
            sample.model.generation_config.eos_token_id = list(sample.onnx.spec.tokens.eos)
            out = sample.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            assert list(answer.tokens) == out[0, ids.shape[1] :].tolist()
            continue
        rows, visual = np.arange(ids.shape[1]), np.flatnonzero(is_visual.numpy())
        kept = [sorted({*rows[~is_visual.numpy()].tolist(), *visual[of].tolist()}) for of in answer.kept]
        assert list(answer.tokens) == greedy(sample, inputs, kept)


def test_text_that_begins_conversations_is_prefilled_once(sample: Sample) -> None:
    model = Model(sample.onnx.folder, sample.onnx.spec, threads=1)
    cascade, without = Cascade(None, model), Cascade(None, model)
    without.reuses_beginnings = False
    for turn in range(3):
        image = pictures([(40, 64)], seed=turn)[0]
        parts = [
            {"text": "which digit is red ? and what colour ? which digit is red ?"},
            {"image": image},
            {"text": "?"},
        ]
        talk = (asked([{"type": next(iter(part)), **part} for part in parts], None),)
        answers = []
        for one in (cascade, without):
            ready = one.turn(talk, max_new_tokens=NEW_TOKENS)
            visual_tokens = ready.memories["large"].prompt(talk).visual_tokens
            guidance = np.random.default_rng(turn).random(visual_tokens, dtype=np.float32)
            answers.append(Stream(one.parts(ready, (0.5, 0.2), 1.0, guidance)).finish())
        got, wanted = answers
        assert (got.cached_tokens >= WORTH) is (turn > 1)
        assert wanted.cached_tokens == 0
        assert (got.tokens, got.prompt_tokens) == (wanted.tokens, wanted.prompt_tokens)
        assert [kept.tolist() for kept in got.kept or ()] == [kept.tolist() for kept in wanted.kept or ()]


@torch.no_grad()
def greedy(sample: Sample, inputs: dict[str, torch.Tensor], kept: list[list[int]]) -> list[int]:
    """The whole sequence again for every token, dropped rows masked."""
    ids, tokens = inputs["input_ids"], []
    features, *deep = sample.hf_features(inputs)
    is_visual = ids[0] == sample.onnx.spec.tokens.image
    embed = sample.model.get_input_embeddings()
    positions = sample.hf_positions(inputs)
    while len(tokens) < NEW_TOKENS and not (tokens and tokens[-1] in sample.onnx.spec.tokens.eos):
        wide = embed(torch.cat([ids, torch.tensor([tokens], dtype=torch.int64)], 1)).clone()
        wide[0, : ids.shape[1]][is_visual] = features
        following = positions.max() + 1 + torch.arange(len(tokens))
        place = torch.cat([positions, following.expand(*positions.shape[:-1], -1)], -1)
        stack = []
        for feature in deep:
            row = torch.zeros_like(wide)
            row[0, : ids.shape[1]][is_visual] = feature
            stack.append(row)
        flags = torch.cat([is_visual, torch.zeros(len(tokens), dtype=torch.bool)])
        counts = tuple(len(rows) for rows in kept)
        priority = torch.zeros(wide.shape[1])
        out = pruned_forward(
            sample.language, sample.model.lm_head, wide, place, flags, sample.onnx.spec.plan, counts, priority,
            ids.shape[1], kept, stack or None,
        )  # fmt: skip
        tokens.append(int(out.logits.argmax()))
    return tokens
