"""Findings: the passes against SGL from its formulas and transformers' generate, the arithmetic, and the tables."""

from __future__ import annotations

import json
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from glyphs import train
from glyphs.checkpoint import PAIR
from glyphs.findings.exits import curve, resampled_areas
from glyphs.findings.guidance import Cut, Source, cuts_of, shares_of
from glyphs.findings.models import best_visual
from glyphs.findings.overlap import common, rank_correlation
from glyphs.findings.star import FIRST, Shape, received, rights, shapes
from glyphs.findings.statistics import holm, paired, share
from glyphs.findings.tables import BLOCK, PAGES, RESULTS, TABLES, filled
from glyphs.findings.work import Work
from graphs.plan import average_retention
from tests.reference_sgl import Reference

N = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield Work(tmp_path_factory.mktemp("findings"), {"large": PAIR / "large", "small": PAIR / "small"}, N)


@pytest.fixture(scope="module")
def cases(work):
    return [(q.image, q.question) for q in work.questions]


@pytest.fixture(scope="module")
def small():
    return Reference(PAIR / "small")


def said(work, name):
    return [[t for t in row if t >= 0] for row in work.heard(name).tokens.tolist()]


def test_answers_are_generates_and_maps_and_scores_are_the_formulas(work, cases, small):
    heard = work.heard("small")
    assert said(work, "small") == small.generate(cases, 9)
    batch, answers = small.batch(cases), said(work, "small")
    whole = small.scored(batch, answers)
    scores = heard.scores(tuple(range(6)), "both")
    np.testing.assert_allclose(scores, whole.guidance, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.exp(np.nanmean(heard.log_prob, 1)), whole.confidence(), atol=1e-4)
    for k, count in enumerate((7, 28)):
        pruned = small.scored(batch, answers, list(best_visual(np.array(whole.guidance), count)), 0)
        np.testing.assert_allclose(np.exp(heard.consistency[:, k]), pruned.product(), atol=1e-4)
    entropy = [float((-p * np.log(p)).sum(-1).mean()) for p in map(softmax, whole.logits)]
    np.testing.assert_allclose(np.nanmean(heard.entropy, 1), entropy, atol=1e-4)


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_rows_and_layers_add_up_to_the_whole_map(work):
    heard = work.heard("small")
    whole = heard.scores(tuple(range(6)), "both")
    parts = [heard.scores((i,), rows) for i, rows in product(range(6), ("prompt", "generated"))]
    np.testing.assert_allclose(np.sum(parts, 0), whole, rtol=1e-5)
    assert (heard.scores((0,), "last") <= heard.scores((0,), "prompt") + 1e-6).all()


@pytest.mark.parametrize(("layer", "count"), [(1, 7), (0, 4), (4, 28)])
def test_a_pruned_answer_is_right_where_the_formulas_say_so(work, cases, large, layer, count):
    kept = best_visual(np.random.default_rng(layer).random((N, 144)), count)
    gold = work.gold.said
    found = large.scored(large.batch(cases), gold, list(kept), layer)
    assert work.pruned(kept, layer).tolist() == [a == b for a, b in zip(found.best, gold, strict=True)]


@pytest.fixture(scope="module")
def large():
    return Reference(PAIR / "large")


def test_stage_1_is_its_formula(work):
    h = work.seer("large").visual_NVD[0].double().numpy()
    np.testing.assert_allclose(received(work.seer("large").visual_NVD[:1])[0], softmax(h @ h.T / 8).mean(0), rtol=1e-4)


def test_stage_2_alone_goes_by_the_map_of_the_layer_before_the_cut(work):
    shape = Shape(0.35, 1.0, 5)
    kept = best_visual(work.heard("large").scores((4,), "prompt"), shape.counts(24, 144)[1])
    assert rights(work, shape, np.zeros((N, 144)), drawn=False).tolist() == work.pruned(kept, 5).tolist()


def test_a_draw_in_two_stages_keeps_the_best_of_the_draw(work):
    shape, draw = Shape(0.35, 1.0, 5), np.random.default_rng(0).random((N, 144))
    two = best_visual(draw, shape.counts(24, 144)[1])
    assert rights(work, shape, draw, drawn=True).tolist() == work.pruned(two, 5).tolist()


