"""The invariants of SGL (PAPERS: keep everything, nothing pruned, the sum of attention), for any image and question."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.cascade import Cascade
from engines.confidence import _rows_of, confidence_of, consistency_of, log_probs
from engines.guidance import top_visual
from graphs.plan import kept_count
from tests.engines.run.conftest import picture_of, question_of
from tests.reference_sgl import best_visual

FEW = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
seeds = st.integers(0, 2**31)
scores = st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=60).map(lambda x: np.array(x, np.float32))


@FEW
@given(image=seeds, question=seeds, length=st.integers(1, 6))
def test_keeping_everything_is_the_identity(cascade: Cascade, image: int, question: int, length: int) -> None:
    assert cascade.large
    looked = cascade.look(picture_of(image), question_of(question), max_new_tokens=length)
    whole = cascade.answer_large(looked, keep=1, max_new_tokens=length)
    other = cascade.answer_large(looked, keep=1, max_new_tokens=length, guidance=-looked.guidance)
    assert whole.tokens == other.tokens
    assert whole.kept is not None
    assert whole.kept[0].tolist() == list(range(whole.visual_tokens))


@FEW
@given(image=seeds, question=seeds, length=st.integers(1, 6))
def test_nothing_pruned_makes_consistency_the_nth_power(
    cascade: Cascade, image: int, question: int, length: int
) -> None:
    assert cascade.small
    looked = cascade.look(picture_of(image), question_of(question), max_new_tokens=length)
    whole = consistency_of(cascade.small, looked.prompt, looked.tokens, looked.guidance, keep=1)
    assert whole == pytest.approx(looked.confidence.confidence ** len(looked.tokens), rel=1e-3, abs=1e-12)


@FEW
@given(image=seeds, question=seeds, length=st.integers(1, 6))
def test_guidance_sums_to_at_most_layers_heads_rows(cascade: Cascade, image: int, question: int, length: int) -> None:
    assert cascade.small
    looked = cascade.look(picture_of(image), question_of(question), max_new_tokens=length)
    language = cascade.small.spec.language
    text_behind = len(looked.prompt) - 1 - int(np.flatnonzero(looked.prompt.is_visual)[-1])
    rows = text_behind + len(looked.tokens) - 1
    assert (looked.guidance >= 0).all()
    assert looked.guidance.sum() <= language.layers * language.heads * rows * (1 + 1e-5)


@FEW
@given(image=seeds, question=seeds, keep=st.floats(0.01, 1))
def test_what_is_kept_is_counted_ordered_and_the_best(cascade: Cascade, image: int, question: int, keep: float) -> None:
    looked = cascade.look(picture_of(image), question_of(question), max_new_tokens=2)
    answer = cascade.answer_large(looked, keep=keep, max_new_tokens=1)
    assert answer.kept is not None
    kept = answer.kept[0]
    assert len(kept) == kept_count(64, keep)
    assert (np.diff(kept) > 0).all()
    dropped = np.setdiff1d(np.arange(64), kept)
    if len(dropped):
        assert looked.guidance[kept].min() >= looked.guidance[dropped].max()


@given(scores, st.floats(0.01, 1))
def test_the_hosts_ranking_is_the_graphs(guidance: np.ndarray, keep: float) -> None:
    assert top_visual(guidance, keep).tolist() == best_visual(guidance, kept_count(len(guidance), keep)).tolist()


@given(st.integers(1, 8), seeds, st.floats(0.1, 60))
def test_log_probs_are_a_log_softmax(length: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((length, 9)) * scale).astype(np.float32)
    tokens = rng.integers(0, 9, length)
    wanted = [
        np.log(np.exp(row - row.max()) / np.exp(row - row.max()).sum())[t]
        for row, t in zip(logits.astype(np.longdouble), tokens, strict=True)
    ]
    got = log_probs(logits, tokens.tolist())
    np.testing.assert_allclose(got, np.array(wanted, np.float64), rtol=1e-9, atol=1e-12)
    assert 0 <= confidence_of(got) <= 1


def test_features_of_kept_rows_stand_before_the_answers_zeros() -> None:
    given = np.arange(1, 9, dtype=np.float32).reshape(1, 4, 2)
    assert _rows_of(given, np.array([0, 2]), 2)[0].tolist() == [[1, 2], [5, 6], [0, 0], [0, 0]]
