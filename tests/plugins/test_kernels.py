"""The kernels, interpreted, against the op's torch meaning and against the plain formula.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, K kept rows.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphs.errors import UsageError
from graphs.ops import OPS
from plugins.ops import SERVED
from tests.plugins.interpreted import Interpreted
from tests.plugins.plain import SCALE, TORCH, carrier, drawn, kept, received, typed

few = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def by_torch(op: str, *arrays: np.ndarray, dtype: str = "fp32", attributes: tuple[float, ...] = ()) -> np.ndarray:
    """The op's torch meaning; arrays of fp32 with four axes are first put in ``dtype``."""
    tensors = [torch.from_numpy(np.array(a)) for a in arrays]
    tensors = [t.to(TORCH[dtype]) if t.ndim == 4 else t for t in tensors]
    return OPS[op].torch_op(*tensors, *attributes).numpy()


# AttentionReceived and its kin


def attention_by_kernel(
    interpreted: Interpreted, q: np.ndarray, k: np.ndarray, third: np.ndarray, dtype: str = "fp32"
) -> np.ndarray:
    op = "RatedAttentionReceived" if third.ndim == 2 else "AttentionReceived"
    got = interpreted(op, [typed(q, dtype), typed(k, dtype), third], [SCALE])
    assert got.dtype == np.float32
    meant = by_torch(op, q, k, third, dtype=dtype, attributes=(SCALE,))
    np.testing.assert_allclose(got, meant, rtol=1e-4, atol=1e-5)
    return got


def ones(q: np.ndarray, guides: int) -> np.ndarray:
    return np.ones((q.shape[0], guides), np.float32)


@st.composite
def attention_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    groups, share, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    rows, past, batch = draw(st.integers(1, 20)), draw(st.integers(0, 40)), draw(st.integers(1, 2))
    guides = draw(st.integers(1, rows))
    return (batch, groups * share, rows, width), (batch, groups, past + rows, width), guides


@few
@given(attention_shapes(), st.integers(0, 99), st.sampled_from(["fp32", "fp16", "bf16"]))
@example(((1, 2, 1, 4), (1, 1, 1, 4), 1), 0, "fp32")  # one row, one key
@example(((1, 4, 1, 4), (1, 2, 9, 4), 1), 0, "bf16")  # a decode step on a past
def test_attention_received_is_its_formula(interpreted, shapes, seed, dtype):
    q_shape, k_shape, guides = shapes
    q, k = drawn(*q_shape, seed=seed, dtype=dtype), drawn(*k_shape, seed=seed + 1, dtype=dtype)
    got = attention_by_kernel(interpreted, q, k, carrier(guides), dtype)
    np.testing.assert_allclose(got, received(q, k, ones(q, guides)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "held", "capacity", "guides"), [(1, 0, 1, 1), (1, 40, 70, 1), (5, 30, 35, 3), (33, 31, 150, 20)]
)
def test_received_in_a_cache_is_that_of_its_filled_rows(interpreted, rows, held, capacity, guides, dtype):
    q, k = drawn(1, 4, rows, 8, dtype=dtype), drawn(1, 2, capacity, 8, seed=1, dtype=dtype)
    filled = held + rows
    wanted = np.zeros((2, 1, capacity))
    weight = np.random.default_rng(2).random((1, guides), np.float32)
    wanted[0, :, :filled] = received(q, k[:, :, :filled], ones(q, guides))
    wanted[1, :, :filled] = received(q, k[:, :, :filled], weight)
    k[:, :, filled:] = np.nan  # what lies there is never read
    length, typed_q, typed_k = np.array([held]), typed(q, dtype), typed(k, dtype)
    for op, third, want in zip(
        ("ReceivedInCache", "RatedReceivedInCache"), (carrier(guides), weight), wanted, strict=True
    ):
        got = interpreted(op, [typed_q, typed_k, third, length], [SCALE])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert (got[:, filled:] == 0).all()


