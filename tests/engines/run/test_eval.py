"""``saccade eval`` on the tiny pair: every figure against the public API, and a run that was interrupted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.cascade import Cascade
from engines.evaluation import sweep
from engines.guidance import random_guidance
from tests.conftest import Outcome
from tests.engines.run.conftest import TinyPair, picture_of, question_of
from tests.engines.run.test_calibrate import data_of

Cli = Callable[..., Outcome]
QUESTIONS = 12
COMMON = ("--max-new-tokens", 2, "--threads", 1, "--json")


@pytest.fixture
def truths(tiny_bundle: Path) -> list[str]:
    """Right on even questions is what the large model says that sees everything."""
    cascade = Cascade.open(tiny_bundle, threads=1)
    said = [
        cascade.ask(picture_of(i), question_of(i), keep=1.0, threshold=1, max_new_tokens=2).text
        for i in range(QUESTIONS)
    ]
    return [text if i % 2 == 0 and text else "nothing" for i, text in enumerate(said)]


def test_every_figure_is_that_of_the_answers(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str]
) -> None:
    out = tmp_path / "out"
    told = saccade_cli(
        "eval", tiny_bundle, data_of(tmp_path, truths), "-o", out, "--keep", "1,0.25", "--policy", "sgl,random",
        "--threshold", "0,0.5,1", "--seed", 3, *COMMON,
    )  # fmt: skip
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    cascade = Cascade.open(tiny_bundle, threads=1)
    right: dict[tuple[Any, ...], list[bool]] = {}
    scores = []
    for i in range(QUESTIONS):
        looked = cascade.look(picture_of(i), question_of(i), max_new_tokens=2)
        scores.append(looked.confidence.score)
        right.setdefault(("small",), []).append(looked.text == truths[i])
        drawn = random_guidance(64, 3 + i)
        for key, keep, guidance in (
            ((1.0, None), 1.0, None),
            ((0.25, "sgl"), 0.25, None),
            ((0.25, "random"), 0.25, drawn),
        ):
            text = cascade.ask(
                picture_of(i), question_of(i), keep=keep, threshold=1, guidance=guidance, max_new_tokens=2
            ).text
            right.setdefault(("large", *key), []).append(text == truths[i])
    found = {}
    for system in document["systems"]:
        shares = (*system["keep"], system["policy"]) if system["keep"] else ()
        bar = (system["threshold"],) if system["system"] == "cascade" else ()
        found[system["system"], *shares, *bar] = system
    assert len(found) == 1 + 3 + 3 * 3
    for key, values in right.items():
        assert found[key]["accuracy"] == pytest.approx(np.mean(values)), key
        assert found[key]["questions"] == QUESTIONS
        if key[0] == "large":
            for bar in (0, 0.5, 1):
                exits = np.array(scores) > bar
                both = found["cascade", *key[1:], bar]
                assert both["accuracy"] == pytest.approx(np.where(exits, right["small",], values).mean())
                assert both["exit_rate"] == pytest.approx(exits.mean())
    assert found["large", 0.25, "sgl"]["average_retention"] == pytest.approx((1 + 2 * 0.25) / 3)
    stages = found["large", 0.25, "sgl"]["ms_by_stage"]
    assert {"small_prefill", "small_consistency", "large_vision", "large_decode"} <= set(stages)
    assert found["large", 0.25, "sgl"]["ms_per_question"] == pytest.approx(sum(stages.values()), abs=0.02)
    assert not any(stage.startswith("small") for stage in found["large", 0.25, "random"]["ms_by_stage"])
    assert json.loads((out / "results.json").read_text()) == document
    with (out / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == [s["accuracy"] for s in document["systems"]]
    assert {row["keep"] for row in table} == {"", "1", "0.25"}


def test_an_interrupted_run_goes_on_where_it_ended(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, truths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("eval", tiny_bundle, data_of(tmp_path, truths), "-o", tmp_path / "out", "--keep", "0.5", *COMMON)
    real, asked = sweep.row_of, []

    def stops(*arguments: Any) -> Any:
        asked.append(arguments[3])
        if len(asked) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sweep, "row_of", stops)
    assert saccade_cli(*ask).code == 130
    journal = tmp_path / "out" / "answers.jsonl"
    assert not (tmp_path / "out" / "results.json").exists()
    with journal.open("a") as file:
        file.write('{"digest": "cut sho')
    told = saccade_cli(*ask)
    assert told.code == 0, told.stderr
    assert asked == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert len(journal.read_text().splitlines()) == 1 + QUESTIONS
    again = saccade_cli(*ask)
    assert len(asked) == 13
    assert json.loads(again.stdout) == json.loads(told.stdout)
    # Another threshold chooses among answers that are there; another keep ratio needs new ones.
    assert saccade_cli(*ask, "--threshold", "0.1,0.2").code == 0
    assert len(asked) == 13
    other = saccade_cli(*ask[:5], "--keep", "0.4", *COMMON)
    assert (other.code, "of another bundle, data or settings" in other.stderr) == (2, True)
    journal.write_text("{\n")
    assert saccade_cli(*ask).code == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "fastv"), "can be run with sgl and random"),
        (("--keep", "2"), "(0, 1]"),
        (("--keep", "0.5:0.2"), "2 keep ratios"),
        (("--keep", "half"), "is no number"),
        (("--threshold", "1.5"), "range"),
    ],
)
def test_refusals_ask_nothing(
    saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path, calls: list[Path], options: tuple[str, ...], words: str
) -> None:
    data = data_of(tmp_path, ["nothing"] * QUESTIONS)
    told = saccade_cli("eval", tiny_bundle, data, "-o", tmp_path / "out", *options, *COMMON)
    assert (told.code, told.stdout) == (2, "")
    assert words in told.stderr
    assert calls == []
    assert not (tmp_path / "out").exists()


def test_data_without_answers_is_refused(saccade_cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    told = saccade_cli("eval", tiny_bundle, data_of(tmp_path, None), "-o", tmp_path / "out")
    assert told.code == 2
    assert "has no answers" in told.stderr


def test_a_model_alone_and_its_own_pruning(
    saccade_cli: Cli, tiny_pair: TinyPair, tmp_path: Path, truths: list[str]
) -> None:
    from engines.bundles.build import build_bundle

    build_bundle([tiny_pair.exports["alone"]], tmp_path / "one")
    ask = ("eval", tmp_path / "one", data_of(tmp_path, truths), "-o", tmp_path / "out", *COMMON)
    told = saccade_cli(*ask, "--keep", "1,0.25")
    assert told.code == 0, told.stderr
    cascade = Cascade.open(tmp_path / "one", threads=1)
    for system, keep in zip(json.loads(told.stdout)["systems"], (1.0, 0.25), strict=True):
        said = [cascade.ask(picture_of(i), question_of(i), keep=keep, max_new_tokens=2).text for i in range(QUESTIONS)]
        assert (system["system"], system["keep"]) == ("alone", [keep])
        assert system["accuracy"] == pytest.approx(np.mean([s == t for s, t in zip(said, truths, strict=True)]))
    refused = saccade_cli(*ask, "--threshold", "0.5")
    assert (refused.code, "one model" in refused.stderr) == (2, True)


def test_settings_of_the_vision_stage_do_not_meet_in_the_cache(
    saccade_cli: Cli, tiny_pair: TinyPair, tmp_path: Path, truths: list[str]
) -> None:
    from engines.bundles.build import build_bundle
    from exporter.export import export_checkpoint

    large = tmp_path / "large"
    export_checkpoint(tiny_pair.checkpoints["large"], large, policy="divprune+sgl", role="large")
    build_bundle([tiny_pair.exports["small"], large], tmp_path / "pair")
    out = tmp_path / "out"
    told = saccade_cli(
        "eval", tmp_path / "pair", data_of(tmp_path, truths), "-o", out, "--keep", "0.5:0.1,1:1,0.25:0.25", *COMMON
    )
    assert told.code == 0, told.stderr
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()[1:]]
    cascade = Cascade.open(tmp_path / "pair", threads=1)
    for i, row in enumerate(rows):
        for keep, (name, answer) in zip(((0.5, 0.1), (1, 1), (0.25, 0.25)), row["large"].items(), strict=True):
            alone = cascade.ask(picture_of(i), question_of(i), keep=keep, threshold=1, max_new_tokens=2)
            assert (answer["text"], answer["retention"]) == (alone.text, alone.average_retention), name
