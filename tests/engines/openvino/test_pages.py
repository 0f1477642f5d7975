"""Attention over a cache in blocks, held to the formula in numpy: chunks of any length on any past, in fp32 and bf16.

Legend: H query heads, V key-value heads, d head width, S rows of a chunk, T keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper

from engines.sessions.openvino_graph import read_graph
from engines.sessions.openvino_pages import BLOCK, Pages

SCALE = 0.3
SEGMENT, PAST_K, PAST_V = "P_0", "past_k_0", "past_v_0"


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal, aligned at the end: [1, H, S, d]."""
    together, rows, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logit = SCALE * q.astype(np.float64) @ np.repeat(k, together, 1).astype(np.float64).swapaxes(2, 3)
    logit[..., np.arange(keys) > np.arange(keys - rows, keys)[:, None]] = -np.inf
    share = np.exp(logit - logit.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    mixed: np.ndarray = share @ np.repeat(v, together, 1)
    return mixed


def settings(precision: str) -> dict[str, Any]:
    return {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision, "INFERENCE_NUM_THREADS": 1}


def one_layer(folder: Any, heads: int, groups: int, width: int) -> Any:
    """A decoder of one attention, as the exporter writes it."""
    f, value = TensorProto.FLOAT, helper.make_tensor_value_info
    sizes = {
        "q": (heads, "S"),
        "k": (groups, "S"),
        "v": (groups, "S"),
        PAST_K: (groups, SEGMENT),
        PAST_V: (groups, SEGMENT),
    }
    inputs = [value(name, f, [1, count, rows, width]) for name, (count, rows) in sizes.items()]
    grown = [value(name, f, [1, groups, "P_0 + S", width]) for name in ("present_k_0", "present_v_0")]
    names = ["q", "k", "v", "", PAST_K, PAST_V]
    node = helper.make_node("Attention", names, ["out", "present_k_0", "present_v_0"], is_causal=1, scale=SCALE)
    graph = helper.make_graph([node], "g", inputs, [value("out", f, [1, heads, "S", width]), *grown])
    file = folder / "decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), file)
    return file


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("f32", ov.Type.f32, 1e-5), ("bf16", ov.Type.bf16, 3e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize(("heads", "groups", "width"), [(14, 2, 64), (4, 2, 8), (3, 1, 24), (4, 4, 12), (2, 1, 128)])
def test_chunks_on_a_past(
    heads: int, groups: int, width: int, precision: str, dtype: Any, tolerance: float, tmp_path: Any
) -> None:
    """Blocks grow, lengths change, and a conversation that begins with a copy goes on alike."""
    core = ov.Core()
    read = read_graph(core, one_layer(tmp_path, heads, groups, width), dtype)
    assert read.segments == {SEGMENT: (PAST_K, PAST_V)}
    compiled = core.compile_model(read.model, "CPU", settings(precision))
    pages = Pages(compiled.create_infer_request(), read.segments)
    rng = np.random.default_rng(0)
    pages.fill(SEGMENT, dict.fromkeys((PAST_K, PAST_V), np.zeros((1, groups, 0, width), np.float32)))
    k = v = np.zeros((1, groups, 0, width), np.float32)
    for i, rows in enumerate((BLOCK + 7, 1, 2 * BLOCK - 8, 1, 5 * BLOCK, 3)):
        q, *new = (rng.standard_normal((1, n, rows, width)).astype(np.float32) for n in (heads, groups, groups))
        k, v = np.concatenate([k, new[0]], 2), np.concatenate([v, new[1]], 2)
        pages.hold(SEGMENT, k.shape[2] - rows, k.shape[2])
        pages.request.infer({"q": q, "k": new[0], "v": new[1]})
        np.testing.assert_allclose(pages.request.get_tensor("out").data, attention(q, k, v), atol=tolerance)
        held = {name: pages.rows(name, k.shape[2]) for name in (PAST_K, PAST_V)}
        np.testing.assert_allclose(held[PAST_K], k, rtol=0 if precision == "f32" else 8e-3)
        if i == 3:
            pages = Pages(compiled.create_infer_request(), read.segments)
            pages.fill(SEGMENT, held)
            np.testing.assert_array_equal(pages.rows(PAST_V, v.shape[2]), held[PAST_V])


def test_what_a_failed_run_left_is_gone(tmp_path: Any) -> None:
    """A zero share of a row behind the filled ones is multiplied too, so no such row may hold NaN."""
    core = ov.Core()
    read = read_graph(core, one_layer(tmp_path, 2, 1, 8), ov.Type.f32)
    pages = Pages(core.compile_model(read.model, "CPU", settings("f32")).create_infer_request(), read.segments)
    for number in (np.nan, 1.0):
        pages.fill(SEGMENT, dict.fromkeys((PAST_K, PAST_V), np.zeros((1, 1, 0, 8), np.float32)))
        rows = 40 if np.isnan(number) else 3
        pages.hold(SEGMENT, 0, rows)
        q, k = (np.full((1, n, rows, 8), number, np.float32) for n in (2, 1))
        pages.request.infer({"q": q, "k": k, "v": k})
        assert np.isnan(pages.request.get_tensor("out").data).all() == np.isnan(number)
    assert np.isfinite(pages.request.get_tensor("out").data).all()
