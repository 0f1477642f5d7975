"""The ops that tell images apart, and the merging of dropped rows: torch meaning and body against plain words."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphs.merging import recycling
from tests.policies.test_ops import SCALE, TYPES, both, carrier, contextual, drawn, softmax


def images_of(counts):
    return np.repeat(np.arange(len(counts)), counts)[None]


counts_of_images = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(counts_of_images, st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
@example([70, 3, 60], 0, np.float32)  # three pieces, images across their borders
def test_received_within_is_image_by_image(counts, seed, dtype):
    image = images_of(counts)
    q, k = drawn(1, 4, sum(counts), 3, seed=seed, dtype=dtype), drawn(1, 2, sum(counts), 3, seed=seed + 1, dtype=dtype)
    wanted = np.zeros((1, sum(counts)))
    for i in range(len(counts)):
        own = np.flatnonzero(image[0] == i)
        for h in range(4):
            logit = q[0, h, own].astype(np.float64) @ k[0, h // 2, own].astype(np.float64).T
            wanted[0, own] += softmax(logit * SCALE).sum(0)
    for (got,) in both("ReceivedWithin", ((1, 2),), q, k, image):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(counts_of_images, st.integers(0, 5), st.data(), st.integers(0, 99), st.booleans())
def test_keep_per_image_keeps_each_images_best(counts, text, data, seed, ties):
    keeps = [data.draw(st.integers(0, n)) for n in counts]
    draw = np.random.default_rng(seed)
    image = draw.permutation(np.concatenate([np.full(text, -1), images_of(counts)[0]]))
    score = draw.integers(0, 3, len(image)).astype(np.float32) if ties else drawn(len(image), seed=seed)
    if seed % 3 == 0:
        score[draw.integers(len(image))] = np.nan
    wanted = list(np.flatnonzero(image < 0))
    for i, keep in enumerate(keeps):
        own = np.flatnonzero(image == i)
        wanted += sorted(own, key=lambda r: (-np.nan_to_num(score[r], nan=-np.inf), r))[:keep]
    starts = text + np.cumsum([0, *counts[:-1]])
    pick = np.concatenate([np.arange(text), *(s + np.arange(k) for s, k in zip(starts, keeps, strict=True))])
    if len(pick):
        for (got,) in both("KeepPerImage", ((7, 2),), score[None], image[None], pick.astype(np.int64)):
            assert got.tolist() == [sorted(wanted)]


def test_keep_per_image_takes_nan_for_minus_infinity():
    score = np.array([[np.nan, -np.inf, 1, np.nan, np.finfo(np.float32).max, np.inf]], np.float32)
    for places, wanted in (([0, 1], [4, 5]), ([0], [5]), ([0, 1, 2, 3], [0, 2, 4, 5])):
        for (got,) in both("KeepPerImage", ((7, 2),), score, np.zeros((1, 6), np.int64), np.array(places)):
            assert got.tolist() == [wanted]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=3), st.data(), st.integers(0, 99))
def test_merge_context_within_is_merge_context_image_by_image(counts, data, seed):
    x, key = drawn(1, sum(counts), 3, seed=seed), drawn(1, sum(counts), 4, seed=seed + 1)
    draw, first = np.random.default_rng(seed), 0
    dominant, target, tokens, places, rests = [], [], [], [], 0
    for n in counts:
        a = data.draw(st.integers(1, n - 1))
        m = data.draw(st.integers(1, n - a))
        own = np.sort(draw.permutation(n)[:a])
        merged, kept = contextual(x[0, first : first + n].astype(np.float64), key[0, first : first + n], own, m)
        dominant.append(first + own)
        target += [rests + i * ((n - a) // m) for i in range(m)]
        tokens.append(merged)
        places += [first + p for p in kept]
        first, rests = first + n, rests + n - a
    arrays = (x, key, images_of(counts), np.concatenate(dominant)[None], np.array(target, np.int64))
    for got, kept in both("MergeContextWithin", ((1, 3), (7, 2)), *arrays):
        assert kept.tolist() == [places]
        np.testing.assert_allclose(got[0], np.concatenate(tokens), atol=1e-5)


def recycled(x, score, is_visual, keep, merges, recycles):
    """SparseVLM's recycling by its words, one row at a time, in float64; x [S, D]."""
    x = np.asarray(x, np.float64)
    order = sorted(range(len(x)), key=lambda r: (0, r) if not is_visual[r] else (1, -float(score[r]), r))
    stay, pool = order[: keep - merges], order[keep - merges :][:recycles]
    apart = [[float(np.linalg.norm(x[i] - x[j]) / x.shape[1] ** 0.5) for j in pool] for i in pool]
    # Logarithms of density and of density times gap: they rank alike, and do not underflow.
    density = [round(-float(np.mean(np.sort(np.square(row))[:merges])), 10) for row in apart]
    gap = []
    for i in range(len(pool)):
        denser = [
            apart[i][j] for j in range(len(pool)) if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        gap.append(min(denser) if denser else np.max(apart))
    peak = np.round(np.log(np.maximum(gap, 1e-300)) + density, 10)
    centres = sorted(range(len(pool)), key=lambda i: -peak[i])[:merges]
    clusters = {c: [c] for c in centres}
    for i in range(len(pool)):
        if i not in clusters:
            clusters[min(centres, key=lambda c: apart[i][c])].append(i)
    rows = {r: x[r] for r in stay} | {pool[c]: np.mean([x[pool[i]] for i in g], 0) for c, g in clusters.items()}
    gaps = [g for values in (peak, density) for g in np.diff(np.sort(values)) if g > 1e-9]
    clear = min(gaps, default=1.0) if merges < recycles else 1.0
    return np.stack([rows[r] for r in sorted(rows)]), sorted(rows), clear


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.integers(0, 5), st.data(), st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
@example(20, 3, None, 1, np.float32)
def test_merge_dropped_is_the_recycling(visual, text, data, seed, dtype):
    gone = data.draw(st.integers(1, visual)) if data else 16
    recycles = data.draw(st.integers(1, gone)) if data else 12
    merges = data.draw(st.integers(1, recycles)) if data else 3
    draw, rows = np.random.default_rng(seed), visual + text
    is_visual = np.ones(rows, bool)
    is_visual[draw.permutation(rows)[:text]] = False
    x, score = drawn(1, rows, 5, seed=seed, dtype=dtype), drawn(1, rows, seed=seed + 1)
    keep = rows - gone + merges
    wanted, places, clear = recycled(x[0].astype(np.float64), score[0], is_visual, keep, merges, recycles)
    if clear < 1e-5:
        return
    arrays = (x, score, is_visual[None], carrier(keep), carrier(merges), carrier(recycles))
    for got, kept in both("MergeDropped", ((TYPES[np.dtype(dtype)], 3), (7, 2)), *arrays):
        assert kept.tolist() == [places]
        np.testing.assert_allclose(got[0], wanted, atol=1e-5 if dtype is np.float32 else 5e-3)


@pytest.mark.parametrize("rows", [1, 5])
def test_merge_dropped_leaves_text_alone(rows):
    x = drawn(1, rows, 4, dtype=np.float16)
    arrays = (x, drawn(1, rows), np.zeros((1, rows), bool), carrier(rows), carrier(1), carrier(1))
    for got, kept in both("MergeDropped", ((10, 3), (7, 2)), *arrays):
        assert kept.tolist() == [list(range(rows))]
        assert (got == x).all()


def merge_dropped(x, score, is_visual, keep, merges, recycles):
    carriers = (carrier(keep), carrier(merges), carrier(recycles))
    return both("MergeDropped", ((1, 3), (7, 2)), x, score, is_visual, *carriers)


@pytest.mark.parametrize("seed", range(6))
def test_merge_dropped_makes_one_cluster_of_equal_rows_however_large(seed):
    """Their distance is what rounding leaves, below nought too, and still the nearest."""
    x = np.repeat(drawn(1, 3, 96, seed=seed) * 300, 6, axis=1)
    score = np.arange(18, 0, -1, dtype=np.float32)[None]
    for got, kept in merge_dropped(x, score, np.ones((1, 18), bool), 3, 3, 18):
        assert sorted(k // 6 for k in kept[0].tolist()) == [0, 1, 2]
        np.testing.assert_allclose(got[0], x[0, ::6], rtol=1e-5)


def test_merge_dropped_puts_no_score_above_text():
    x, score, is_visual = drawn(1, 8, 4), np.arange(8, dtype=np.float32)[None], np.ones((1, 8), bool)
    is_visual[0, [3, 7]] = False
    score[0, 4] = np.inf
    for got, kept in merge_dropped(x, score, is_visual, 3, 1, 2):
        at = kept[0].tolist()
        assert {3, 7} < set(at)
        assert (got[0, [at.index(3), at.index(7)]] == x[0, [3, 7]]).all()


@pytest.mark.parametrize("row", range(8))
def test_merge_dropped_takes_a_score_that_is_no_number_for_the_lowest(row):
    x, score, is_visual = drawn(1, 8, 4), drawn(1, 8, seed=1), np.ones((1, 8), bool)
    no_number = score.copy()
    score[0, row], no_number[0, row] = -9, np.nan
    wanted, wanted_kept = next(iter(merge_dropped(x, score, is_visual, 4, 1, 2)))
    assert row not in wanted_kept
    for got, kept in merge_dropped(x, no_number, is_visual, 4, 1, 2):
        assert kept.tolist() == wanted_kept.tolist()
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("before", "kept", "merge", "recycle", "wanted"),
    [
        (105, 10, 0.5, 0.29, (5, 30)),  # 0.29 · 100 is a hair below 29 in floats
        (20, 7, 0.5, 0.5, (4, 9)),
        (12, 10, 0.8, 0.1, (8, 8)),  # as many as the clusters at least
        (10, 10, 0.5, 1.0, (5, 5)),  # as many as were dropped at most
        (9, 3, 0.0, 0.5, (1, 4)),
        (0, 0, 0.5, 0.5, (1, 1)),
    ],
)
def test_clusters_are_a_share_of_the_kept_and_made_of_a_share_of_the_dropped(before, kept, merge, recycle, wanted):
    assert recycling(before, kept, merge, recycle) == wanted
