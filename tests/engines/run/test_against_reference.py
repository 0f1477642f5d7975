"""The tiny pair against transformers' generate and SGL written from its formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.cascade import Cascade
from engines.confidence import consistency_of
from engines.guidance import priority_of_rows, random_guidance
from engines.sampling import Options
from engines.talk.memory import Memory
from engines.talk.messages import asked
from graphs.errors import UsageError
from graphs.plan import kept_count
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of, question_of
from tests.reference_sgl import Reference, best_visual

SEEDS = range(6)


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_kept_gives_the_tokens_of_generate(
    cascade: Cascade, references: dict[str, Reference], seed: int
) -> None:
    case = (picture_of(seed), question_of(seed))
    looked = cascade.look(*case, max_new_tokens=NEW_TOKENS)
    answer = cascade.answer_large(looked, keep=1, max_new_tokens=NEW_TOKENS)
    assert list(looked.tokens) == references["small"].generate([case], NEW_TOKENS)[0]
    assert list(answer.tokens) == references["large"].generate([case], NEW_TOKENS)[0]
    assert answer.average_retention == 1
    assert answer.kept is not None
    assert answer.kept[0].tolist() == list(range(answer.visual_tokens))


@pytest.mark.parametrize("seed", SEEDS)
def test_guidance_and_scores_are_those_of_the_formulas(
    cascade: Cascade, references: dict[str, Reference], seed: int
) -> None:
    case = (picture_of(seed), question_of(seed))
    looked = cascade.look(*case, max_new_tokens=NEW_TOKENS)
    small = references["small"]
    batch = small.batch([case])
    plain = small.scored(batch, [looked.tokens])
    np.testing.assert_allclose(looked.guidance, plain.guidance[0], rtol=1e-4, atol=1e-5)
    kept = best_visual(plain.guidance[0], kept_count(looked.guidance.size, 0.05))
    pruned = small.scored(batch, [looked.tokens], [kept], before_layer=0)
    assert looked.confidence.confidence == pytest.approx(plain.confidence()[0], abs=1e-5)
    assert looked.confidence.consistency == pytest.approx(pruned.product()[0], rel=1e-3, abs=1e-6)
    assert looked.confidence.score == 0.5 * (looked.confidence.confidence + looked.confidence.consistency)


@pytest.mark.parametrize("keep", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("seed", SEEDS)
def test_pruned_by_the_small_model_equals_the_formulas(
    cascade: Cascade, references: dict[str, Reference], seed: int, keep: float
) -> None:
    case = (picture_of(seed), question_of(seed))
    looked = cascade.look(*case, max_new_tokens=NEW_TOKENS)
    answer = cascade.answer_large(looked, keep=keep, max_new_tokens=NEW_TOKENS)
    small, large = references["small"], references["large"]
    guidance = small.scored(small.batch([case]), [looked.tokens]).guidance[0]
    kept = best_visual(guidance, int(answer.visual_tokens * keep))
    assert answer.kept is not None
    assert answer.kept[0].tolist() == kept.tolist()
    assert list(answer.tokens) == large.greedy(case, NEW_TOKENS, kept, before_layer=1)
    assert cascade.large
    prompt = looked.shared["large"]
    priority_S = priority_of_rows(looked.guidance, prompt.is_visual)
    run = cascade.large.generate(prompt, Options(NEW_TOKENS), keep, priority_S).finish()
    wanted = large.scored(large.batch([case]), [answer.tokens], [kept], before_layer=1)
    np.testing.assert_allclose(run.log_prob, wanted.log_prob[0], atol=1e-3)


def test_a_model_alone_is_pruned_by_its_own_attention(tiny_pair: TinyPair, references: dict[str, Reference]) -> None:
    alone = Cascade(None, tiny_pair.model("alone"))
    large = references["large"]
    for seed in SEEDS:
        case = (picture_of(seed), question_of(seed))
        answer = alone.ask(*case, max_new_tokens=NEW_TOKENS)
        batch = large.batch([case])
        own = first_layer_guidance(large, case)
        kept = best_visual(own, int(answer.visual_tokens * 0.25))
        assert answer.kept is not None
        assert answer.kept[0].tolist() == kept.tolist()
        assert list(answer.tokens) == large.greedy(case, NEW_TOKENS, kept, before_layer=1)
        assert (answer.model, answer.exited, answer.score) == ("alone", None, None)
        assert len(batch.embeds[0]) == answer.prompt_tokens


def first_layer_guidance(reference: Reference, case: tuple) -> np.ndarray:
    """What layer 0 alone gives each visual token from the prompt's text rows: the wide model cut to one layer."""
    layers = reference.wide.model.language_model.layers
    try:
        reference.wide.model.language_model.layers = layers[:1]
        return reference.scored(reference.batch([case]), [[0]]).guidance[0]
    finally:
        reference.wide.model.language_model.layers = layers


