"""Conversations: an answer on caches that are there is that of a fresh run with the same kept tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engines.answer import Answer
from engines.cascade import Cascade
from engines.generate import Generation, first_stop
from engines.model import Model
from engines.processing import Processor
from engines.stream import Stream
from engines.talk.conversation import Conversation
from engines.talk.messages import Talk, asked
from graphs.errors import BadArtefact, OperationFailed, UsageError
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of, question_of
from tests.reference_sgl import Reference, best_visual

ABOUT = pytest.approx


class Plain:
    """A conversation as one sequence through the reference: no cache, pruned images masked, one pass a token."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.tokenizer = reference, reference.tokenizer

    def ids(self, messages: list[dict[str, Any]], tokens_per_image: int = 64) -> np.ndarray:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.reference.template, tokenize=False, add_generation_prompt=True
        )
        text = text.replace("<image>", "<image>" * tokens_per_image)
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def forward(
        self, ids: np.ndarray, images: list[Image.Image], kept: np.ndarray | None, guides: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits [T, vocab] and what the guide rows gave to each row, over all layers."""
        wide = self.reference.wide
        x_TD = wide.get_input_embeddings()(torch.from_numpy(ids)).clone()
        at = np.flatnonzero(ids == wide.config.image_token_id)
        if images:
            pixels = self.reference.images(images=images, return_tensors="pt")["pixel_values"].double()
            features = wide.model.get_image_features(pixels).pooler_output
            x_TD[torch.from_numpy(at)] = torch.cat(list(features)).reshape(-1, x_TD.shape[1])
        dropped = np.zeros(len(ids), bool)
        if kept is not None:
            dropped[np.delete(at, kept)] = True
        guide_T = torch.zeros(1, len(ids), dtype=torch.float64)
        guide_T[0, guides] = 1
        before = 1 if kept is not None else 0
        logits, received = self.reference._forward(x_TD[None], guide_T, torch.from_numpy(dropped)[None], before)
        return logits[0].numpy(), received[0].numpy()

    def greedy(self, ids: np.ndarray, images: list[Image.Image], kept: np.ndarray | None = None) -> list[int]:
        answer: list[int] = []
        while len(answer) < NEW_TOKENS and not (answer and answer[-1] in self.reference.eos):
            logits, _ = self.forward(np.concatenate([ids, answer]).astype(int), images, kept, np.zeros(0, int))
            answer.append(int(logits[-1].argmax()))
        return answer


@pytest.fixture(scope="module")
def plain(references: dict[str, Reference]) -> dict[str, Plain]:
    return {name: Plain(reference) for name, reference in references.items()}


def messages_of(talk: Conversation) -> list[dict[str, Any]]:
    return [message.document() for message in talk.talk]


def asked_before(talk: Conversation) -> list[dict[str, Any]]:
    """The messages up to the last question."""
    return messages_of(talk)[:-1]


def test_several_images_with_text_between_are_one_prompt(cascade: Cascade, plain: dict[str, Plain]) -> None:
    images = [picture_of(1), picture_of(2)]
    content = [
        {"type": "image", "image": images[0]},
        {"type": "text", "text": "red"},
        {"type": "image", "image": images[1]},
        {"type": "text", "text": "which digit ?"},
    ]
    looked = cascade.look(None, content, max_new_tokens=NEW_TOKENS)
    ids = plain["small"].ids([m.document() for m in looked.turn.talk])
    assert looked.prompt.line.tolist() == ids.tolist()
    assert list(looked.tokens) == plain["small"].greedy(ids, images)
    last = int(np.flatnonzero(ids == 4)[-1])
    _, received = plain["small"].forward(
        np.concatenate([ids, looked.tokens[:-1]]).astype(int),
        images,
        None,
        np.arange(last + 1, len(ids) + len(looked.tokens) - 1),
    )
    np.testing.assert_allclose(looked.guidance, received[np.flatnonzero(ids == 4)], atol=1e-4)
    answer = cascade.answer_large(looked, keep=0.25)
    assert answer.kept is not None
    assert answer.kept[0].tolist() == best_visual(looked.guidance, 32).tolist()
    assert answer.visual_tokens == 128
    assert list(answer.tokens) == plain["large"].greedy(ids, images, answer.kept[0])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_text_alone_is_answered(cascade: Cascade, plain: dict[str, Plain], threshold: float) -> None:
    answer = cascade.ask(None, "what colour is 3 ?", threshold=threshold, max_new_tokens=NEW_TOKENS)
    ids = plain["small"].ids([{"role": "user", "content": [{"type": "text", "text": "what colour is 3 ?"}]}])
    assert list(answer.tokens) == plain[answer.model].greedy(ids, [])
    assert (answer.visual_tokens, answer.average_retention) == (0, None)
    assert answer.confidence
    looked = cascade.look(None, "what colour is 3 ?", max_new_tokens=NEW_TOKENS)
    assert looked.confidence.consistency == ABOUT(looked.confidence.confidence ** len(looked.tokens))


# Who answers each of the turns; a turn's image, if it has one.
STORIES = [
    (["small", "small", "large"], [True, False, False]),
    (["large", "large", "small"], [True, False, False]),
    (["large", "small", "large"], [True, False, True]),
    (["small", "large", "large"], [False, True, True]),
]


@pytest.mark.parametrize(("who", "shows"), STORIES, ids=str)
def test_a_turn_on_the_caches_equals_a_fresh_run(
    tiny_pair: TinyPair, plain: dict[str, Plain], who: list[str], shows: list[bool]
) -> None:
    cascade = tiny_pair.cascade()
    talk = cascade.chat(keep=0.25, max_new_tokens=NEW_TOKENS)
    images: list[Image.Image] = []
    held: dict[str, int] = {}
    for turn, (name, shown) in enumerate(zip(who, shows, strict=True)):
        talk._threshold = 0.0 if name == "small" else 1.0
        new = [picture_of(turn)] if shown else []
        images += new
        answer = talk.ask(question_of(turn), new)
        assert answer.model == name
        ids = plain[name].ids(asked_before(talk))
        assert answer.prompt_tokens == len(ids)
        assert answer.visual_tokens == 64 * len(images)
        kept = answer.kept[0] if answer.kept is not None else None
        if name == "large" and kept is not None:
            assert len(kept) == 16 * len(images)
        assert list(answer.tokens) == plain[name].greedy(ids, images, kept if name == "large" else None)
        if "small" in held:
            assert talk._memories["small"]._held is not None
        if name in held:
            assert answer.cached_tokens >= held[name] > 0
        held[name] = answer.prompt_tokens


def test_a_follow_up_is_guided_by_its_own_question(tiny_pair: TinyPair, plain: dict[str, Plain]) -> None:
    cascade = tiny_pair.cascade(threshold=0.0)
    talk = cascade.chat(max_new_tokens=NEW_TOKENS)
    talk.ask("what colour is 3 ?", picture_of(3))
    first = talk.talk
    answer = talk.ask("which digit ?")
    ids = plain["small"].ids(asked_before(talk))
    assert answer.guidance is not None
    fed = np.concatenate([ids, answer.tokens[:-1]]).astype(int)
    _, received = plain["small"].forward(fed, [picture_of(3)], None, np.arange(answer.cached_tokens, len(fed)))
    np.testing.assert_allclose(answer.guidance, received[np.flatnonzero(ids == 4)], atol=1e-4)
    # Its consistency is that of a fresh look at the same conversation, as long as the guidance is the same.
    assert answer.confidence
    fresh = cascade.look_at(cascade.turn((*first, talk.talk[2]), max_new_tokens=NEW_TOKENS))
    assert answer.confidence.confidence == ABOUT(fresh.confidence.confidence, abs=1e-4)
    assert answer.tokens == fresh.tokens


def test_roles_and_history_go_into_the_template(cascade: Cascade, plain: dict[str, Plain]) -> None:
    said = [
        {"role": "system", "content": "red"},
        {"role": "user", "content": [{"type": "image", "image": picture_of(1)}, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "blue"},
    ]
    talk = cascade.chat(said, threshold=0, max_new_tokens=NEW_TOKENS)
    answer = talk.ask("which digit ?")
    ids = plain["small"].ids(asked_before(talk))
    assert [m.role for m in talk.talk] == ["system", "user", "assistant", "user", "assistant"]
    assert list(answer.tokens) == plain["small"].greedy(ids, [picture_of(1)])
    assert talk.talk[-1].text == answer.text


def test_a_turn_that_is_not_heard_to_its_end_does_not_count(tiny_pair: TinyPair) -> None:
    talk = tiny_pair.cascade().chat(max_new_tokens=NEW_TOKENS)
    first = talk.ask("what colour is 3 ?", picture_of(3))
    stream = talk.stream("which digit ?")
    next(iter(stream), None)
    with pytest.raises(UsageError):
        talk.ask("what is <image> ?")
    assert len(talk.talk) == 2
    again = talk.ask("which digit ?")
    fresh = tiny_pair.cascade().chat(max_new_tokens=NEW_TOKENS)
    fresh.ask("what colour is 3 ?", picture_of(3))
    assert fresh.ask("which digit ?").tokens == again.tokens
    talk.reset()
    assert talk.ask("what colour is 3 ?", picture_of(3)).tokens == first.tokens


def test_a_turn_that_failed_leaves_no_image_behind(tiny_pair: TinyPair) -> None:
    talk, fresh = (tiny_pair.cascade().chat(max_new_tokens=NEW_TOKENS) for _ in range(2))
    with pytest.raises(UsageError, match="positions"):
        talk.ask("what colour is 3 ? " * 200, picture_of(3))
    answers = [each.ask("what colour is 3 ?", picture_of(4)) for each in (talk, fresh)]
    assert np.array_equal(answers[0].guidance, answers[1].guidance)


def test_an_image_is_prepared_once_for_models_that_see_alike(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Processor] = []
    look = Processor.look
    monkeypatch.setattr(Processor, "look", lambda self, *images: (made.append(self), look(self, *images))[1])
    cascade = tiny_pair.cascade()
    assert cascade.small
    assert cascade.large
    cascade.ask(picture_of(3), "what colour is 3 ?", threshold=1, max_new_tokens=NEW_TOKENS)
    assert made == [cascade.small.processor]
    other = tiny_pair.cascade()
    assert other.small
    assert other.large
    other.large.processor.image_processor.resample = 0
    other.ask(picture_of(3), "what colour is 3 ?", threshold=1, max_new_tokens=NEW_TOKENS)
    assert made[1:] == [other.small.processor, other.large.processor]


def pixels_in(talk: Conversation, name: str = "large") -> list[bool]:
    """Of each image's message, whether its pixels are held."""
    return [bool(seen.feeds) for _, seen in talk._memories[name]._seen.values()]


def test_pixels_are_dropped_once_nobody_is_to_see_them(tiny_pair: TinyPair) -> None:
    talk = tiny_pair.cascade().chat(keep=0.25, max_new_tokens=NEW_TOKENS)
    talk._threshold = 0.0
    talk.ask("what colour is 3 ?", picture_of(3))
    assert pixels_in(talk) == [True], "the large model may be asked yet"
    talk._threshold = 1.0
    talk.ask("which digit ?", picture_of(4))
    assert pixels_in(talk) == [False, False]
    assert talk._memories["small"]._seen is talk._memories["large"]._seen
    alone = Cascade(None, tiny_pair.model("large")).chat(max_new_tokens=NEW_TOKENS, keep=1)
    alone.ask("what colour is 3 ?", picture_of(3))
    assert pixels_in(alone) == [False]


@contextmanager
def large_that_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, the large model has no memory for its answer."""
    generate = Model.generate

    def fails(self: Model, *rest: Any) -> Generation:
        if self.spec.role == "large":
            raise OperationFailed("no memory")
        return generate(self, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(Model, "generate", fails)
        yield


def test_pixels_are_made_again_where_a_turn_failed(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = Processor.look
    monkeypatch.setattr(Processor, "look", lambda self, *images: (looks.append(1), look(self, *images))[1])
    talk, fresh = (tiny_pair.cascade().chat(keep=0.25, max_new_tokens=NEW_TOKENS) for _ in range(2))
    image = picture_of(3)
    with large_that_fails(monkeypatch), pytest.raises(OperationFailed):
        talk.ask("what colour is 3 ?", image)
    assert pixels_in(talk) == [False]
    answer, wanted = (each.ask("what colour is 3 ?", image) for each in (talk, fresh))
    assert np.array_equal(answer.guidance, wanted.guidance)
    assert answer.tokens == wanted.tokens
    assert answer.confidence == wanted.confidence


def test_a_follow_up_that_failed_is_asked_again_as_if_for_the_first_time(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, fresh = (tiny_pair.cascade().chat(keep=0.25, max_new_tokens=NEW_TOKENS) for _ in range(2))
    for each in (talk, fresh):
        each.ask("what colour is 3 ?", picture_of(3))
    with large_that_fails(monkeypatch), pytest.raises(OperationFailed):
        talk.ask("which digit is red ?")
    answer, wanted = (each.ask("which digit is red ?") for each in (talk, fresh))
    assert np.array_equal(answer.guidance, wanted.guidance)
    assert answer.confidence == wanted.confidence


def test_a_turn_begins_where_the_last_one_ended_however_often_it_is_asked(tiny_pair: TinyPair) -> None:
    """A settling of another turn than the one that was asked, as that of a turn that failed, moves nothing."""
    cascade = tiny_pair.cascade()
    memories = cascade.memories()

    def ask(talk: Talk) -> Answer:
        turn = cascade.turn(talk, memories, max_new_tokens=NEW_TOKENS)
        return Stream(cascade.parts(turn, 0.25, 1.0)).finish()

    def settle(talk: Talk) -> None:
        for memory in memories.values():
            memory.settle(talk)

    one = (asked("what colour is 3 ?", picture_of(1)),)
    two = (*one, asked("which digit ?", picture_of(2)))
    ask(one)
    settle(one)
    first, again = ask(two), ask(two)
    settle(one)
    answers = (first, again, ask(two))
    assert first.cached_tokens > 0
    assert first.kept is not None
    assert len(first.kept[0]) == 32
    for answer in answers[1:]:
        assert answer.cached_tokens == first.cached_tokens
        assert np.array_equal(answer.guidance, first.guidance)
        assert answer.kept is not None
        assert answer.kept[0].tolist() == first.kept[0].tolist()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_turn_beside_another_is_no_turn(tiny_pair: TinyPair, threshold: float) -> None:
    talk = tiny_pair.cascade().chat(threshold=threshold, max_new_tokens=NEW_TOKENS)
    one, other = (talk.stream("what colour is 3 ?", picture_of(i)) for i in (1, 2))
    first = one.finish()
    with pytest.raises(UsageError, match="the conversation went on"):
        other.finish()
    assert [message.text for message in talk.talk] == ["what colour is 3 ?", first.text]


def test_an_image_is_never_taken_for_another_one(tiny_pair: TinyPair) -> None:
    """Their placeholders are alike, and here what was held before is another talk's."""
    cascade = tiny_pair.cascade()
    memories = cascade.memories()
    talks = [(asked("what colour is 3 ?", picture_of(i)),) for i in (1, 2)]
    for talk in talks:
        answer = Stream(cascade.parts(cascade.turn(talk, memories, max_new_tokens=NEW_TOKENS), 0.25, 1.0)).finish()
        fresh = Stream(cascade.parts(cascade.turn(talk, max_new_tokens=NEW_TOKENS), 0.25, 1.0)).finish()
        assert answer.cached_tokens < 64
        assert (answer.tokens, answer.confidence) == (fresh.tokens, fresh.confidence)
        for memory in memories.values():
            memory.settle(talk)


def test_a_stop_string_ends_the_answer_before_it(cascade: Cascade) -> None:
    whole = cascade.ask(picture_of(4), question_of(4), threshold=0, max_new_tokens=NEW_TOKENS)
    words = whole.text.split()
    if len(words) < 2:
        pytest.skip("this random model says one word")
    stop = words[1]
    short = cascade.ask(picture_of(4), question_of(4), threshold=0, max_new_tokens=NEW_TOKENS, stop=[stop])
    assert (short.text, short.stopped) == (whole.text[: whole.text.index(stop)].strip(), "stop")
    stream = cascade.stream(picture_of(4), question_of(4), threshold=1, max_new_tokens=NEW_TOKENS, stop=["3 3", "?"])
    assert "".join(stream) == stream.answer.text


def test_the_stop_string_that_comes_first_ends_the_answer() -> None:
    assert first_stop("a b c", ["c", "b", "z"]) == 2
    assert first_stop("a b c", ["z"]) is None


def test_the_large_model_draws_with_the_small_ones_seed(cascade: Cascade) -> None:
    """Also where it is asked with other options."""
    looked = cascade.look(picture_of(1), question_of(1), max_new_tokens=3, temperature=1.0)
    assert looked.seed is not None
    assert cascade.answer_large(looked, max_new_tokens=2, temperature=0.7).seed == looked.seed


def test_a_seed_writes_the_same_answer_again(cascade: Cascade) -> None:
    def ask(**options: Any) -> Answer:
        return cascade.ask(picture_of(0), question_of(0), threshold=0, max_new_tokens=NEW_TOKENS, **options)

    first = ask(temperature=2.0)
    assert ask(temperature=2.0, seed=first.seed).tokens == first.tokens
    assert len({ask(temperature=2.0, seed=seed).tokens for seed in range(5)}) > 1
    both = cascade.ask(picture_of(0), question_of(0), threshold=1, max_new_tokens=NEW_TOKENS, temperature=2.0)
    again = cascade.ask(
        picture_of(0), question_of(0), threshold=1, max_new_tokens=NEW_TOKENS, temperature=2.0, seed=both.seed
    )
    assert (again.tokens, again.confidence) == (both.tokens, both.confidence)
    assert np.array_equal(again.guidance, both.guidance)
    assert ask(temperature=1.0, top_k=1, seed=0).tokens == ask().tokens


def test_repetition_penalty_is_that_of_generate(tiny_pair: TinyPair, cascade: Cascade) -> None:
    reference = Reference(tiny_pair.checkpoints["small"])
    feed = reference.inputs([(picture_of(0), question_of(0))])
    out = reference.hf.generate(
        **feed, do_sample=False, max_new_tokens=8, repetition_penalty=1.8, pad_token_id=0, eos_token_id=[63]
    )
    looked = cascade.look(picture_of(0), question_of(0), max_new_tokens=8, repetition_penalty=1.8)
    wanted = out[0, feed["input_ids"].shape[1] :].tolist()
    assert list(looked.tokens) == wanted[: len(looked.tokens)]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "robot", "content": "x"}], "robot"),
        ([{"role": "user", "content": 5}], "int"),
        ([{"role": "user", "content": [{"type": "video"}]}], "video"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://x"}]}], "downloaded"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "first"),
        ([{"role": "assistant", "content": [{"type": "image", "image": picture_of(0)}]}], "only the user"),
        ("hello", "list"),
    ],
    ids=["role", "text", "part", "address", "system", "sight", "shape"],
)
def test_messages_that_cannot_be_are_refused(cascade: Cascade, messages: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        cascade.chat(messages)


Cli = Callable[..., Any]


def test_chat_answers_line_after_line(
    saccade_cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    other = tmp_path / "other.png"
    picture_of(1).save(other)
    said = tmp_path / "said.json"
    content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "what ?"}]
    said.write_text(json.dumps([{"role": "user", "content": content}]))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"which digit ?\n\n/image {other}\nred ?\n/reset\nred ?\n/quit\nno\n"))
    told = saccade_cli("chat", tiny_bundle, "--messages", said, "--threshold", 0, "--max-new-tokens", 3)
    talk = Cascade.open(tiny_bundle).chat(
        [{"role": "user", "content": [{"type": "image", "path": image_file}, *content[1:]]}],
        threshold=0,
        max_new_tokens=3,
    )
    wanted = [talk.answer(), talk.ask("which digit ?"), talk.ask("red ?", other)]
    talk.reset(1)
    wanted.append(talk.ask("red ?"))
    assert (told.code, told.stdout.splitlines()) == (0, [a.text for a in wanted])


def test_chat_refuses_in_one_sentence(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    broken = tmp_path / "broken.json"
    broken.write_text("[")
    assert saccade_cli("chat", tiny_bundle, "--messages", broken).code == BadArtefact.exit_code
    broken.write_text("[" * 100_000)
    assert saccade_cli("chat", tiny_bundle, "--messages", broken).code == BadArtefact.exit_code
    monkeypatch.setattr("sys.stdin", io.StringIO("/fly\n"))
    told = saccade_cli("chat", tiny_bundle)
    assert (told.code, len(told.stderr.strip().splitlines())) == (2, 1)
