"""The small answer as a draft: tokens, kept rows, probabilities and caches are those of a run without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.draft_words import BLOCK, README, RESULTS, filled
from engines.cache import Cache
from engines.cascade import Cascade
from engines.decoder import Chunk
from engines.draft import drafted_by, takes_draft, usable, with_draft
from engines.generate import Generation
from engines.guidance import priority_of
from engines.model import Model
from engines.sampling import Options
from engines.talk.memory import Memory
from graphs.errors import UsageError
from graphs.plan import PrunePoint, PruningPlan
from graphs.spec import past_names, spec_from_folder
from tests.conftest import Outcome
from tests.engines.run.conftest import TinyPair, picture_of, question_of

LENGTH = 8
KEEP = 0.25
Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def large(tiny_pair: TinyPair) -> Model:
    return tiny_pair.model("large")


def finished(large: Model, seed: int, options: Options, draft: Sequence[int] = ()) -> Generation:
    from engines.talk.messages import asked

    prompt = Memory(large).prompt((asked(question_of(seed), picture_of(seed)),))
    guidance = np.random.default_rng(seed).random(prompt.all_visual_tokens, dtype=np.float32)
    return large.generate(prompt, options, KEEP, priority_of(prompt, guidance), draft).finish()


def rows_of(model: Model, cache: Cache) -> dict[str, np.ndarray]:
    """What a cache holds, without the room behind its rows that a buffer may have."""
    segments = zip(cache.lengths, model.spec.plan.segments(model.spec.language.layers), strict=True)
    lengths = {name: length for length, segment in segments for layer in segment for name in past_names(layer)}
    return {name: model.to_host(value)[:, :, : lengths[name]] for name, value in cache.values.items()}


def assert_same(got: Generation, wanted: Generation, large: Model) -> None:
    assert got.tokens == wanted.tokens
    assert (got.text, got.stopped, got.seed) == (wanted.text, wanted.stopped, wanted.seed)
    np.testing.assert_allclose(got.log_prob, wanted.log_prob, atol=1e-4)
    assert got.first_logits is not None
    assert wanted.first_logits is not None
    np.testing.assert_allclose(got.first_logits, wanted.first_logits, atol=1e-4)
    assert [kept.tolist() for kept in got.kept] == [kept.tolist() for kept in wanted.kept]
    assert got.cache
    assert wanted.cache
    assert got.cache.lengths == wanted.cache.lengths
    assert got.cache.next_position == wanted.cache.next_position
    for name, value in rows_of(large, wanted.cache).items():
        np.testing.assert_allclose(rows_of(large, got.cache)[name], value, atol=1e-4)


WRITING = {
    "greedy": Options(LENGTH),
    "penalty": Options(LENGTH, repetition_penalty=1.7),
    "drawn": Options(LENGTH, temperature=1.5, top_k=20, seed=11),
    "short": Options(2),
    "one": Options(1),
}


@pytest.mark.parametrize("writing", WRITING)
def test_whatever_is_drafted_the_run_is_the_same(large: Model, writing: str) -> None:
    options, ends = WRITING[writing], large.spec.tokens.eos
    for seed in range(4):
        wanted = finished(large, seed, options)
        said, rng = [token for token in wanted.tokens if token not in ends], np.random.default_rng(seed)
        noise = rng.integers(3, large.spec.language.vocab, LENGTH).tolist()
        wrong = [(said[-1] + 7) % 50 + 5 if said[-1] != (said[-1] + 7) % 50 + 5 else 9]
        for draft in (said, said[:2], said[:-1] + wrong, said + noise, noise, [*said[:1], *ends, *said]):
            got = finished(large, seed, options, draft)
            assert_same(got, wanted, large)
            usable = draft[: (options.max_new_tokens or 0) - 1]
            usable = usable[: next((i for i, t in enumerate(usable) if t in ends), len(usable))]
            if not usable:
                assert got.drafted is None
                continue
            alike = [a == b for a, b in zip(usable, wanted.tokens, strict=False)]
            accepted = alike.index(False) if False in alike else len(alike)
            assert got.drafted
            assert (got.drafted.tokens, got.drafted.accepted) == (len(usable), accepted)
            assert got.drafted.steps_saved == min(accepted, len(wanted.tokens) - 1)


def test_a_stop_string_inside_the_draft_ends_the_answer_there(large: Model) -> None:
    whole = finished(large, 3, Options(LENGTH))
    words = whole.text.split()
    assert len(words) > 3, "choose a seed of which this random model says more"
    options = Options(LENGTH, stop=[words[2]])
    wanted = finished(large, 3, options)
    assert (wanted.stopped, len(wanted.tokens) < len(whole.tokens)) == ("stop", True)
    assert_same(finished(large, 3, options, whole.tokens), wanted, large)


def test_ids_of_the_other_models_padded_vocabulary_end_a_draft(large: Model) -> None:
    wanted = finished(large, 0, Options(LENGTH))
    got = finished(large, 0, Options(LENGTH), [wanted.tokens[0], large.spec.language.vocab, 5])
    assert_same(got, wanted, large)
    assert got.drafted == drafted_by(wanted.tokens[:1], wanted.tokens[:2])


@pytest.mark.parametrize("keep", [0.05, 0.5, 1.0])
def test_the_cascade_answers_as_without(cascade: Cascade, keep: float) -> None:
    for seed in range(6):
        looked = cascade.look(picture_of(seed), question_of(seed), max_new_tokens=LENGTH)
        with_one, without = (
            cascade.answer_large(looked, keep, max_new_tokens=LENGTH, draft=draft) for draft in (True, False)
        )
        assert with_one.tokens == without.tokens
        assert with_one.kept is not None
        assert without.kept is not None
        assert [k.tolist() for k in with_one.kept] == [k.tolist() for k in without.kept]
        assert without.draft is None
        ended = looked.stopped == "end"
        usable = min(len(looked.tokens) - ended, LENGTH - 1)
        assert (with_one.draft.tokens if with_one.draft else 0) == usable


@pytest.mark.parametrize(
    ("rows", "limit", "wanted"), [(30, 100, 5), (37, 100, 3), (44, 100, 0), (30, 4, 3), (30, 1, 0)]
)
def test_a_draft_is_no_longer_than_an_engines_rows_and_logits(large: Model, rows: int, limit: int, wanted: int) -> None:
    """Six rows with logits, one of them the prompt's last; forty rows of a chunk."""
    largest = {"tail": (6,), "inputs_embeds": (1, 40, 64)}.__getitem__
    model = SimpleNamespace(spec=large.spec, session=lambda stage: SimpleNamespace(largest=largest))
    draft = [token for token in range(20) if token not in large.spec.tokens.eos][:10]
    assert usable(model, draft, rows, limit) == tuple(draft[:wanted])  # type: ignore[arg-type]


