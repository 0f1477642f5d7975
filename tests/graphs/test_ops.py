"""Each op's torch meaning and ONNX body against the formula written plainly, in float64, here.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, K kept rows.
"""

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator

from graphs.ops import DOMAIN, OPS, VERSION
from graphs.ops.op import BODY_OPSET

FLOAT, HALF, INT64, INT32, BOOL = 1, 10, 7, 6, 9
SCALE = 0.37
NUMPY = {FLOAT: np.float32, HALF: np.float16, INT64: np.int64, INT32: np.int32, BOOL: bool}


@cache
def model_of(name: str, kinds: tuple[tuple[int, int], ...], out: tuple[int, int]) -> onnx.ModelProto:
    """One node of ours and its body; ``kinds`` is (element type, rank) per input, ``out`` the output's."""
    body = OPS[name].function

    def value(label: str, kind: tuple[int, int]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(label, kind[0], [f"{label}_{i}" for i in range(kind[1])])

    attributes = dict.fromkeys(body.attribute, SCALE)
    node = onnx.helper.make_node(name, list(body.input), list(body.output), domain=DOMAIN, **attributes)
    inputs = [value(n, k) for n, k in zip(body.input, kinds, strict=True)]
    graph = onnx.helper.make_graph([node], "one_op", inputs, [value(body.output[0], out)])
    opsets = [onnx.helper.make_opsetid("", BODY_OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=11)


@cache
def session_of(name: str, kinds: tuple[tuple[int, int], ...], out: tuple[int, int]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model_of(name, kinds, out).SerializeToString(), options)


def by_onnxruntime(name: str, out: tuple[int, int], *arrays: np.ndarray) -> np.ndarray:
    kinds = tuple((onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.ndim) for a in arrays)
    session = session_of(name, kinds, out)
    return session.run(None, dict(zip(OPS[name].function.input, arrays, strict=True)))[0]


def by_onnx_reference(name: str, out: tuple[int, int], *arrays: np.ndarray) -> np.ndarray:
    kinds = tuple((onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.ndim) for a in arrays)
    evaluator = ReferenceEvaluator(model_of(name, kinds, out))
    return evaluator.run(None, dict(zip(OPS[name].function.input, arrays, strict=True)))[0]


def by_torch(name: str, *arrays: np.ndarray, attributes: tuple[float, ...] = ()) -> np.ndarray:
    return OPS[name].torch_op(*(torch.from_numpy(np.array(a)) for a in arrays), *attributes).numpy()


def carrier(length: int) -> np.ndarray:
    """Its values must never be read."""
    return np.full(length, 7, np.int32)


# AttentionReceived


def received(q: np.ndarray, k: np.ndarray, guides: int) -> np.ndarray:
    """Σ over heads and guide rows of the softmax row, one row at a time."""
    q, k = q.astype(np.float64), k.astype(np.float64)
    (batch, heads, rows, _), (_, groups, keys, _) = q.shape, k.shape
    out = np.zeros((batch, keys))
    for b in range(batch):
        for h in range(heads):
            for g in range(guides):
                seen = keys - guides + g + 1
                logit = k[b, h // (heads // groups), :seen] @ q[b, h, rows - guides + g] * SCALE
                share = np.exp(logit - logit.max())
                out[b, :seen] += share / share.sum()
    return out


def drawn(*shape: int, seed: int = 0, dtype: type = np.float32, spread: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(dtype)


@st.composite
def attention_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    groups, share, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows, past, batch = draw(st.integers(1, 9)), draw(st.integers(0, 9)), draw(st.integers(1, 2))
    guides = draw(st.integers(1, rows))
    return (batch, groups * share, rows, width), (batch, groups, past + rows, width), guides


@settings(max_examples=60, deadline=None)
@given(attention_shapes(), st.integers(0, 99), st.sampled_from([np.float32, np.float16]))
@example(((1, 2, 1, 4), (1, 1, 1, 4), 1), 0, np.float32)  # one row, one key
@example(((1, 4, 1, 4), (1, 2, 9, 4), 1), 0, np.float32)  # a decode step on a past
def test_attention_received_is_its_formula(shapes, seed, dtype):
    q_shape, k_shape, guides = shapes
    q, k = drawn(*q_shape, seed=seed, dtype=dtype), drawn(*k_shape, seed=seed + 1, dtype=dtype)
    wanted = received(q, k, guides)
    np.testing.assert_allclose(wanted.sum(), q_shape[0] * q_shape[1] * guides, rtol=1e-9)
    for got in (
        by_torch("AttentionReceived", q, k, carrier(guides), attributes=(SCALE,)),
        by_onnxruntime("AttentionReceived", (FLOAT, 2), q, k, carrier(guides)),
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guides", [1, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("past", [0, 5])
def test_attention_received_over_several_pieces(guides, past):
    rows = guides + 3
    q, k = drawn(1, 4, rows, 8, seed=guides), drawn(1, 2, past + rows, 8, seed=guides + 1)
    wanted = received(q, k, guides)
    got = by_onnxruntime("AttentionReceived", (FLOAT, 2), q, k, carrier(guides))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    eager = by_torch("AttentionReceived", q, k, carrier(guides), attributes=(SCALE,))
    np.testing.assert_allclose(eager, wanted, rtol=1e-4, atol=1e-5)


def test_attention_received_sums_in_fp32_what_fp16_could_not_hold():
    # Sums above 128, where fp16 counts in eighths.
    q, k = np.zeros((1, 24, 130, 4), np.float16), np.zeros((1, 24, 130, 4), np.float16)
    wanted = received(q, k, 130)
    assert wanted.max() > 128
    for got in (
        by_torch("AttentionReceived", q, k, carrier(130), attributes=(SCALE,)),
        by_onnxruntime("AttentionReceived", (FLOAT, 2), q, k, carrier(130)),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_attention_received_survives_logits_of_any_size():
    q, k = drawn(1, 2, 4, 4, spread=1e4), drawn(1, 1, 6, 4, seed=1, spread=1e4)
    got = by_onnxruntime("AttentionReceived", (FLOAT, 2), q, k, carrier(3))
    np.testing.assert_allclose(got.sum(), 2 * 3, rtol=1e-5)
    np.testing.assert_allclose(got, by_torch("AttentionReceived", q, k, carrier(3), attributes=(SCALE,)), atol=1e-4)


@pytest.mark.parametrize("guides", [1, 5, 66])
def test_attention_received_by_onnx_itself(guides):
    q, k = drawn(1, 4, guides + 1, 4), drawn(1, 2, guides + 4, 4, seed=1)
    got = by_onnx_reference("AttentionReceived", (FLOAT, 2), q, k, carrier(guides))
    np.testing.assert_allclose(got, received(q, k, guides), rtol=1e-4, atol=1e-5)


# KeepTopK


def kept(score: np.ndarray, is_visual: np.ndarray, keep: int) -> np.ndarray:
    """Text before visual, then the higher score, then the lower index; in order."""
    out = []
    for row, visual in zip(score, is_visual, strict=True):

        def place(i: int, row: np.ndarray = row, visual: np.ndarray = visual) -> tuple[bool, float, int]:
            return bool(visual[i]), np.inf if np.isnan(row[i]) else -float(row[i]), i

        out.append(sorted(sorted(range(len(row)), key=place)[:keep]))
    return np.array(out, np.int64)


def both_keep(score: np.ndarray, is_visual: np.ndarray, keep: int) -> np.ndarray:
    """What the torch meaning and the body give, which must be the same."""
    got = by_onnxruntime("KeepTopK", (INT64, 2), score, is_visual, carrier(keep))
    eager = by_torch("KeepTopK", score, is_visual, carrier(keep))
    assert got.dtype == eager.dtype == np.int64
    np.testing.assert_array_equal(got, eager)
    return got


FEW = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 3e38, 1e-40, np.inf, -np.inf, np.nan])


@st.composite
def scored_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 40)))
    score = draw(hnp.arrays(np.float32, shape, elements=FEW | st.floats(-4, 4, width=16)))
    is_visual = draw(hnp.arrays(bool, shape))
    text = int((~is_visual).sum(1).max())
    return score, is_visual, draw(st.integers(max(1, text), shape[1]))


@settings(max_examples=120, deadline=None)
@given(scored_rows())
def test_keep_topk_is_its_rule(case):
    score, is_visual, keep = case
    got = both_keep(score, is_visual, keep)
    np.testing.assert_array_equal(got, kept(score, is_visual, keep))
    for row, visual in zip(got, is_visual, strict=True):
        assert set(np.flatnonzero(~visual)) <= set(row.tolist())
        assert (np.diff(row) > 0).all()


@pytest.mark.parametrize("keep", [1, 3, 500, 576, 4000])
def test_of_equal_scores_the_lower_index_stays(keep):
    rows = max(keep, 576)
    score, is_visual = np.full((1, rows), 0.25, np.float32), np.ones((1, rows), bool)
    assert both_keep(score, is_visual, keep)[0].tolist() == list(range(keep))


def test_text_stays_whatever_the_scores():
    score = np.array([[-np.inf, np.inf, np.nan, 3.4028235e38, -5.0, np.inf]], np.float32)
    is_visual = np.array([[False, True, False, True, False, True]])
    assert both_keep(score, is_visual, 3).tolist() == [[0, 2, 4]]
    # An infinite visual score and the largest finite one tie, below text and above all else.
    assert both_keep(score, is_visual, 4).tolist() == [[0, 1, 2, 4]]
    assert both_keep(score, is_visual, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_nan_ranks_below_every_number():
    score = np.array([[np.nan, -3e38, np.nan, 0.0]], np.float32)
    assert both_keep(score, np.ones((1, 4), bool), 2).tolist() == [[1, 3]]
    assert both_keep(score, np.ones((1, 4), bool), 3).tolist() == [[0, 1, 3]]


def test_one_row_and_all_rows_are_the_identity():
    assert both_keep(np.zeros((1, 1), np.float32), np.zeros((1, 1), bool), 1).tolist() == [[0]]
    assert both_keep(np.full((1, 1), np.nan, np.float32), np.ones((1, 1), bool), 1).tolist() == [[0]]
    score = drawn(2, 7)
    assert both_keep(score, score > 0, 7).tolist() == [list(range(7))] * 2


@settings(max_examples=25, deadline=None)
@given(scored_rows())
def test_keep_topk_by_onnx_itself(case):
    # onnx's own TopK leaves ties open, so the scores are made different.
    score, is_visual, keep = case
    score = np.arange(score.size, dtype=np.float32).reshape(score.shape)[:, ::-1] * np.float32(0.5)
    text = (~is_visual).sum(1)
    if (text > 1).any():
        is_visual = np.ones_like(is_visual)
    got = by_onnx_reference("KeepTopK", (INT64, 2), np.ascontiguousarray(score), is_visual, carrier(keep))
    np.testing.assert_array_equal(got, kept(score, is_visual, keep))


# CompactRows


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 12),
    st.lists(st.integers(1, 4), max_size=2),
    st.sampled_from([FLOAT, HALF, INT64, BOOL]),
    st.data(),
)
def test_compact_rows_takes_the_kept_rows(batch, rows, trailing, kind, data):
    x = np.arange(batch * rows * int(np.prod(trailing))).reshape(batch, rows, *trailing)
    x = (x % 2).astype(bool) if kind == BOOL else x.astype(NUMPY[kind])
    count = data.draw(st.integers(1, rows))
    chosen = [sorted(data.draw(st.permutations(range(rows)))[:count]) for _ in range(batch)]
    rows_kept = np.array(chosen, np.int64)
    wanted = np.stack([x[b][rows_kept[b]] for b in range(batch)])
    for got in (
        by_torch("CompactRows", x, rows_kept),
        by_onnxruntime("CompactRows", (kind, x.ndim), x, rows_kept),
        by_onnx_reference("CompactRows", (kind, x.ndim), x, rows_kept),
    ):
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, wanted)


