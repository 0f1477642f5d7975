"""The choice of tokens, held to transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engines.generate import Generation, first_stop
from engines.sampling import Options, Sampler, penalised, probabilities
from engines.stream import pieces_of, without_begun_stop
from graphs.errors import UsageError

VOCAB = 50


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (9, 0.4), (1, 0.05), (99, 1.0)])
@pytest.mark.parametrize("penalty", [None, 1.3, 0.8])
def test_what_is_drawn_from_is_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, penalty: float | None
) -> None:
    rng = np.random.default_rng(seed)
    logits, said = rng.normal(0, 3, VOCAB).astype(np.float32), rng.integers(0, VOCAB, 7)
    theirs = LogitsProcessorList()
    if penalty:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
    theirs.append(TemperatureLogitsWarper(temperature))
    if top_k:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p and top_p < 1:
        theirs.append(TopPLogitsWarper(top_p))
    wanted = theirs(torch.from_numpy(said)[None], torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
    options = Options(temperature=temperature, top_k=top_k, top_p=top_p)
    got = probabilities(penalised(logits, set(said.tolist()), penalty or 1.0), options)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert ((got > 0) == (wanted > 0)).all()


def test_a_seed_draws_the_same_tokens_again_and_as_often_as_it_should() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2, 0.0001], np.float32))
    options = Options(temperature=1.0, top_k=3, seed=5)
    first, again = (Sampler(options, []) for _ in range(2))
    drawn = [first.choose(logits) for _ in range(4000)]
    assert drawn == [again.choose(logits) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.2, 0], atol=0.03)
    fresh = Sampler(Options(temperature=1.0), [])
    assert Sampler(Options(temperature=1.0, seed=fresh.seed), []).choose(logits) == fresh.choose(logits)


def test_greedy_takes_the_lower_id_of_equals_and_notes_it() -> None:
    sampler = Sampler(Options(repetition_penalty=2.0), [1])
    logits = np.array([1.0, 3.0, 2.0, 2.0], np.float32)
    assert [sampler.choose(logits) for _ in range(3)] == [2, 3, 1]
    assert sampler.seed is None


def test_top_p_takes_the_lower_id_of_equals() -> None:
    got = probabilities(np.zeros(4, np.float32), Options(temperature=1.0, top_p=0.5))
    assert got.tolist() == [0.5, 0.5, 0, 0]


def test_a_token_that_was_said_and_is_beyond_the_vocabulary_is_not_penalised() -> None:
    logits = np.array([2.0, -1.0], np.float32)
    assert penalised(logits, {0, 1, 7}, 2.0).tolist() == [1.0, -2.0]


class LowestDraw:
    def random(self) -> float:
        return 0.0


def test_a_draw_of_0_takes_no_token_that_cannot_be() -> None:
    sampler = Sampler(Options(temperature=1.0, top_k=1, seed=0), [])
    sampler._draw = LowestDraw()  # type: ignore[assignment]
    assert sampler.choose(np.array([0.0, 5.0], np.float32)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 5},
        {"top_p": 0.5},
        {"seed": 1},
        {"temperature": 1, "top_k": 0},
        {"temperature": 1, "top_p": 0},
        {"temperature": 1, "top_p": 1.5},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"stop": "text"},
        {"stop": [""]},
    ],
    ids=str,
)
def test_an_option_that_is_wrong_or_does_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Options(**wrong)  # type: ignore[arg-type]


def test_a_stop_string_that_has_begun_is_held_back() -> None:
    assert without_begun_stop("red 3 US", ["USER:"]) == "red 3"
    assert without_begun_stop("red 3 USE", ["\nUSER:", "3 USES"]) == "red"
    assert without_begun_stop("red 3", ["USER:"]) == "red 3"


class Written:
    """As much of a generation as its pieces are made of; its tokens are their own text."""

    written, text = Generation.written, Generation.text

    def __init__(self, tokens: list[str], stop: list[str]) -> None:
        self.said, self.tokens, self.options = tokens, [], SimpleNamespace(stop=stop)  # type: ignore[var-annotated]
        self._model = SimpleNamespace(processor=SimpleNamespace(written="".join))

    def __iter__(self) -> Iterator[str]:
        for token in self.said:
            self.tokens.append(token)
            yield token
            if first_stop("".join(self.tokens), self.options.stop) is not None:
                return


def test_an_answer_that_begins_with_a_stop_string_yields_nothing() -> None:
    run = Written(["\n", "User", ":"], ["\nUser:"])
    assert (list(pieces_of(run)), run.text) == ([], "")  # type: ignore[arg-type]


@given(
    st.lists(st.text("ab \n", min_size=1, max_size=2), min_size=1, max_size=6),
    st.lists(st.text("ab \n", min_size=1, max_size=3), max_size=2),
)
def test_the_pieces_are_the_text(tokens: list[str], stop: list[str]) -> None:
    run = Written(tokens, stop)
    assert "".join(pieces_of(run)) == run.text  # type: ignore[arg-type]