def test_a_draft_stands_behind_the_chunk_as_text_without_features() -> None:
    given = np.arange(1, 7, dtype=np.float32).reshape(1, 3, 2)
    positions, is_visual = np.array([[0, 1, 2]]), np.array([0, 1, 0], bool)
    chunk = Chunk(inputs_embeds=given, is_visual=is_visual, positions=positions, deepstack={"deep": given})
    model: Any = SimpleNamespace(to_host=np.asarray, embed_text=lambda draft: np.full((1, len(draft), 2), 9.0))
    got = with_draft(model, chunk, (4, 5))
    assert got.inputs_embeds[0, :, 0].tolist() == [1, 3, 5, 9, 9]  # type: ignore[index,call-overload,union-attr]
    assert got.is_visual.tolist() == [False, True, False, False, False]
    assert got.positions is not None
    assert got.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert got.deepstack["deep"][0, :, 0].tolist() == [1, 3, 5, 0, 0]  # type: ignore[index,call-overload,union-attr]


def test_a_plan_whose_own_rows_guide_too_takes_no_draft() -> None:
    """The draft's rows would be among them."""
    outside = PrunePoint(layer=2, score="priority", keep=0.25)
    own = PrunePoint(layer=1, score="attention", keep=0.5)
    for points, takes in (((outside,), True), ((own, outside), False), ((own,), False), ((), False)):
        plan = PruningPlan(name="p", points=points)
        assert takes_draft(SimpleNamespace(spec=SimpleNamespace(plan=plan))) is takes  # type: ignore[arg-type]


