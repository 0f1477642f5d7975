"""Every family's export against Hugging Face: prompts, visual tokens, greedy answers, and pruning by plain maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graphs.compare import TOLERANCES
from graphs.spec import visual_names
from tests.families.cases import PROMPTS, conversation, pictures
from tests.families.conftest import PLAN, Sample
from tests.families.reference import pruned_forward

NEW_TOKENS, NEVER = 16, 10_000
TOLERANCE = TOLERANCES["float32"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("shapes", PROMPTS, ids=str)
def test_prompt_is_that_of_the_processor_class(sample: Sample, shapes: list[tuple[int, int]]) -> None:
    images = pictures(shapes)
    seen = sample.onnx.seen(images)
    ids = sample.onnx.prompt(conversation(images), seen)
    assert ids.tolist() == sample.hf_inputs(shapes)["input_ids"].tolist()
    assert (ids == sample.onnx.spec.tokens.image).sum() == sum(seen.tokens)
    assert all(whole.max() < count for whole, count in zip(seen.whole, seen.tokens, strict=True))


@pytest.mark.parametrize("shapes", PROMPTS, ids=str)
def test_visual_tokens_are_those_of_get_image_features(sample: Sample, shapes: list[tuple[int, int]]) -> None:
    got = sample.onnx.run("vision", sample.onnx.seen(pictures(shapes)).feeds)
    names = visual_names(sample.onnx.spec.language)
    wanted = sample.hf_features(sample.hf_inputs(shapes))
    assert len(names) == len(wanted)
    for name, tensor in zip(names, wanted, strict=True):
        assert got[name].shape == tensor.shape
        np.testing.assert_allclose(got[name], tensor.numpy(), atol=TOLERANCE * float(tensor.abs().max()))


@pytest.mark.parametrize("shapes", [PROMPTS[0], PROMPTS[2], []], ids=str)
def test_greedy_tokens_are_those_of_generate(sample: Sample, shapes: list[tuple[int, int]]) -> None:
    onnx = sample.onnx
    if shapes:
        inputs = sample.hf_inputs(shapes)
        images = pictures(shapes)
        seen = onnx.seen(images)
        ids = onnx.prompt(conversation(images), seen)
    else:
        seen, ids = None, onnx.prompt(conversation([]), None)
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.int64)}
    sample.model.generation_config.eos_token_id = [NEVER]
    out = sample.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    wanted = out[0, ids.shape[1] :].tolist()
    assert onnx.generate(ids, seen, NEW_TOKENS).tokens == wanted
    assert len(set(wanted)) >= NEW_TOKENS // 2


@pytest.mark.parametrize("share", [(1.0, 0.5), (0.5, 0.25), (0.2, 0.0)], ids=str)
@pytest.mark.parametrize("shapes", [PROMPTS[0], PROMPTS[2]], ids=str)
def test_pruned_answer_is_that_of_plain_maps(
    sample: Sample, shapes: list[tuple[int, int]], share: tuple[float, float], draw: np.random.Generator
) -> None:
    onnx, images = sample.onnx, pictures(shapes)
    seen = onnx.seen(images)
    ids = onnx.prompt(conversation(images), seen)
    visual = sum(seen.tokens)
    keep = tuple(max(1, int(visual * s)) for s in share)
    priority = draw.random(ids.shape, dtype=np.float32)
    text_behind = int(ids.shape[1] - 1 - np.flatnonzero(ids[0] == onnx.spec.tokens.image)[-1])
    run = onnx.generate(ids, seen, 4, keep, priority, guide=text_behind)

    inputs = sample.hf_inputs(shapes)
    features, *deep = sample.hf_features(inputs)
    language, is_visual = sample.language, inputs["input_ids"][0] == onnx.spec.tokens.image
    embeds = language.embed_tokens(inputs["input_ids"]).detach()
    embeds[0, is_visual] = features
    positions = sample.hf_positions(inputs)
    deepstack = [torch.zeros_like(embeds).index_put((torch.tensor(0), is_visual.nonzero()[:, 0]), d) for d in deep]
    kept, prompt = None, ids.shape[1]
    for token, logits in zip(run.tokens, run.logits, strict=True):
        reference = pruned_forward(
            language,
            sample.model.lm_head,
            embeds,
            positions,
            is_visual,
            PLAN,
            keep,
            torch.from_numpy(priority[0]),
            prompt,
            kept,
            deepstack,
        )
        if kept is None:
            kept = reference.kept
            first = run.kept[0]
            assert first.tolist() == kept[0]
            assert first[run.kept[1]].tolist() == kept[1]
            assert len(kept[0]) - len(kept[1]) == keep[0] - keep[1]
        np.testing.assert_allclose(logits, reference.logits.numpy(), atol=TOLERANCE * float(np.abs(logits).max()))
        fed = language.embed_tokens(torch.tensor([[token]])).detach()
        embeds = torch.cat([embeds, fed], 1)
        deepstack = [torch.cat([d, torch.zeros_like(fed)], 1) for d in deepstack]
        is_visual = torch.cat([is_visual, torch.tensor([False])])
        positions = torch.cat([positions, (positions.max() + 1).expand(*positions.shape[:-1], 1)], -1)