@pytest.mark.parametrize("budget", FIRST)
def test_every_way_spends_the_budget_and_no_more(budget):
    for name, shape in shapes(budget).items():
        if name.endswith("a token more"):
            assert budget < shape.retention(24, 144) < budget + 0.1 / 144
            continue
        assert budget - 1.1 / 144 < shape.retention(24, 144) <= budget
        assert shape.counts(24, 144)[1] <= shape.counts(24, 144)[0]


def test_a_setting_is_computed_once_even_behind_a_line_that_was_cut_off(work):
    source, cut = Source("small", (0,)), Cut(1, 0.05, 7, 0.09)
    first = source.rights(work, cut)
    with work.journal.open("a", encoding="utf-8") as journal:
        journal.write('{"key": "cut o')
    again = Work(work.folder, work.checkpoints, N)
    again.pruned = lambda *_: pytest.fail("computed twice")
    assert source.rights(again, cut).tolist() == first.tolist()
    assert again.rights("another", lambda: np.ones(N, bool)).all()
    third = Work(work.folder, work.checkpoints, N)
    assert third.rights("another", lambda: pytest.fail("computed twice")).all()


def test_the_cuts_have_the_retentions_that_they_are_called_by():
    for cut in cuts_of(24, 144):
        assert average_retention(24, cut.layer, cut.keep) == pytest.approx(cut.retention)
    assert [(cut.layer, cut.count) for cut in cuts_of(24, 144)] == [(1, 89), (1, 46), (1, 7), (0, 7), (0, 4)]
    assert shares_of(6)["first 1/2"] == (0, 1, 2)
    assert shares_of(6)["last 1/3"] == (4, 5)


def test_intervals_and_paired_tests_are_the_textbooks():
    assert share(np.arange(10) < 8)["low"] == pytest.approx(0.4439, abs=1e-4)
    assert share(np.arange(10) < 8)["high"] == pytest.approx(0.9748, abs=1e-4)
    a, b = np.arange(20) < 9, (np.arange(20) >= 7) & (np.arange(20) < 10)
    test = paired(a, b)
    assert (test["only_first"], test["only_second"], test["difference"]) == (7, 1, 0.3)
    assert test["p"] == pytest.approx(2 * sum(comb(8, k) for k in (0, 1)) / 2**8)
    tests = [{"p": 0.01}, {"p": 0.04}, {"p": 0.03}]
    holm(tests)
    assert [t["p_holm"] for t in tests] == [0.03, 0.06, 0.06]


def test_a_curve_counts_calls_from_the_least_sure_and_its_area_is_that_of_the_resamples():
    score, small = np.array([0.9, 0.1, 0.5, 0.7]), np.array([True, False, True, False])
    large = np.array([True, True, False, True])
    line = curve(score, small, large)
    assert line.tolist() == [0.5, 0.75, 0.5, 0.75, 0.75]
    order, weight = np.argsort(score), np.array([[1, 1, 1, 1], [0, 2, 1, 1]])
    found = resampled_areas(order, small, large, weight)
    twice = curve(score[[1, 1, 2, 3]], small[[1, 1, 2, 3]], large[[1, 1, 2, 3]])
    np.testing.assert_allclose(found, [line.mean(), twice.mean()])


def test_overlap_and_rank_correlation_by_hand():
    a, b = np.array([[4.0, 3, 2, 1]]), np.array([[1.0, 4, 3, 2]])
    assert common(a, b, 2).tolist() == [0.5]
    assert rank_correlation(a, b) == pytest.approx([1 - 6 * (9 + 1 + 1 + 1) / (4 * 15)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_committed_tables_are_those_of_the_committed_results(page):
    text = page.read_text("utf-8")
    assert BLOCK.search(text)
    assert filled(text, json.loads(RESULTS.read_text("utf-8"))) == text, "run: python -m glyphs.findings.tables"


def test_every_table_is_shown_somewhere():
    shown = {name for page in PAGES for name in BLOCK.findall(page.read_text("utf-8"))}
    assert shown == set(TABLES)


def test_another_seed_is_trained_elsewhere(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(train, "train", lambda *call: calls.append(call))
    train.main(["small", "--here", "--seed", "2", "--to", str(tmp_path)])
    train.main(["large", "--here"])
    [(plan, run, folder), shipped] = calls
    assert (plan.name, plan.seed, folder) == ("small", 2, tmp_path)
    assert run != train.RUN
    assert shipped == (train.PLANS["large"], train.RUN, Path(PAIR))
    with pytest.raises(SystemExit):
        train.main(["small", "--seed", "2"])
    assert "--to DIR" in capsys.readouterr().err
