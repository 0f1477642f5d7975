"""The policies' ops: torch meaning and ONNX body against the formula written plainly, in float64, here."""

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphs.ops import DOMAIN, OPS, VERSION
from graphs.ops.op import BODY_OPSET

SCALE = 0.37
TYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.float16): 10,
    np.dtype(np.int64): 7,
    np.dtype(np.int32): 6,
    np.dtype(bool): 9,
}


@cache
def session_of(name, kinds, outs):
    body = OPS[name].function

    def value(label, kind):
        return onnx.helper.make_tensor_value_info(label, kind[0], [f"{label}_{i}" for i in range(kind[1])])

    node = onnx.helper.make_node(
        name, list(body.input), list(body.output), domain=DOMAIN, **dict.fromkeys(body.attribute, SCALE)
    )
    graph = onnx.helper.make_graph(
        [node],
        "one_op",
        [value(n, k) for n, k in zip(body.input, kinds, strict=True)],
        [value(n, k) for n, k in zip(body.output, outs, strict=True)],
    )
    opsets = [onnx.helper.make_opsetid("", BODY_OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=11)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def both(name, outs, *arrays):
    """The op's outputs by torch, and by ONNX Runtime."""
    kinds = tuple((TYPES[a.dtype], a.ndim) for a in arrays)
    feed = dict(zip(OPS[name].function.input, arrays, strict=True))
    attributes = [SCALE] * len(OPS[name].function.attribute)
    by_torch = OPS[name].torch_op(*(torch.from_numpy(np.array(a)) for a in arrays), *attributes)
    by_torch = by_torch if isinstance(by_torch, tuple) else (by_torch,)
    yield [t.numpy() for t in by_torch]
    yield session_of(name, kinds, outs).run(None, feed)


def drawn(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def carrier(length):
    return np.full(length, 7, np.int32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def received(q, k, weights, causal):
    """One row at a time; weights [B, G] of the last G rows."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    (batch, heads, rows, _), (_, groups, keys, _), guides = q.shape, k.shape, weights.shape[1]
    out = np.zeros((batch, keys))
    for b in range(batch):
        for h in range(heads):
            for g in range(guides):
                seen = keys - guides + g + 1 if causal else keys
                logit = k[b, h // (heads // groups), :seen] @ q[b, h, rows - guides + g] * SCALE
                out[b, :seen] += weights[b, g] * softmax(logit)
    return out


@st.composite
def attention_shapes(draw):
    groups, times, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows, past, batch = draw(st.integers(1, 9)), draw(st.integers(0, 9)), draw(st.integers(1, 2))
    guides = draw(st.integers(1, rows))
    return (batch, groups * times, rows, width), (batch, groups, past + rows, width), guides


@settings(max_examples=25, deadline=None)
@given(attention_shapes(), st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
@example(((1, 2, 130, 4), (1, 1, 135, 4), 129), 0, np.float32)  # three pieces, the last of one row
def test_received_by_weight_and_from_all(shapes, seed, dtype):
    q_shape, k_shape, guides = shapes
    q, k = drawn(*q_shape, seed=seed, dtype=dtype), drawn(*k_shape, seed=seed + 1, dtype=dtype)
    weights = np.random.default_rng(seed).integers(0, 3, (q_shape[0], guides)).astype(np.float32)
    for (got,) in both("RatedAttentionReceived", ((1, 2),), q, k, weights):
        np.testing.assert_allclose(got, received(q, k, weights, causal=True), rtol=1e-4, atol=1e-5)
    everyone = np.ones((q_shape[0], q_shape[2]))
    for (got,) in both("ReceivedFromAll", ((1, 2),), q, k):
        np.testing.assert_allclose(got, received(q, k, everyone, causal=False), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 12), st.data(), st.integers(0, 99))
def test_text_raters(batch, rows, data, seed):
    guides = data.draw(st.integers(1, rows))
    x = drawn(batch, rows, 5, seed=seed)
    is_visual = np.random.default_rng(seed).random((batch, rows)) < 0.5
    is_visual[:, rows - guides :] = False
    relevance = np.stack(
        [
            softmax(x[b].astype(np.float64) @ x[b, rows - guides :].T.astype(np.float64))[is_visual[b]].sum(0)
            for b in range(batch)
        ]
    )
    mean = relevance.mean(1, keepdims=True)
    clear = np.abs(relevance - mean) > 1e-5
    for (got,) in both("TextRaters", ((1, 2),), x, is_visual, carrier(guides)):
        assert (got == (relevance >= mean))[clear].all()
        assert got.sum(1).min() >= 1
        if not is_visual.any():
            assert got.all()


@pytest.mark.parametrize("visual", [5, 64, 576])
def test_of_guide_rows_that_are_alike_one_rates_at_least(visual):
    """The mean of equal numbers may round above them."""
    for guides in range(2, 20):
        x = np.concatenate([drawn(1, visual, 32), np.repeat(0.02 * drawn(1, 1, 32, seed=1), guides, 1)], 1)
        is_visual = np.arange(visual + guides)[None] < visual
        for (got,) in both("TextRaters", ((1, 2),), x, is_visual, carrier(guides)):
            assert got.any()


def contextual(x, key, dominant, merges):
    """VisionZip's code, in numpy, one image; dominant as a set."""
    rest = [v for v in range(len(x)) if v not in set(dominant)]
    stride = len(rest) // merges
    targets = [i * stride for i in range(merges)]
    unit = key[rest] / np.linalg.norm(key[rest], axis=1, keepdims=True)
    groups = {t: [] for t in targets}
    for r in range(len(rest)):
        if r not in groups:
            groups[targets[int(np.argmax(unit[targets] @ unit[r]))]].append(x[rest[r]])
    tokens = {rest[t]: x[rest[t]] + (np.mean(g, axis=0) if g else 0) for t, g in groups.items()}
    tokens |= {int(d): x[d] for d in dominant}
    places = sorted(tokens)
    return np.stack([tokens[p] for p in places]), places


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.integers(2, 20), st.data(), st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
@example(1, 5, None, 0, np.float32)
def test_merge_context(batch, tokens, data, seed, dtype):
    dominants = data.draw(st.integers(1, tokens - 1)) if data else 3
    merges = data.draw(st.integers(1, tokens - dominants)) if data else 2
    x, key = drawn(batch, tokens, 3, seed=seed, dtype=dtype), drawn(batch, tokens, 4, seed=seed + 1)
    draw = np.random.default_rng(seed)
    dominant = np.stack([np.sort(draw.permutation(tokens)[:dominants]) for _ in range(batch)])
    wanted = [contextual(x[b].astype(np.float64), key[b].astype(np.float64), dominant[b], merges) for b in range(batch)]
    outs = ((TYPES[np.dtype(dtype)], 3), (7, 2))
    for merged, kept in both("MergeContext", outs, x, key, dominant, carrier(merges)):
        assert kept.tolist() == [places for _, places in wanted]
        np.testing.assert_allclose(merged, np.stack([t for t, _ in wanted]), atol=1e-5 if dtype is np.float32 else 5e-3)


@pytest.mark.parametrize(("nought", "other"), [(3, 1), (1, 3)])
def test_a_key_of_zeros_is_like_no_other(nought, other):
    """Of two targets one has such a key; whoever is like the other one joins that, whichever comes first."""
    x, key = drawn(1, 6, 3), drawn(1, 6, 4, seed=1)
    key[0, [2, 4]] = key[0, other]
    key[0, nought] = 0
    wanted = x[0].copy()
    wanted[other] += (x[0, 2] + x[0, 4]) / 2
    for merged, kept in both("MergeContext", ((1, 3), (7, 2)), x, key, np.array([[0, 5]]), carrier(2)):
        assert kept.tolist() == [[0, 1, 3, 5]]
        np.testing.assert_allclose(merged[0], wanted[[0, 1, 3, 5]], atol=1e-6)


def merged_pairs(x, size, place, key, keep):
    """ToMe's step, in numpy, one image, by its words: lists of what each token holds."""
    unit = key / np.linalg.norm(key, axis=1, keepdims=True)
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    ties = []
    for i in a:
        likeness = [float(unit[i] @ unit[j]) for j in b]
        ties.append((max(likeness), i, b[int(np.argmax(likeness))]))
    can = sorted((t for t in ties if place[t[1]] >= 0), key=lambda t: -t[0])[: len(x) - keep]
    held = {j: [j] for j in b}
    for _, i, j in can:
        held[j].append(i)
    gone = {i for _, i, _ in can}
    rows = [[i] for i in a if i not in gone] + [held[j] for j in b]
    new_size = np.array([sum(size[i] for i in row) for row in rows])
    new_x = np.stack([sum(x[i] * size[i] for i in row) for row in rows]) / new_size[:, None]
    return new_x, new_size, [int(place[row[0]]) for row in rows]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.integers(3, 21), st.data(), st.integers(0, 99), st.booleans())
@example(1, 5, None, 0, True)
def test_merge_pairs(batch, tokens, data, seed, has_class):
    fewest = tokens // 2 + 1
    keep = data.draw(st.integers(fewest, tokens)) if data else fewest
    x, key = drawn(batch, tokens, 3, seed=seed), drawn(batch, tokens, 4, seed=seed + 1)
    size = np.random.default_rng(seed).integers(1, 5, (batch, tokens)).astype(np.float32)
    place = np.tile(np.arange(tokens), (batch, 1)) - has_class
    wanted = [
        merged_pairs(x[b].astype(np.float64), size[b], place[b], key[b].astype(np.float64), keep) for b in range(batch)
    ]
    for got, got_size, got_place in both("MergePairs", ((1, 3), (1, 2), (7, 2)), x, size, place, key, carrier(keep)):
        assert got_place.tolist() == [p for _, _, p in wanted]
        np.testing.assert_allclose(got, np.stack([w for w, _, _ in wanted]), atol=1e-5)
        np.testing.assert_allclose(got_size, np.stack([s for _, s, _ in wanted]))
        assert got_size.sum() == pytest.approx(size.sum())


def test_a_key_of_zeros_is_like_no_other_and_gives_no_nan():
    x, key = drawn(1, 6, 4), drawn(1, 6, 4, seed=1)
    key[0, [2, 3]] = 0
    size, place = np.ones((1, 6), np.float32), np.arange(6)[None]
    found = list(both("MergePairs", ((1, 3), (1, 2), (7, 2)), x, size, place, key, carrier(4)))
    for (got, got_size, got_place), (wanted, _, wanted_place) in zip(found, reversed(found), strict=True):
        assert np.isfinite(got).all()
        assert got_size.sum() == 6
        assert got_place.tolist() == wanted_place.tolist()
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("name", sorted(OPS))
def test_no_body_has_a_shape_that_depends_on_data(name):
    """TensorRT's parsers know no NonZero, Unique, Compress or If over shapes."""
    assert not {n.op_type for n in OPS[name].function.node} & {
        "NonZero",
        "Unique",
        "Compress",
        "If",
        "NonMaxSuppression",
    }