@pytest.mark.parametrize(
    ("heads", "groups", "rows", "keys", "guides", "width"),
    [(6, 2, 70, 150, 67, 8), (4, 4, 33, 64, 33, 16), (3, 1, 5, 129, 1, 80), (2, 1, 3, 65, 2, 256), (1, 1, 2, 2, 2, 1)],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_attention_received_over_several_blocks(interpreted, heads, groups, rows, keys, guides, width, dtype):
    q, k = drawn(1, heads, rows, width, dtype=dtype), drawn(1, groups, keys, width, seed=1, dtype=dtype)
    got = attention_by_kernel(interpreted, q, k, carrier(guides), dtype)
    np.testing.assert_allclose(got, received(q, k, ones(q, guides)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.sum(), heads * guides, rtol=1e-5)


@few
@given(attention_shapes(), st.integers(0, 99))
def test_rated_attention_received_is_its_formula(interpreted, shapes, seed):
    q_shape, k_shape, guides = shapes
    q, k = drawn(*q_shape, seed=seed), drawn(*k_shape, seed=seed + 1)
    weight_BG = drawn(q_shape[0], guides, seed=seed + 2)
    got = attention_by_kernel(interpreted, q, k, weight_BG)
    np.testing.assert_allclose(got, received(q, k, weight_BG), rtol=1e-3, atol=1e-4)


def test_sums_are_fp32_where_fp16_could_not_hold_them(interpreted):
    q, k = np.zeros((1, 48, 16, 4), np.float32), np.zeros((1, 1, 16, 4), np.float32)
    got = attention_by_kernel(interpreted, q, k, carrier(16), "fp16")
    assert got.max() > 128
    np.testing.assert_allclose(got, received(q, k, ones(q, 16)), rtol=1e-5)


def test_logits_of_any_size_are_survived(interpreted):
    q, k = drawn(1, 2, 4, 4, spread=1e4), drawn(1, 1, 70, 4, seed=1, spread=1e4)
    np.testing.assert_allclose(attention_by_kernel(interpreted, q, k, carrier(3)).sum(), 2 * 3, rtol=1e-5)


def test_equal_logits_share_equally(interpreted):
    q, k = np.zeros((1, 2, 1, 16), np.float32), drawn(1, 1, 100, 16)
    np.testing.assert_allclose(attention_by_kernel(interpreted, q, k, carrier(1)), np.full((1, 100), 0.02), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_no_number_makes_the_whole_row_none(interpreted, bad, where):
    # As a plain softmax has it: every key of such a row, hidden ones too. An infinite product of both signs is NaN.
    q, k = np.abs(drawn(1, 2, 4, 4)), np.abs(drawn(1, 1, 70, 4, seed=1))
    (q if where == "q" else k)[0, 0, 3, 1] = bad
    assert np.isnan(attention_by_kernel(interpreted, q, k, carrier(2))).all()


def test_a_block_of_minus_infinity_before_a_finite_one_is_no_nan(interpreted):
    q, k = np.full((1, 1, 2, 1), 1e30, np.float32), np.full((1, 1, 70, 1), -1e30, np.float32)
    k[0, 0, 66] = 0
    got = attention_by_kernel(interpreted, q, k, carrier(2))
    assert got[0].tolist() == [2.0 if t == 66 else 0.0 for t in range(70)]


def test_the_same_bits_every_time(interpreted):
    q, k, guide = typed(drawn(1, 4, 70, 8), "fp16"), typed(drawn(1, 2, 90, 8, seed=1), "fp16"), carrier(69)
    first, second = (interpreted("AttentionReceived", [q, k, guide], [SCALE]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("types", "shapes", "said"),
    [
        (("fp16", "fp16", "i32"), ((1, 2, 3, 257), (1, 2, 3, 257), (1,)), "257 wide"),
        (("fp16", "fp32", "i32"), ((1, 2, 3, 8), (1, 2, 3, 8), (1,)), ""),
        (("i64", "i64", "i32"), ((1, 2, 3, 8), (1, 2, 3, 8), (1,)), ""),
    ],
)
def test_what_no_attention_kernel_takes_is_refused(types, shapes, said):
    served = SERVED["AttentionReceived"]
    if said:
        with pytest.raises(UsageError, match=said):
            served.variants(types, shapes)
    else:
        assert not served.accepts(types)


# KeepTopK


def both_keep(interpreted: Interpreted, score: np.ndarray, is_visual: np.ndarray, keep: int) -> np.ndarray:
    """The kernel's rows, which must be the torch meaning's and the plain rule's."""
    got = interpreted("KeepTopK", [score, is_visual, carrier(keep)])
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, by_torch("KeepTopK", score, is_visual, carrier(keep)))
    np.testing.assert_array_equal(got, kept(score, is_visual, keep))
    return got


ODD = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 3e38, 3.4028235e38, 1e-40, -1e-40, np.inf, -np.inf, np.nan])


@st.composite
def scored_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    score = draw(hnp.arrays(np.float32, shape, elements=ODD | st.floats(-4, 4, width=16)))
    return score, draw(hnp.arrays(bool, shape)), draw(st.integers(1, shape[1]))


@settings(few, max_examples=80)
@given(scored_rows())
def test_keep_topk_is_its_rule(interpreted, case):
    both_keep(interpreted, *case)


@pytest.mark.parametrize(
    ("rows", "keep"), [(1, 1), (2, 1), (1024, 7), (1025, 1025), (4097, 3841), (16384, 5000), (16384, 16384)]
)
def test_keep_topk_of_many_rows(interpreted, rows, keep):
    # Scores rounded to eighths, so that ties lie across every block and at the limit.
    score = np.round(drawn(2, rows, seed=rows) * 8) / 8
    is_visual = np.random.default_rng(rows).random((2, rows)) < 0.9
    both_keep(interpreted, score.astype(np.float32), is_visual, keep)


@pytest.mark.parametrize("value", [0.25, -0.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("keep", [1, 500, 576])
def test_of_equal_scores_the_lower_index_stays(interpreted, value, keep):
    score, is_visual = np.full((1, 576), value, np.float32), np.ones((1, 576), bool)
    assert both_keep(interpreted, score, is_visual, keep)[0].tolist() == list(range(keep))


def test_text_stays_and_nan_ranks_with_minus_infinity(interpreted):
    score = np.array([[-np.inf, np.inf, np.nan, 3.4028235e38, -np.inf, np.inf, np.nan]], np.float32)
    is_visual = np.array([[False, True, False, True, True, True, True]])
    rows = [both_keep(interpreted, score, is_visual, keep)[0].tolist() for keep in (2, 3, 4, 5, 6)]
    assert rows == [[0, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_more_rows_than_the_kernel_takes_are_refused(interpreted):
    with pytest.raises(UsageError, match="16385 rows"):
        interpreted("KeepTopK", [np.zeros((1, 16385), np.float32), np.ones((1, 16385), bool), carrier(1)])


# CompactRows


@few
@given(
    st.integers(1, 2),
    st.integers(1, 12),
    st.lists(st.integers(1, 5), max_size=2),
    st.sampled_from([np.float32, np.float16, np.int64, np.int32, np.bool_]),
    st.data(),
)
def test_compact_rows_takes_the_kept_rows(interpreted, batch, rows, trailing, dtype, data):
    x = (np.arange(batch * rows * int(np.prod(trailing))) % (2 if dtype == np.bool_ else 1000)).astype(dtype)
    x = x.reshape(batch, rows, *trailing)
    count = data.draw(st.integers(1, rows))
    at = np.array([sorted(data.draw(st.permutations(range(rows)))[:count]) for _ in range(batch)], np.int64)
    got = interpreted("CompactRows", [x, at])
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, np.stack([x[b][at[b]] for b in range(batch)]))
    np.testing.assert_array_equal(got, by_torch("CompactRows", x, at) if x.ndim != 4 else got)


def test_compact_rows_over_several_blocks_moves_bits(interpreted):
    x = np.random.default_rng(0).integers(0, 2**16, (1, 9, 515), dtype=np.uint16)  # as bf16, NaN among them
    at = np.array([[0, 2, 3, 7, 8]], np.int64)
    np.testing.assert_array_equal(interpreted("CompactRows", [x, at]), x[:, at[0]])


def test_rows_are_moved_in_the_widest_words_that_divide_them():
    elements = [SERVED["CompactRows"].variants((t, "i64"), ((1, 9, d), (1, 3)))[0].element
                for t, d in (("fp16", 64), ("fp16", 6), ("bf16", 5), ("i1", 1), ("fp16", -1), ("i64", 1))]  # fmt: skip
    assert elements == ["i64", "i32", "i16", "i8", "i16", "i64"]


# The ops in a row, as a decoder has them


def test_the_kernels_of_a_prune_point_keep_the_rows_of_the_op(interpreted):
    q, k = drawn(1, 4, 40, 8, dtype="fp16"), drawn(1, 2, 40, 8, seed=1, dtype="fp16")
    is_visual = np.array([[2 <= s < 30 for s in range(40)]])
    score = attention_by_kernel(interpreted, q, k, carrier(10), "fp16")
    meant = by_torch("AttentionReceived", q, k, carrier(10), dtype="fp16", attributes=(SCALE,))
    rows = both_keep(interpreted, score, is_visual, 20)
    np.testing.assert_array_equal(rows, kept(meant, is_visual, 20))
