"""``saccade calibrate`` on the tiny pair: what it writes, when it holds, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundles.build import build_bundle
from engines.bundles.bundle import open_bundle
from engines.bundles.manifest import MANIFEST_FILE, manifest_of
from engines.calibration import calibrate as calibration
from engines.calibration.learn import grid
from engines.calibration.promise import tied_keep
from engines.cascade import Cascade
from engines.evaluation.data import data_from_records
from graphs.plan import PrunePoint, PruningPlan
from tests.conftest import Outcome
from tests.engines.run.conftest import TinyPair, picture_of, question_of

Cli = Callable[..., Outcome]
QUESTIONS = 12
PROMISE = ("--max-loss", 0.3, "--confidence", 0.8, "--max-new-tokens", 2, "--threads", 1)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "pair.bundle"))


@pytest.fixture
def asked(tiny_bundle: Path) -> list[dict[str, Any]]:
    """Both models' answers to each question, by the public API."""
    cascade, rows = Cascade.open(tiny_bundle, threads=1), []
    for seed in range(QUESTIONS):
        looked = cascade.look(picture_of(seed), question_of(seed), max_new_tokens=2)
        large = cascade.answer_large(looked)
        full = cascade.ask(picture_of(seed), question_of(seed), keep=1.0, threshold=1, max_new_tokens=2)
        rows.append({"S": looked.confidence.score, "small": looked.text, "large": large.text, "full": full.text})
    return rows


def data_of(folder: Path, answers: list[str] | None) -> Path:
    lines = []
    for seed in range(QUESTIONS):
        picture_of(seed).save(folder / f"{seed}.png")
        line: dict[str, Any] = {"image": f"{seed}.png", "question": question_of(seed)}
        lines.append(json.dumps(line | ({"answer": answers[seed] or "nothing"} if answers else {})))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


def expected(score: np.ndarray, loss: np.ndarray, bound: float = 0.3, confidence: float = 0.8) -> float:
    """The walk, written once more as it is told in the paper."""
    best, n = 1.0, len(score)
    for level in grid():
        k = int(loss[score > level].sum())
        p = sum(math.comb(n, i) * bound**i * (1 - bound) ** (n - i) for i in range(k + 1))
        if p > 1 - confidence:
            break
        best = float(level)
    return best


@pytest.mark.parametrize("baseline", ["pruned", "full"])
def test_with_answers_and_what_the_manifest_says(
    saccade_cli: Cli, bundle: Path, asked: list[dict[str, Any]], tmp_path: Path, baseline: str
) -> None:
    before = manifest_of(bundle)
    beside = [row["full" if baseline == "full" else "large"] for row in asked]
    # The large model is right on the odd questions.
    truths = [text if i % 2 else "w" for i, text in enumerate(beside)]
    told = saccade_cli(
        "calibrate", bundle, data_of(tmp_path, truths), *PROMISE, "--baseline", baseline, "--metric", "exact", "--json"
    )
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    known = [truth or "nothing" for truth in truths]
    right = {
        name: np.array([row[name] == t for row, t in zip(asked, known, strict=True)]) for name in ("small", "large")
    }
    above = np.array([text == t for text, t in zip(beside, known, strict=True)])
    score, loss = np.array([row["S"] for row in asked]), above & ~right["small"]
    threshold = expected(score, loss)
    found = document["calibration"]
    assert found["threshold"] == threshold
    assert found["losses"] == loss[score > threshold].sum()
    assert found["exit_rate"] == document["exit_rate"] == pytest.approx((score > threshold).mean())
    assert document["accuracy"]["baseline"] == pytest.approx(above.mean(), abs=1e-4)
    assert document["accuracy"]["cascade"] == pytest.approx(
        np.where(score > threshold, right["small"], right["large"]).mean(), abs=1e-4
    )
    assert document["ms_per_question"]["cascade"] <= document["ms_per_question"]["never_exit"]

    manifest = open_bundle(bundle).manifest
    assert manifest.sha256 == document["manifest_sha256"] != before.sha256
    assert manifest.model_copy(update={"calibrations": (), "sha256": before.sha256}) == before
    assert manifest.calibrations[0].model_dump(mode="json") == found
    tied = {"target": "cpu", "precision": {"small": "float32", "large": "float32"}, "max_new_tokens": 2}
    promised = {"max_loss": 0.3, "confidence": 0.8, "metric": "exact", "baseline": baseline, "questions": QUESTIONS}
    assert found.items() >= (tied | promised | {"test": "binomial"}).items()
    assert f"exit threshold {threshold:g}, with confidence 0.8" in saccade_cli("show", bundle).stdout