# The bodies as functions

QK_IN_CACHE = (torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 9, 8))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_body_is_a_whole_function(op):
    onnx.checker.check_function(op.function)
    assert op.function.domain == DOMAIN
    assert op.function.name == op.name
    assert {(o.domain, o.version) for o in op.function.opset_import} == {("", BODY_OPSET)}


def test_a_model_with_all_bodies_passes_the_checker():
    kinds = {
        "AttentionReceived": (((FLOAT, 4), (FLOAT, 4), (INT32, 1)), (FLOAT, 2)),
        "KeepTopK": (((FLOAT, 2), (BOOL, 2), (INT32, 1)), (INT64, 2)),
        "CompactRows": (((FLOAT, 3), (INT64, 2)), (FLOAT, 3)),
        "RatedAttentionReceived": (((FLOAT, 4), (FLOAT, 4), (FLOAT, 2)), (FLOAT, 2)),
        "ReceivedFromAll": (((FLOAT, 4), (FLOAT, 4)), (FLOAT, 2)),
        "ReceivedWithin": (((FLOAT, 4), (FLOAT, 4), (INT64, 2)), (FLOAT, 2)),
        "KeepPerImage": (((FLOAT, 2), (INT64, 2), (INT64, 1)), (INT64, 2)),
        "TextRaters": (((FLOAT, 3), (BOOL, 2), (INT32, 1)), (FLOAT, 2)),
        "BlockAttention": (((FLOAT, 4), (FLOAT, 4), (FLOAT, 4), (BOOL, 2)), (FLOAT, 4)),
        "ReceivedInCache": (((FLOAT, 4), (FLOAT, 4), (INT32, 1), (INT64, 1)), (FLOAT, 2)),
        "RatedReceivedInCache": (((FLOAT, 4), (FLOAT, 4), (FLOAT, 2), (INT64, 1)), (FLOAT, 2)),
    }
    # These are run whole by tests/policies/test_ops.py and test_packed_ops.py.
    several_outputs = {"MergeContext", "MergePairs", "MergeContextWithin", "MergeDropped"}
    assert set(kinds) | several_outputs == set(OPS)
    for name, (inputs, out) in kinds.items():
        onnx.checker.check_model(model_of(name, inputs, out), full_check=True)


