"""Every op's body in OpenVINO against its torch meaning: odd sizes, ties, NaN, fp16, several pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from engines.sessions.session import Session, open_session
from graphs.ops import DOMAIN, OPS, VERSION
from graphs.ops.op import BODY_OPSET
from tests.engines.openvino.conftest import needs_openvino

pytestmark = needs_openvino

SCALE = 0.37
HALF = np.float16


def drawn(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def carrier(length: int) -> np.ndarray:
    return np.full(length, 7, np.int32)


def flags(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.6


def images(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)[None]


TIES = np.random.default_rng(3).integers(0, 3, (2, 600)).astype(np.float32)
ODD = np.array([[np.nan, np.inf, -0.0, 0.0, -np.inf, 3.4028235e38, 1.0, np.nan, np.inf]], np.float32)
TEXT = np.array([[False, True, True, True, True, True, True, True, False]])

CASES: dict[str, list[tuple[np.ndarray, ...]]] = {
    "AttentionReceived": [
        (drawn(1, 4, 133, 8), drawn(1, 2, 140, 8, seed=1), carrier(130)),
        (drawn(1, 4, 1, 8), drawn(1, 2, 9, 8, seed=1), carrier(1)),
        (drawn(2, 3, 5, 4), drawn(2, 1, 5, 4, seed=1), carrier(2)),
    ],
    "RatedAttentionReceived": [(drawn(1, 4, 70, 8), drawn(1, 2, 75, 8, seed=1), np.abs(drawn(1, 66, seed=2)))],
    "ReceivedInCache": [
        (drawn(1, 4, 70, 8), drawn(1, 2, 200, 8, seed=1), carrier(66), np.array([75])),
        (drawn(1, 4, 1, 8), drawn(1, 2, 9, 8, seed=1), carrier(1), np.array([0])),
    ],
    "RatedReceivedInCache": [
        (drawn(1, 4, 70, 8), drawn(1, 2, 200, 8, seed=1), np.abs(drawn(1, 66, seed=2)), np.array([75]))
    ],
    "ReceivedFromAll": [(drawn(2, 4, 70, 8), drawn(2, 2, 70, 8, seed=1))],
    "ReceivedWithin": [(drawn(1, 4, 133, 3), drawn(1, 2, 133, 3, seed=1), images(70, 3, 60))],
    "KeepTopK": [
        (TIES, np.ones((2, 600), bool), carrier(1)),
        (TIES, flags(2, 600), carrier(400)),
        (TIES, np.ones((2, 600), bool), carrier(599)),
        (np.zeros((1, 4000), np.float32), np.ones((1, 4000), bool), carrier(3900)),
        *((ODD, TEXT, carrier(keep)) for keep in range(2, 10)),
    ],
    "KeepPerImage": [(TIES[:1, :12], images(5, 4, 3), np.array([0, 1, 5, 9, 10, 11]))],
    "CompactRows": [
        (drawn(2, 7, 3), np.array([[0, 2, 5], [1, 2, 6]])),
        (flags(1, 7), np.array([[3]])),
        (drawn(1, 7, 2, 2, dtype=HALF), np.array([[0, 6]])),
        (np.arange(7)[None], np.array([[1, 4]])),
    ],
    "TextRaters": [(drawn(1, 12, 5), np.arange(12)[None] < 6, carrier(4))],
    "MergeContext": [(drawn(1, 12, 3), drawn(1, 12, 4, seed=1), np.array([[1, 5, 9]]), carrier(4))],
    "MergeContextWithin": [
        (drawn(1, 8, 3), drawn(1, 8, 4, seed=1), images(5, 3), np.array([[0, 3, 6]]), np.array([0, 2, 3]))
    ],
    "MergePairs": [
        (drawn(1, 12, 3), np.ones((1, 12), np.float32), np.arange(12)[None], drawn(1, 12, 4, seed=1), carrier(8))
    ],
    "BlockAttention": [
        (drawn(3, 2, 9, 4), drawn(3, 2, 9, 4, seed=1), drawn(3, 2, 9, 4, seed=2), np.arange(27).reshape(3, 9) % 9 < 7),
        (*(drawn(1, 2, 300, 4, seed=i) for i in range(3)), np.ones((1, 300), bool)),
    ],
    "MergeDropped": [
        (drawn(1, 24, 5), drawn(1, 24, seed=1), np.arange(24)[None] > 3, carrier(11), carrier(3), carrier(12)),
        (drawn(1, 5, 4), drawn(1, 5), np.zeros((1, 5), bool), carrier(5), carrier(1), carrier(1)),
    ],
}


@pytest.mark.parametrize("name", list(OPS))
def test_a_body_is_its_torch_meaning(name: str, tmp_path: Path) -> None:
    op = OPS[name]
    attributes = [SCALE] * len(op.function.attribute)
    sessions: dict[tuple[object, ...], Session] = {}
    for arrays in CASES[name]:
        wanted = op.torch_op(*(torch.from_numpy(np.array(a)) for a in arrays), *attributes)
        wanted = [t.numpy() for t in (wanted if isinstance(wanted, tuple) else (wanted,))]
        kinds = tuple((a.dtype, a.ndim) for a in arrays)
        if kinds not in sessions:
            file = tmp_path / f"{len(sessions)}.onnx"
            onnx.save(one_op(name, arrays, wanted), file)
            sessions[kinds] = open_session(file, "openvino", threads=1)
        feeds = dict(zip(op.function.input, arrays, strict=True))
        got = sessions[kinds].run(feeds, host=list(op.function.output))
        for label, tensor in zip(op.function.output, wanted, strict=True):
            assert got[label].dtype == tensor.dtype
            if tensor.dtype.kind == "f":
                np.testing.assert_allclose(got[label], tensor, rtol=1e-4, atol=1e-5)
            else:
                np.testing.assert_array_equal(got[label], tensor)


def one_op(name: str, inputs: tuple[np.ndarray, ...], outputs: list[np.ndarray]) -> onnx.ModelProto:
    """A graph of one node of ours and its body, every dimension symbolic."""
    body = OPS[name].function

    def values(labels: list[str], arrays: object) -> list[onnx.ValueInfoProto]:
        return [
            onnx.helper.make_tensor_value_info(
                label, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [f"{label}_{i}" for i in range(array.ndim)]
            )
            for label, array in zip(labels, arrays, strict=True)  # type: ignore[call-overload]
        ]

    node = onnx.helper.make_node(
        name, list(body.input), list(body.output), domain=DOMAIN, **dict.fromkeys(body.attribute, SCALE)
    )
    graph = onnx.helper.make_graph(
        [node], "one_op", values(list(body.input), inputs), values(list(body.output), outputs)
    )
    opsets = [onnx.helper.make_opsetid("", BODY_OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=11)