def test_with_nothing_pruned_consistency_is_the_product(cascade: Cascade) -> None:
    assert cascade.small
    looked = cascade.look(picture_of(0), question_of(0), max_new_tokens=NEW_TOKENS)
    whole = consistency_of(cascade.small, looked.prompt, looked.tokens, looked.guidance, keep=1)
    assert whole == pytest.approx(looked.confidence.confidence ** len(looked.tokens), rel=1e-4)


def test_the_reference_agrees_with_transformers_own_attention_maps(references: dict[str, Reference]) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration

    small = references["small"]
    case = (picture_of(3), question_of(3))
    tokens = small.generate([case], NEW_TOKENS)[0]
    hf = LlavaForConditionalGeneration.from_pretrained(
        small.hf.config._name_or_path, attn_implementation="eager"
    ).eval()
    feed = small.inputs([case])
    with torch.no_grad():
        out = hf.generate(
            **feed,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            output_attentions=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    visual = (feed["input_ids"][0] == 4).nonzero()[:, 0]
    rows = slice(int(visual[-1]) + 1, None)
    received = sum(layer[0, :, rows, visual].sum((0, 1)) for layer in out.attentions[0])
    for step in out.attentions[1:]:
        received = received + sum(layer[0, :, 0, visual].sum(0) for layer in step)
    log_prob = [float(logits[0].log_softmax(-1)[t]) for logits, t in zip(out.logits, tokens, strict=True)]
    mine = small.scored(small.batch([case]), [tokens])
    np.testing.assert_allclose(mine.guidance[0], received.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(mine.log_prob[0], log_prob, atol=1e-3)


def test_the_large_cache_is_short_behind_the_prune_point(cascade: Cascade) -> None:
    assert cascade.large
    looked = cascade.look(picture_of(1), question_of(1), max_new_tokens=NEW_TOKENS)
    large = cascade.large
    prompt = Memory(large).prompt(looked.turn.talk)
    priority_S = np.zeros(len(prompt), np.float32)
    priority_S[prompt.is_visual] = looked.guidance
    run = large.generate(prompt, Options(NEW_TOKENS), keep=0.25, priority_S=priority_S).finish()
    assert run.cache
    fed = len(run.tokens) - 1
    assert run.cache.lengths == (len(prompt) + fed, len(prompt) - 64 + 16 + fed)
    assert run.cache.positions[1].tolist() == [*run.kept[0], *range(len(prompt), len(prompt) + fed)]
    shapes = {name: large.to_host(value).shape for name, value in run.cache.values.items()}
    rooms, lengths = [shapes[f"past_k_{i}"][2] for i in range(3)], [run.cache.lengths[j] for j in (0, 1, 1)]
    assert (
        all(room >= length for room, length in zip(rooms, lengths, strict=True)) if run.cache.room else rooms == lengths
    )


def test_a_chunk_on_top_of_a_past_continues_as_one_sequence(cascade: Cascade, tiny_pair: TinyPair) -> None:
    from engines.decoder import Chunk

    assert cascade.small
    small = cascade.small
    prompt = Memory(small).prompt((asked("what colour is the 3 ?", picture_of(2)),))
    first = small.decoder.run(Chunk(prompt.inputs_embeds, prompt.is_visual))
    text = [5, 7, 9]
    chunk = Chunk(small.embed_text(text), np.zeros(3, bool))
    second = small.decoder.run(chunk, first.cache, tail=3)
    at_once = small.decoder.run(
        Chunk(
            np.concatenate([small.to_host(prompt.inputs_embeds), small.to_host(small.embed_text(text))], 1),
            np.concatenate([prompt.is_visual, np.zeros(3, bool)]),
        ),
        tail=3,
    )
    np.testing.assert_allclose(second.logits, at_once.logits, atol=1e-4)
    assert second.cache.next_position == len(prompt) + 3
    # An older cache can be continued again.
    again = small.decoder.run(chunk, first.cache, tail=3)
    np.testing.assert_array_equal(again.logits, second.logits)


def test_early_exit_neither_opens_nor_runs_the_large_model(tiny_pair: TinyPair, calls: list[Path]) -> None:
    pair = tiny_pair.cascade()
    assert pair.small
    assert pair.large
    looked = pair.ask(picture_of(0), question_of(0), threshold=0, max_new_tokens=NEW_TOKENS)
    assert looked.exited is True
    assert looked.model == "small"
    assert pair.large.opened == frozenset()
    assert {file.parent for file in calls} == {tiny_pair.exports["small"]}
    sure = pair.ask(picture_of(0), question_of(0), threshold=1, max_new_tokens=NEW_TOKENS)
    assert sure.exited is False
    assert pair.large.opened == {"vision", "embed", "decoder"}
    opened = len(calls)
    pair.ask(picture_of(1), question_of(1), threshold=1, max_new_tokens=NEW_TOKENS)
    assert len(calls) == opened


def test_the_threshold_is_strict_and_its_default_the_bundles(tiny_pair: TinyPair) -> None:
    looked = tiny_pair.cascade().look(picture_of(0), question_of(0), max_new_tokens=NEW_TOKENS)
    at = looked.confidence.score
    case = (picture_of(0), question_of(0))
    assert tiny_pair.cascade(threshold=at).ask(*case, max_new_tokens=NEW_TOKENS).exited is False
    assert tiny_pair.cascade(threshold=np.nextafter(at, 0)).ask(*case, max_new_tokens=NEW_TOKENS).exited is True


def test_a_stream_says_the_text_and_then_holds_the_answer(cascade: Cascade) -> None:
    for threshold in (0, 1):
        case = (picture_of(4), question_of(4))
        stream = cascade.stream(*case, threshold=threshold, max_new_tokens=NEW_TOKENS)
        said = "".join(stream)
        assert stream.answer.text == said
        assert said == cascade.ask(*case, threshold=threshold, max_new_tokens=NEW_TOKENS).text
        assert stream.answer.exited is (threshold == 0)


def test_a_stream_has_no_answer_before_its_end(cascade: Cascade) -> None:
    stream = cascade.stream(picture_of(4), question_of(4), max_new_tokens=NEW_TOKENS)
    with pytest.raises(UsageError, match="not complete"):
        _ = stream.answer


def test_another_guidance_prunes_by_itself(cascade: Cascade) -> None:
    looked = cascade.look(picture_of(0), question_of(0), max_new_tokens=NEW_TOKENS)
    scores = random_guidance(64, seed=7)
    answer = cascade.answer_large(looked, keep=0.25, guidance=scores, max_new_tokens=NEW_TOKENS)
    assert answer.kept is not None
    assert answer.kept[0].tolist() == best_visual(scores, 16).tolist()
    assert random_guidance(64, seed=7).tolist() == scores.tolist()