def test_names_are_unique_and_no_standard_ops():
    # TensorRT-RTX looks functions up by name alone, ignoring the domain.
    standard = {s.name for s in onnx.defs.get_all_schemas_with_history()}
    names = [op.function.name for op in OPS.values()]
    assert len(set(names)) == len(names)
    assert not standard & set(names)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_fake_of_an_op_has_its_shape_and_dtype(op):
    arguments = {
        "AttentionReceived": (torch.zeros(1, 4, 5, 8).half(), torch.zeros(1, 2, 9, 8).half(), torch.zeros(3), 0.5),
        "KeepTopK": (torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool), torch.zeros(3)),
        "CompactRows": (torch.zeros(1, 5, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)),
        "RatedAttentionReceived": (torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 9, 8), torch.ones(1, 3), 0.5),
        "ReceivedFromAll": (torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 9, 8), 0.5),
        "ReceivedInCache": (*QK_IN_CACHE, torch.zeros(3), torch.tensor([2]), 0.5),
        "RatedReceivedInCache": (*QK_IN_CACHE, torch.ones(1, 3), torch.tensor([2]), 0.5),
        "TextRaters": (torch.zeros(1, 5, 8), torch.ones(1, 5, dtype=torch.bool), torch.zeros(3)),
        "MergeContext": (torch.ones(1, 6, 8), torch.ones(1, 6, 4), torch.tensor([[1, 4]]), torch.zeros(2)),
        "MergePairs": (
            torch.ones(1, 6, 8),
            torch.ones(1, 6),
            torch.arange(6)[None],
            torch.ones(1, 6, 4),
            torch.zeros(4),
        ),
        "BlockAttention": (*torch.zeros(3, 2, 4, 5, 8), torch.ones(2, 5, dtype=torch.bool), 0.5),
        "KeepPerImage": (torch.zeros(1, 5), torch.tensor([[-1, 0, 0, 1, -1]]), torch.tensor([0, 1, 2, 4])),
        "ReceivedWithin": (
            torch.zeros(1, 4, 5, 8),
            torch.zeros(1, 2, 5, 8),
            torch.tensor([[0, 0, 1, 1, 1]]),
            0.5,
        ),
        "MergeContextWithin": (
            torch.ones(1, 6, 8),
            torch.ones(1, 6, 4),
            torch.tensor([[0, 0, 0, 1, 1, 1]]),
            torch.tensor([[0, 3]]),
            torch.tensor([0, 2]),
        ),
        "MergeDropped": (
            torch.rand(1, 6, 8),
            torch.rand(1, 6),
            torch.ones(1, 6, dtype=torch.bool),
            torch.zeros(4),
            torch.zeros(2),
            torch.zeros(3),
        ),
    }[op.name]
    torch.library.opcheck(op.torch_op, arguments, test_utils=("test_schema", "test_faketensor"))
