"""The shipped pair on 200 held-out questions, against transformers' generate and SGL from its formulas.

Both are batched; SGL's tokens are checked by teacher forcing (tests/reference_sgl.py says why that is
enough). A row may differ from the reference's only where two visual tokens' guidance is a tie to fp32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engines.answer import Answer, SmallPass
from engines.cascade import Cascade
from engines.confidence import consistency_of
from graphs.plan import average_retention, keep_for_retention, kept_count
from tests.reference_sgl import Case, Reference, Scored, best_visual

QUESTIONS = 200
NEW_TOKENS = 12
BATCH = 40
RETENTIONS = (0.64, 0.35, 0.09)
TIE = 1e-5

pytestmark = pytest.mark.slow


@dataclass
class Run:
    """The questions and everything the engines said to them."""

    bundle: Path
    cascade: Cascade
    cases: list[Case]
    looked: list[SmallPass]
    whole: list[Answer]
    pruned: dict[float, list[Answer]]


@pytest.fixture(scope="module")
def pair() -> Path:
    from glyphs.checkpoint import PAIR

    missing = [name for name in ("small", "large") if not (PAIR / name / "config.json").is_file()]
    assert not missing, f"the glyph pair is not trained yet: {PAIR} lacks {missing}"
    return PAIR


@pytest.fixture(scope="module")
def run(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    import torch

    from engines.bundles.build import build_bundle
    from exporter.export import export_checkpoint
    from glyphs.data import held_out_questions

    torch.set_num_threads(2)
    home = tmp_path_factory.mktemp("glyphs")
    for role in ("small", "large"):
        export_checkpoint(pair / role, home / role, policy="sgl", role=role)  # type: ignore[arg-type]
    build_bundle([home / "small", home / "large"], home / "pair.bundle")
    cascade = Cascade.open(home / "pair.bundle")
    assert cascade.large
    cases = [(q.image, q.question) for q in held_out_questions(QUESTIONS)]
    looked = [cascade.look(*case, max_new_tokens=NEW_TOKENS) for case in cases]
    whole = [cascade.answer_large(one, keep=1, max_new_tokens=NEW_TOKENS) for one in looked]
    pruned = {
        keep: [cascade.answer_large(one, keep=keep, max_new_tokens=NEW_TOKENS) for one in looked]
        for keep in keeps_of(cascade)
    }
    return Run(home / "pair.bundle", cascade, cases, looked, whole, pruned)


def layer_of_cut(cascade: Cascade) -> tuple[int, int]:
    assert cascade.large
    return cascade.large.spec.language.layers, cascade.large.spec.plan.points[0].layer


def keeps_of(cascade: Cascade) -> list[float]:
    return [keep_for_retention(*layer_of_cut(cascade), r) for r in RETENTIONS]


@pytest.fixture(scope="module")
def small(pair: Path) -> Reference:
    return Reference(pair / "small")


@pytest.fixture(scope="module")
def large(pair: Path) -> Reference:
    return Reference(pair / "large")


def in_batches(
    reference: Reference,
    cases: list[Case],
    answers: list[tuple[int, ...]],
    kept: list[np.ndarray] | None = None,
    before_layer: int = 0,
) -> Scored:
    whole = Scored([], [], [], [])
    for at in range(0, len(cases), BATCH):
        here = slice(at, at + BATCH)
        part = reference.scored(reference.batch(cases[here]), answers[here], kept[here] if kept else None, before_layer)
        for field in ("best", "log_prob", "guidance", "logits"):
            getattr(whole, field).extend(getattr(part, field))
    return whole


@pytest.fixture(scope="module")
def formulas(run: Run, small: Reference) -> Scored:
    return in_batches(small, run.cases, [one.tokens for one in run.looked])


@pytest.mark.parametrize("role", ["small", "large"])
def test_all_tokens_equal_generate_with_everything_kept(run: Run, request: pytest.FixtureRequest, role: str) -> None:
    reference: Reference = request.getfixturevalue(role)
    mine = [list(a.tokens) for a in (run.looked if role == "small" else run.whole)]
    theirs = []
    for at in range(0, QUESTIONS, BATCH):
        theirs += reference.generate(run.cases[at : at + BATCH], NEW_TOKENS)
    assert [i for i in range(QUESTIONS) if mine[i] != theirs[i]] == []


def test_the_small_models_tokens_guidance_and_scores_are_the_formulas(
    run: Run, small: Reference, formulas: Scored
) -> None:
    assert [i for i, one in enumerate(run.looked) if list(one.tokens) != formulas.best[i]] == []
    for one, guidance in zip(run.looked, formulas.guidance, strict=True):
        np.testing.assert_allclose(one.guidance, guidance, rtol=1e-3, atol=1e-4)
    kept = [best_visual(a, kept_count(len(a), 0.05)) for a in formulas.guidance]
    pruned = in_batches(small, run.cases, [one.tokens for one in run.looked], kept)
    np.testing.assert_allclose([one.confidence.confidence for one in run.looked], formulas.confidence(), atol=1e-4)
    np.testing.assert_allclose([one.confidence.consistency for one in run.looked], pruned.product(), atol=1e-4)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_pruned_rows_and_tokens_are_the_formulas(
    run: Run, large: Reference, formulas: Scored, retention: float
) -> None:
    layers, layer = layer_of_cut(run.cascade)
    keep = keep_for_retention(layers, layer, retention)
    answers = run.pruned[keep]
    tokens = answers[0].visual_tokens
    kept = [best_visual(a, int(tokens * keep + 1e-9)) for a in formulas.guidance]
    for i, answer in enumerate(answers):
        assert answer.kept is not None
        assert answer.average_retention == pytest.approx(average_retention(layers, layer, keep))
        if answer.kept[0].tolist() != kept[i].tolist():
            assert is_tie(answer.kept[0], kept[i], formulas.guidance[i]), f"question {i}: other rows are kept"
            kept[i] = answer.kept[0]
    scored = in_batches(large, run.cases, [a.tokens for a in answers], kept, before_layer=layer)
    assert [i for i, a in enumerate(answers) if list(a.tokens) != scored.best[i]] == []


def test_the_small_answer_saves_decode_steps(run: Run) -> None:
    """The tokens above were all made with drafts; here is what without makes of them, at 9 % of every question."""
    for keep, answers in run.pruned.items():
        drafted = [a.draft for a in answers if a.draft]
        assert len(drafted) > 0.9 * QUESTIONS
        assert sum(d.steps_saved for d in drafted) > 0.5 * sum(len(a.tokens) - 1 for a in answers)
        some = QUESTIONS if keep == min(run.pruned) else 25
        for looked, answer in list(zip(run.looked, answers, strict=True))[:some]:
            plain = run.cascade.answer_large(looked, keep=keep, max_new_tokens=NEW_TOKENS, draft=False)
            assert (plain.tokens, plain.draft) == (answer.tokens, None)
            assert answer.kept is not None
            assert plain.kept is not None
            assert plain.kept[0].tolist() == answer.kept[0].tolist()


def test_a_plan_is_found_on_few_questions(run: Run, tmp_path: Path) -> None:
    """The verb on built-in questions: what is chosen depends on the machine's speed, but it is within the loss."""
    import saccade
    from graphs.plan_file import plan_from_file

    ask = ("tune", run.bundle, "glyphs", "--questions", 40, "-o", tmp_path, "--keep", "0.64", "--max-loss", "0.2")
    assert saccade.run([str(argument) for argument in ask]) == 0
    document = json.loads((tmp_path / "tune.json").read_text("utf-8"))
    assert (document["tuned_on"], document["reported_on"]) == (20, 20)
    assert document["baseline"]["accuracy"] >= 0.85
    best = max(one["accuracy"] for one in document["front"])
    assert best >= document["baseline"]["accuracy"]
    if document["chosen"]:
        assert document["chosen"]["accuracy"] >= document["baseline"]["accuracy"] - 0.2 - 1e-9
        assert document["reported"]["chosen"]["accuracy"] >= 0.6
        assert plan_from_file(tmp_path / "plan.toml").resolved(24).points[0].layer == 1


def is_tie(mine: np.ndarray, theirs: np.ndarray, guidance: np.ndarray) -> bool:
    """Whether two choices differ only in tokens whose guidance fp32 cannot tell apart."""
    differs = np.setxor1d(mine, theirs)
    return len(mine) == len(theirs) and np.ptp(guidance[differs]) <= TIE * max(1.0, guidance[differs].max())


def test_pruning_is_felt(run: Run) -> None:
    """The comparison above means something only where pruning changes some answers or their probabilities."""
    lowest = run.pruned[min(run.pruned)]
    assert all(a.kept is not None and len(a.kept[0]) < a.visual_tokens for a in lowest)
    assert any(a.tokens != b.tokens for a, b in zip(lowest, run.whole, strict=True))


def test_with_nothing_pruned_consistency_is_the_nth_power(run: Run) -> None:
    assert run.cascade.small
    for one in run.looked[:20]:
        whole = consistency_of(run.cascade.small, one.prompt, one.tokens, one.guidance, keep=1)
        assert whole == pytest.approx(one.confidence.confidence ** len(one.tokens), abs=1e-4)
