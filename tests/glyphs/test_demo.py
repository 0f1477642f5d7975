"""The demo on a few questions, through the command line, and the arithmetic behind its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glyphs.systems import RETENTIONS, Parity, Tally
from glyphs.threshold import chosen_threshold


@pytest.mark.slow
def test_the_demo_gives_its_document(saccade_cli, tmp_path: Path) -> None:
    outcome = saccade_cli("demo", "-o", str(tmp_path / "demo"), "--questions", "6", "--json")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["schema"] == "saccade.demo/1"
    assert document["questions"] == 6
    assert document["parity"]["tokens_equal"] == 1
    assert document["parity"]["answers_compared"] == 12
    assert document["parity"]["max_abs_logit_diff"] < 1e-3
    systems = {row["name"]: row for row in document["systems"]}
    sources = ("guided by small", "random tokens", "one layer of small")
    pruned = {f"large {r:.0%}, {s}": r for r in RETENTIONS for s in sources}
    alone = {"small alone", "large alone", "cascade", "HF generate, small", "HF generate, large"}
    assert set(systems) == alone | set(pruned)
    for name, row in systems.items():
        assert 0 <= row["accuracy"] <= 1
        assert row["ms_per_question"] > 0
        if name in pruned:
            assert row["average_retention"] == pytest.approx(pruned[name], abs=1e-3)
            assert (row["prune_layer"], 0 < row["keep"] < 1) == (1, True)
    assert systems["HF generate, large"]["accuracy"] == systems["large alone"]["accuracy"]
    assert 0 <= systems["cascade"]["exit_rate"] <= 1
    with Image.open(document["picture"]) as picture:
        assert picture.format == "PNG"
    assert "cascade" in outcome.stdout


def test_a_tally_counts_right_answers_exits_and_the_median() -> None:
    tally = Tally("cascade")
    for right, ms, exited in ((True, 1.0, True), (False, 3.0, False), (True, 20.0, False), (True, 4.0, True)):
        tally.add(right, ms, exited)
    row = tally.document()
    assert (row["accuracy"], row["exit_rate"], row["ms_per_question"]) == (0.75, 0.5, 3.5)
    assert row["ms_per_question_mean"] == 7.0


def test_parity_keeps_the_largest_difference() -> None:
    parity = Parity()
    parity.add((1, 2), (1, 2), np.zeros(3), np.array([0, 0.5, 0]))
    parity.add((1, 2), (1, 3), np.zeros(3), np.array([0, 0.25, 0]))
    assert parity.document() == {"tokens_equal": 0.5, "max_abs_logit_diff": 0.5, "answers_compared": 2}


def test_the_chosen_threshold_is_the_least_of_highest_accuracy() -> None:
    score = np.array([0.2, 0.4, 0.6, 0.8])
    small = np.array([False, False, True, True])
    large = np.array([True, True, True, False])
    threshold, accuracy, exits = chosen_threshold(score, small, large)
    assert (threshold, accuracy, exits) == (0.5, 1.0, 0.5)


def test_a_small_model_that_is_never_right_is_never_believed() -> None:
    score = np.array([0.2, 0.9])
    threshold, accuracy, exits = chosen_threshold(score, np.zeros(2, bool), np.ones(2, bool))
    assert (threshold, accuracy, exits) == (1.0, 1.0, 0.0)