def test_a_conversation_goes_on_from_the_trimmed_cache(tiny_pair: TinyPair) -> None:
    cascade = tiny_pair.cascade()
    talks = [cascade.chat(keep=KEEP, max_new_tokens=LENGTH, draft=draft) for draft in (True, False)]
    for turn, shown in enumerate(([picture_of(1)], [], [picture_of(2)])):
        got, wanted = (talk.ask(question_of(turn), shown) for talk in talks)
        assert got.tokens == wanted.tokens
        assert got.cached_tokens == wanted.cached_tokens
        assert (got.cached_tokens > 0) is (turn > 0)
        assert (got.draft is not None, wanted.draft) == (True, None)


def test_pieces_and_json_tell_the_same_answer(saccade_cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    ask = ("run", tiny_bundle, "--image", image_file, "which digit ?", "--threshold", 1, "--max-new-tokens", LENGTH)
    told, plain = json.loads(saccade_cli(*ask, "--json").stdout), saccade_cli(*ask, "--no-draft", "--json")
    without = json.loads(plain.stdout)
    assert told["tokens"] == without["tokens"]
    assert without["draft"] is None
    assert told["draft"].keys() == {"tokens", "accepted", "steps_saved"}
    stream = Cascade.open(tiny_bundle).stream(image_file, "which digit ?", threshold=1, max_new_tokens=LENGTH)
    assert "".join(stream) == stream.answer.text == told["answer"]


def test_who_is_timed_without_the_small_model_gets_no_draft_of_it(
    tiny_pair: TinyPair, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.bundles.manifest import manifest_of
    from engines.evaluation.contenders import unmetered
    from engines.evaluation.data import data_from_records
    from engines.evaluation.settings import RANDOM, Setting
    from engines.evaluation.sweep import Plan, row_of

    cascade, drafts = tiny_pair.cascade(), []
    assert cascade.large
    real = cascade.large.generate

    def noted(*arguments: Any) -> Generation:
        drafts.append(bool(arguments[4]))
        return real(*arguments)

    monkeypatch.setattr(cascade.large, "generate", noted)
    data = data_from_records([{"image": picture_of(0), "question": "red ?", "answer": "3"}], "one")
    settings = (Setting((1.0,), None), Setting((0.25,), "sgl"), Setting((0.25,), RANDOM))
    plan = Plan(("",), data.digest, ("cpu",), settings, LENGTH, 0)
    row_of([unmetered(tiny_bundle, manifest_of(tiny_bundle), cascade)], data.examples[0], plan, 0)
    assert drafts == [False, True, False]


def test_other_tokenizers_give_no_draft_and_are_named_once(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(tiny_pair.exports["small"], folder)
    tokenizer = folder / "processor" / "tokenizer.json"
    document: dict[str, Any] = json.loads(tokenizer.read_text())
    words = document["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    tokenizer.write_text(json.dumps(document))
    cascade = Cascade(Model(folder, spec_from_folder(folder), threads=1), tiny_pair.model("large"))
    answers = [cascade.ask(picture_of(i), "which digit ?", threshold=1, max_new_tokens=4) for i in range(2)]
    assert [answer.draft for answer in answers] == [None, None]
    assert capsys.readouterr().err.count("their vocabularies differ") == 1
    with pytest.raises(UsageError, match="takes no draft"):
        cascade.ask(picture_of(0), "which digit ?", draft=False)


def test_readmes_sentences_are_those_of_the_results() -> None:
    """And the results those of the promise: not one token differs."""
    document, text = json.loads(RESULTS.read_text("utf-8")), README.read_text("utf-8")
    assert BLOCK.search(text)
    assert filled(text, document) == text, "run: python -m benchmarks.draft_words"
    assert all(r["answers_equal"] == r["kept_tokens_equal"] == r["questions"] for r in document["results"])


def test_a_model_that_takes_no_draft_refuses_to_be_told(tiny_pair: TinyPair) -> None:
    alone = Cascade(None, tiny_pair.model("alone"))
    assert not alone.drafts
    for ask in (lambda: alone.ask(picture_of(0), "red ?", draft=False), lambda: alone.chat(draft=False)):
        with pytest.raises(UsageError, match="leave it out"):
            ask()