def test_graded_losses_are_bounded_by_hoeffding_and_bentkus(
    saccade_cli: Cli, bundle: Path, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The loss is how much more the large model's answer is worth; both formulas stand here once more."""
    truths = [row["large"] or "nothing" if i % 2 else f"{row['large']} x" for i, row in enumerate(asked)]
    told = saccade_cli("calibrate", bundle, data_of(tmp_path, truths), *PROMISE, "--metric", "anls")
    assert told.code == 0, told.stderr
    loss = np.array([max(0.0, anls(r["large"], t) - anls(r["small"], t)) for r, t in zip(asked, truths, strict=True)])
    assert ((loss > 0) & (loss < 1)).any(), "choose answers of which some are half right"
    score, n = np.array([row["S"] for row in asked]), QUESTIONS
    best = 1.0
    for level in grid():
        total = loss[score > level].sum()
        mean = min(total / n, 0.3)
        h = (mean * math.log(mean / 0.3) if mean else 0) + (1 - mean) * math.log((1 - mean) / 0.7)
        tail = sum(math.comb(n, i) * 0.3**i * 0.7 ** (n - i) for i in range(math.ceil(total) + 1))
        if min(1, math.exp(-n * h), math.e * tail) > 0.2:
            break
        best = float(level)
    [found] = manifest_of(bundle).calibrations
    assert (found.test, found.metric, found.threshold) == ("hoeffding-bentkus", "anls", best)
    assert found.losses == pytest.approx(loss[score > best].sum())


def anls(answer: str, truth: str) -> float:
    """1 − Levenshtein / longer, from a half on, over a whole table."""
    table = np.arange(len(truth) + 1)
    for i, a in enumerate(answer, 1):
        row = [i]
        for j, b in enumerate(truth, 1):
            row.append(min(table[j] + 1, row[-1] + 1, table[j - 1] + (a != b)))
        table = np.array(row)
    worth = 1 - table[-1] / max(len(answer), len(truth), 1)
    return float(worth) if worth >= 0.5 else 0.0


def test_without_answers_a_difference_is_a_loss(
    saccade_cli: Cli, bundle: Path, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    told = saccade_cli("calibrate", bundle, data_of(tmp_path, None), *PROMISE)
    assert told.code == 0, told.stderr
    loss = np.array([row["small"] != row["large"] for row in asked])
    [found] = manifest_of(bundle).calibrations
    assert found.threshold == expected(np.array([row["S"] for row in asked]), loss)
    assert found.metric == "agreement"
    assert ("never exit" in told.stdout) == (found.threshold == 1)


def test_an_exit_that_is_better_than_the_baseline_loses_nothing() -> None:
    data = data_from_records([{"image": picture_of(0), "question": "red ?", "answer": "right"}], "one")
    for small, baseline, loss in (("right", "wrong", 0), ("wrong", "wrong", 0), ("wrong", "right", 1)):
        outcome = calibration.Outcome(0.9, small, baseline, baseline, 2, 10)
        assert calibration.losses_of([outcome], data.examples, "exact").tolist() == [loss]


def test_only_an_exit_spares_the_large_models_time() -> None:
    outcomes = [calibration.Outcome(score, "a", "a", "a", 2, 10) for score in (0.9, 0.5)]
    for threshold, ms in ((0.4, 2), (0.5, 7), (0.95, 12)):
        told = calibration.gains(outcomes, (), None, threshold)["ms_per_question"]
        assert told == {"cascade": ms, "never_exit": 12}


def test_opening_a_models_sessions_is_no_time_of_a_question(cascade: Cascade) -> None:
    answer = cascade.ask(picture_of(0), "red ?", max_new_tokens=1)
    answer = replace(answer, milliseconds={"large_open": 100.0, "large_prefill": 3.0, "small_prefill": 9.0})
    assert (answer.spent("large"), answer.spent()) == (3, 12)


def test_no_question_hangs_on_the_one_before(
    saccade_cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused = []

    def noted(cascade: Cascade, *_: object) -> calibration.Outcome:
        reused.append(cascade.reuses_beginnings)
        return calibration.Outcome(0.5, "a", "a", "a", 1.0, 1.0)

    monkeypatch.setattr(calibration, "outcome_of", noted)
    assert saccade_cli("calibrate", bundle, data_of(tmp_path, None), *PROMISE).code == 0
    assert reused == [False] * (1 + QUESTIONS)


def test_a_plan_of_counts_is_tied_to_no_share() -> None:
    plan = PruningPlan(name="counts", points=(PrunePoint(layer=1, score="priority", count=8),))
    assert tied_keep(plan, None) is None
    assert tied_keep(plan, 0.5) == (0.5,)


def test_run_uses_it_under_the_same_conditions_only(saccade_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    # Nothing the small model says is worse than the truth "nothing", so every threshold is accepted.
    told = saccade_cli("calibrate", bundle, data_of(tmp_path, ["nothing"] * QUESTIONS), *PROMISE)
    assert told.code == 0, told.stderr
    ask = ("run", bundle, "--image", tmp_path / "0.png", question_of(0), "--json", "--threads", 1)

    def run(*options: object) -> tuple[dict[str, Any], str]:
        got = saccade_cli(*ask, *options)
        assert got.code == 0, got.stderr
        return json.loads(got.stdout), got.stderr

    answer, said = run("--max-new-tokens", 2)
    assert (answer["threshold"], answer["exited"], said) == (0, True, "")
    assert answer["calibration"]["max_loss"] == 0.3
    answer, said = run("--max-new-tokens", 2, "--threshold", 0.5)
    assert (answer["threshold"], answer["calibration"], said) == (0.5, None, "")
    for options, why in {
        ("--max-new-tokens", 2, "--keep", 0.5): "keep",
        ("--max-new-tokens", 3): "max_new_tokens 2 and this question uses 3",
        (): "max_new_tokens 2 and this question uses the default (calibrate with that too)",
        ("--max-new-tokens", 2, "--temperature", 1): "temperature 0 and",
        ("--max-new-tokens", 2, "--repetition-penalty", 1.2): "repetition_penalty",
        ("--max-new-tokens", 2, "--stop", "x"): "stop none",
    }.items():
        answer, said = run(*options)
        assert answer["calibration"] is None
        assert answer["threshold"] == (0.9 if answer["model"] else None)
        assert why in said
        assert said.endswith("the threshold from its build is used\n")


def test_it_is_said_once_and_not_used_where_the_guidance_or_the_bundle_is_another(
    saccade_cli: Cli, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saccade_cli("calibrate", bundle, data_of(tmp_path, ["nothing"] * QUESTIONS), *PROMISE).code == 0
    cascade = Cascade.open(bundle, threads=1)
    capsys.readouterr()
    guidance = np.ones(64, np.float32)
    for _ in range(2):
        answer = cascade.ask(picture_of(0), question_of(0), guidance=guidance, max_new_tokens=2)
        assert answer.calibration is None
    assert capsys.readouterr().err.count("this question's guidance is not the small model's") == 1
    assert cascade.chat(max_new_tokens=2).ask(question_of(0), picture_of(0)).threshold == 0.9
    assert "not for a conversation" in capsys.readouterr().err
    assert cascade.promises is not None
    cascade.promises.target = "rtx"
    assert cascade.ask(picture_of(0), question_of(0), max_new_tokens=2).calibration is None
    assert "calibrated for target cpu and this question uses rtx" in capsys.readouterr().err


def test_one_calibration_for_each_condition_and_the_newest_stays(
    saccade_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    data = data_of(tmp_path, ["nothing"] * QUESTIONS)
    for options in ((), ("--keep", 0.5), ("--max-loss", 0.25)):
        told = saccade_cli("calibrate", bundle, data, *PROMISE, *options)
        assert told.code == 0, told.stderr
    assert [c.max_loss for c in manifest_of(bundle).calibrations] == [0.3, 0.25]
    assert manifest_of(bundle).calibrations[0].keep == (0.5,)


def test_never_exit_is_a_result(
    saccade_cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "losses_of", lambda outcomes, *_: np.ones(len(outcomes)))
    monkeypatch.setattr(calibration, "outcome_of", lambda *_: calibration.Outcome(1.0, "a", "b", "b", 1.0, 1.0))
    told = saccade_cli("calibrate", bundle, data_of(tmp_path, None), *PROMISE)
    assert (told.code, told.stdout[:11]) == (0, "never exit:")
    assert manifest_of(bundle).calibrations[0].threshold == 1
    assert manifest_of(bundle).calibrations[0].exit_rate == 0


def test_the_old_manifest_stays_whole(
    saccade_cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = data_of(tmp_path, None), (bundle / MANIFEST_FILE).read_bytes()
    outcome = calibration.Outcome(0.5, "a", "a", "a", 1.0, 1.0)

    def changed(*_: object) -> calibration.Outcome:
        (bundle / MANIFEST_FILE).write_text(manifest_of(bundle).model_copy(update={"threshold": 0.8}).signed().dumps())
        return outcome

    def full(partial: Path, *_: object) -> None:
        assert partial.parent == tmp_path  # a bundle with a file that is not listed cannot be opened
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(calibration, "outcome_of", lambda *_: outcome)
        patched.setattr(Path, "write_text", full)
        told = saccade_cli("calibrate", bundle, data, *PROMISE)
    assert told.code == 1
    assert "disk is full" in told.stderr
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert open_bundle(bundle).manifest.calibrations == ()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []

    monkeypatch.setattr(calibration, "outcome_of", changed)
    told = saccade_cli("calibrate", bundle, data, *PROMISE)
    assert told.code == 1
    assert "was changed while the questions were asked" in told.stderr
    assert (manifest_of(bundle).threshold, manifest_of(bundle).calibrations) == (0.8, ())


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--max-loss", 0.02), 2, "12 distinct questions are too few"),
        (("--max-loss", 1), 2, "strictly between 0 and 1"),
        (("--confidence", "nan"), 2, "strictly between 0 and 1"),
        (("--metric", "anls"), 2, "has no answers"),
        (("--keep", 2), 2, "(0, 1]"),
        (("--questions", 3), 2, "3 distinct questions are too few"),
    ],
)
def test_refusals_ask_nothing_and_write_nothing(
    saccade_cli: Cli,
    bundle: Path,
    tmp_path: Path,
    calls: list[Path],
    options: tuple[object, ...],
    code: int,
    words: str,
) -> None:
    before = (bundle / MANIFEST_FILE).read_bytes()
    told = saccade_cli("calibrate", bundle, data_of(tmp_path, None), *PROMISE, *options)
    assert (told.code, told.stdout) == (code, "")
    assert words in told.stderr
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert calls == []


def test_a_question_that_stands_there_again_counts_once(
    saccade_cli: Cli, bundle: Path, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    data = data_of(tmp_path, [row["large"] for row in asked])
    once = json.loads(saccade_cli("calibrate", bundle, data, *PROMISE, "--json").stdout)["calibration"]
    data.write_text("\n".join(3 * [data.read_text()]))
    told = saccade_cli("calibrate", bundle, data, *PROMISE, "--json")
    assert json.loads(told.stdout)["calibration"] == once
    assert f"{2 * QUESTIONS} of {3 * QUESTIONS} questions are repeats" in told.stderr
    data.write_text("\n".join(200 * data.read_text().splitlines()[:1]))
    refused = saccade_cli("calibrate", bundle, data, *PROMISE)
    assert (refused.code, "1 distinct questions are too few" in refused.stderr) == (2, True)


def test_a_bundle_that_cannot_be_changed_is_refused_before_anything_is_asked(
    saccade_cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "outcome_of", lambda *_: pytest.fail("a question was asked"))
    was = (bundle / MANIFEST_FILE).read_bytes()

    def refuses(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with monkeypatch.context() as mounted:
        mounted.setattr(Path, "replace", refuses)
        told = saccade_cli("calibrate", bundle, data_of(tmp_path, ["x"] * QUESTIONS), *PROMISE)
    assert told.code == 2
    assert "cannot be changed" in told.stderr
    assert (bundle / MANIFEST_FILE).read_bytes() == was
    assert not list(tmp_path.glob(".*partial*"))


def test_a_bundle_of_one_model_has_no_choice(saccade_cli: Cli, tiny_pair: TinyPair, tmp_path: Path) -> None:
    build_bundle([tiny_pair.exports["alone"]], tmp_path / "one")
    told = saccade_cli("calibrate", tmp_path / "one", data_of(tmp_path, None), *PROMISE)
    assert told.code == 2
    assert "one model" in told.stderr


def test_eval_warns_where_it_asks_what_the_threshold_was_found_on(
    saccade_cli: Cli, bundle: Path, tmp_path: Path
) -> None:
    """The built-in questions are others for `eval`, so it has nothing to warn of there."""
    few, said = ("--max-new-tokens", 2, "--threads", 1), "calibrated on these very questions"
    data = data_of(tmp_path, ["nothing"] * QUESTIONS)
    for asked, warned in ((data, True), ("glyphs", False)):
        number = ("--questions", QUESTIONS)
        assert saccade_cli("calibrate", bundle, asked, *PROMISE, *number).code == 0
        told = saccade_cli("eval", bundle, asked, *few, *number, "-o", tmp_path / f"out-{warned}")
        assert told.code == 0, told.stderr
        assert (said in told.stderr) == warned


def test_bad_lines_are_counted_and_built_in_questions_are_asked(saccade_cli: Cli, bundle: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path, None)
    data.write_text(data.read_text() + "\n{")
    told = saccade_cli("calibrate", bundle, data, *PROMISE)
    assert told.code == 3
    assert "line 13" in told.stderr
    told = saccade_cli("calibrate", bundle, data, *PROMISE, "--skip-bad", "--json")
    assert told.code == 0
    assert "warning: left out:" in told.stderr
    assert len(json.loads(told.stdout)["bad"]) == 1
    told = saccade_cli("calibrate", bundle, "glyphs", *PROMISE, "--questions", 8, "--json")
    assert told.code == 0, told.stderr
    assert json.loads(told.stdout)["calibration"]["questions"] == 8
