"""Weights of 8 and 4 bits in OpenVINO: held to the rounded weights, kept narrow, and read where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import convert_model_to_external_data
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphs.lowering.derived import DerivedWeights
from graphs.lowering.roles import Width
from graphs.lowering.weight_only import WeightOnly, narrowed
from tests.engines.openvino.conftest import needs_openvino

pytestmark = needs_openvino
VOCABULARY, WIDTH, OUT = 40, 256, 48
KINDS: dict[Width, str] = {8: "i8", 4: "i4"}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """table [V,D], and w [N,K] with a row of zeros."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal((n, WIDTH)).astype(np.float32) for name, n in (("t", VOCABULARY), ("w", OUT))}
    drawn["w"][3] = 0
    return drawn


def narrow_graph(folder: Path, weights: dict[str, np.ndarray], bits: Width) -> Path:
    """y = t[ids] wᵀ + 1 by a MatMul and z = t[ids] wᵀ by a Gemm, w of ``bits``, t of 8."""
    nodes = [
        helper.make_node("Gather", ["t", "ids"], ["x"], "rows"),
        helper.make_node("Transpose", ["w"], ["wt"], "turned", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["p"], "product"),
        helper.make_node("Add", ["p", "one"], ["y"], "sum"),
        helper.make_node("Gemm", ["x", "w"], ["z"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["S"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["S", OUT]) for name in "yz"],
        [helper.make_tensor(n, TensorProto.FLOAT, v.shape, v.tobytes(), raw=True) for n, v in weights.items()]
        + [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    convert_model_to_external_data(model, location="wide.bin", size_threshold=1024)
    onnx.save(model, folder / "wide.onnx")
    read = ir.load(folder / "wide.onnx")
    derived = DerivedWeights(folder)
    bits_of = {"w": bits, "t": 8}
    WeightOnly(derived, ir.DataType.FLOAT, lambda value: bits_of[str(value.name)], tables=True)(read)  # type: ignore[arg-type,return-value]
    RemoveUnusedNodesPass()(read)
    derived.write()
    ir.save(read, folder / "narrow.onnx")
    (folder / "wide.bin").unlink()
    return folder / "narrow.onnx"


def rounded(weight_NK: np.ndarray, bits: Width) -> np.ndarray:
    q_NK, scale_NJ = narrowed(weight_NK, bits, weight_NK.shape[1] if bits == 8 else 128, np.float32)
    return q_NK * np.repeat(scale_NJ, weight_NK.shape[1] // scale_NJ.shape[1], 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_it_computes_with_the_rounded_weights_and_keeps_them_narrow(
    weights: dict[str, np.ndarray], tmp_path: Path, bits: Width
) -> None:
    from engines.sessions.openvino_session import OpenVinoSession

    session = OpenVinoSession(narrow_graph(tmp_path, weights, bits), threads=1, dtype="float32")
    table, weight = rounded(weights["t"], 8), rounded(weights["w"], bits)
    for ids in (np.array([5]), np.arange(30) % VOCABULARY, np.array([7, 7])):
        got = session.run({"ids": ids}, host=["y", "z"])
        wanted = table[ids] @ weight.T
        np.testing.assert_allclose(got["y"] - 1, wanted, atol=1e-4 * np.abs(wanted).max())
        np.testing.assert_allclose(got["z"], wanted, atol=1e-4 * np.abs(wanted).max())
    nodes = session._compiled.get_runtime_model().get_ops()
    held = {
        (node.get_output_element_type(0).get_type_name(), tuple(node.get_output_shape(0)))
        for node in nodes
        if node.get_rt_info()["layerType"].astype(str) == "Const"
    }
    assert ("i8", (VOCABULARY, WIDTH)) in held, "the table"
    assert any(kind == KINDS[bits] and np.prod(shape) == OUT * WIDTH for kind, shape in held), held
    assert not any(kind in ("f32", "bf16") and np.prod(shape) >= OUT * WIDTH for kind, shape in held), held


def test_in_bf16_activations_are_rounded_to_8_bits_too(weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    from engines.sessions.openvino_session import OpenVinoSession

    session = OpenVinoSession(narrow_graph(tmp_path, weights, 8), threads=1, dtype="bfloat16")
    ids = np.arange(VOCABULARY)
    wanted = rounded(weights["t"], 8) @ rounded(weights["w"], 8).T
    error = np.abs(session.run({"ids": ids}, host=["z"])["z"] - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.03


def test_a_row_of_small_values_keeps_them_where_its_step_is_of_fp32() -> None:
    weight_NK = np.full((2, 128), 1e-7, np.float32)
    for bits in (8, 4):
        np.testing.assert_allclose(rounded(weight_NK, bits), weight_NK, rtol=1e-6)  # type: ignore[arg-type]


def test_a_row_is_as_exact_as_its_steps() -> None:
    """Every value within half a step of what it was, and half a rounding of the step to fp32."""
    weight_NK = np.random.default_rng(1).standard_normal((6, 256)).astype(np.float32)
    for bits, steps, block in ((8, 127, 256), (4, 7, 128)):
        step = np.repeat(np.abs(weight_NK.reshape(6, -1, block)).max(-1) / steps, block, 1)
        assert (np.abs(rounded(weight_NK, bits) - weight_NK) <= step * (0.5 + steps * 2**-22)).all()  # type: ignore[arg-type]
