"""Lowered files equal the canonical ones in ONNX Runtime, carry their mask and islands, and hold each weight once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file

from engines.sessions.session import open_session
from graphs.compare import TOLERANCES, compare
from graphs.errors import OperationFailed
from graphs.lowering import Lowering
from graphs.lowering.attention import ExplicitMask
from graphs.lowering.weights import ConvertedWeights
from graphs.ops import DOMAIN, OPS
from tests.engines.rtx.conftest import Exports, Lower, golden, run_onnx

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


@pytest.mark.parametrize("role", ["small", "large"])
def test_every_stage_equals_the_canonical_one(exports: Exports, lower: Lower, role: str) -> None:
    lowered = lower(role)
    for case in golden(exports[role]):
        canonical = open_session(exports[role] / f"{case.stage}.onnx", threads=1).run(
            case.inputs, host=list(case.outputs)
        )
        for name, got in run_onnx(lowered, case).items():
            assert compare(name, got, canonical[name], 1e-6).agrees, (case.stage, case.name, name)


@pytest.mark.parametrize("role", ["small", "large"])
def test_fp16_stays_within_the_tolerance_of_eager_fp32(exports: Exports, lower: Lower, role: str) -> None:
    lowered = lower(role, "float16")
    for case in golden(exports[role]):
        for name, got in run_onnx(lowered, case).items():
            compared = compare(name, got.astype(case.outputs[name].dtype), case.outputs[name], TOLERANCES["float16"])
            assert compared.agrees, (case.stage, case.name, compared.problem)


def test_a_long_chunk_and_three_budgets_keep_the_same_rows(exports: Exports, lower: Lower) -> None:
    """Rows, cache lengths and budgets are other than the golden ones."""
    lowered = lower("large")
    language = lowered.spec.language
    sessions = [open_session(f, threads=1) for f in (exports["large"] / "decoder.onnx", lowered.file("decoder"))]
    rng = np.random.default_rng(3)
    for rows, past, behind, kept in ((70, 0, 0, 40), (70, 0, 0, 7), (9, 31, 12, 9)):
        feeds = {
            "inputs_embeds": rng.standard_normal((1, rows, language.width), np.float32),
            "position_ids": np.arange(past, past + rows)[None],
            "is_visual": rng.random((1, rows)) < (0.9 if past == 0 else 0),
            "keep_0": np.zeros(max(kept, 1), np.int32),
            "tail": np.zeros(2, np.int32),
            "priority": rng.random((1, rows), np.float32),
        }
        for layer in range(language.layers):
            length = past if layer < lowered.spec.plan.points[0].layer else behind
            for side in "kv":
                shape = (1, language.kv_heads, length, language.head_dim)
                feeds[f"past_{side}_{layer}"] = rng.standard_normal(shape, np.float32)
        feeds["is_visual"][0, -2:] = False
        outputs = [t.name for t in lowered.spec.stages["decoder"].outputs]
        wanted, got = (session.run(feeds, host=outputs) for session in sessions)
        np.testing.assert_array_equal(got["kept_0"], wanted["kept_0"])
        for name in outputs:
            assert compare(name, got[name], wanted[name], 1e-5).agrees, name


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_file_says_what_tensorrt_will_run(lower: Lower, precision: str) -> None:
    graph = ir.load(lower("large", precision).file("decoder")).graph
    narrow = {"float32": FLOAT, "float16": HALF, "bfloat16": ir.DataType.BFLOAT16}[precision]
    masks = set()
    for node in graph:
        if node.op_type == "Attention":
            assert len(node.outputs) == 1
            assert "is_causal" not in node.attributes
            assert [v.dtype for v in node.inputs] == [narrow, narrow, narrow, ir.DataType.BOOL]
            assert node.inputs[1].producer().op_type == node.inputs[2].producer().op_type == "Concat"
            assert node.inputs[1].producer().inputs[0] in graph.inputs
            masks.add(node.inputs[3].name)
        elif node.op_type in ("RMSNormalization", "Softmax"):
            assert {v.dtype for v in (*node.inputs, *node.outputs)} == {FLOAT}
        elif node.op_type == "KeepTopK":
            assert node.inputs[0].dtype == FLOAT
        elif node.op_type == "MatMul":
            assert {v.dtype for v in node.inputs} == {narrow}
    assert masks == {"visible_0", "visible_1"}, "one mask per segment"
    types = {v.name: v.dtype for v in (*graph.inputs, *graph.outputs)}
    assert types["logits"] == types["priority"] == FLOAT
    assert types["present_k_0"] == types["past_k_0"] == types["inputs_embeds"] == narrow


def test_each_weight_lies_once_and_outside_the_graph(exports: Exports, lower: Lower) -> None:
    wide, narrow = lower("small"), lower("small", "float16")
    size = sum(w.bytes for w in wide.spec.weights)
    assert size == sum(w.bytes for w in (lower("small", "float32")).spec.weights)
    tensors = load_file(narrow.folder / narrow.spec.weights[0].name)
    assert {t.dtype for t in tensors.values()} == {np.dtype("float16")}
    stored = load_file(exports["small"] / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) <= sum(t.nbytes for t in stored.values()) / 2
    for lowered in (wide, narrow):
        for stage in lowered.spec.stages:
            assert lowered.file(stage).stat().st_size < 200_000
            onnx.load(lowered.file(stage))  # onnx's own loader finds and takes the weights


def test_plugins_are_asked_for_by_attributes_that_onnx_runtime_ignores(exports: Exports, lower: Lower) -> None:
    asked, plain = (ir.load(lower("large", "float32", plugins).file("decoder")).graph for plugins in (True, False))
    ours = [node for node in asked if node.domain == DOMAIN]
    assert {node.op_type for node in ours} == {"KeepTopK", "CompactRows"}
    assert all(node.attributes.get_string("plugin_namespace") == "saccade" for node in ours)
    assert not any("plugin_namespace" in node.attributes for node in plain)
    case = next(case for case in golden(exports["large"]) if case.name == "prefill")
    assert "logits" in run_onnx(lower("large", "float32", True), case)


def test_an_attention_that_is_causal_without_a_past_is_refused() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[1,2,S,4] q, float[1,2,S,4] k, float[1,2,S,4] v) => (float[1,2,S,4] out) {
          out = Attention <is_causal: int = 1> (q, k, v)
        }"""
    )
    with pytest.raises(ir.passes.PostconditionError):
        ExplicitMask()(model)
    with pytest.raises(OperationFailed, match="cannot be lowered"):
        Lowering("float32").apply(model, lambda tensor, dtype: tensor)


def test_a_weight_that_fp16_cannot_hold_is_named(tmp_path: Path) -> None:
    save_file({"large.weight": np.array([1.0, 7e4], np.float32)}, tmp_path / "w.safetensors")
    offset = (tmp_path / "w.safetensors").stat().st_size - 8
    tensor = ir.ExternalTensor(
        "w.safetensors", offset, 8, FLOAT, shape=ir.Shape([2]), name="large.weight", base_dir=tmp_path
    )
    weights = ConvertedWeights(tmp_path, "narrow.safetensors")
    weights.rebind(tensor, HALF)
    with pytest.raises(OperationFailed, match=r"large\.weight leaves the range of float16"):
        weights.write()


def test_every_op_is_known_to_the_precision_pass() -> None:
    """A score's input stays fp32, and the output that carries tokens has their type: read from the bodies' text."""
    for name, op in OPS.items():
        inputs = list(op.function.input)
        wide = tuple(i for i, given in enumerate(inputs) if given in ("score", "size", "weight"))
        assert op.scores == wide, name
        assert op.carries is (op.function.output[0] in ("compact", "tokens", "merged", "out")), name


def test_no_body_holds_a_loop_when_lowered() -> None:
    assert not [name for name, op in OPS.items() if "Loop" in (op.flat_body or op.body)]


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.flat_body and name != "BlockAttention"])
@pytest.mark.parametrize("guide", [1, 5, 67])
def test_a_flat_body_means_what_the_body_means(name: str, guide: int) -> None:
    rng = np.random.default_rng(guide)
    q, k = rng.standard_normal((1, 4, 70, 8), np.float32), rng.standard_normal((1, 2, 81, 8), np.float32)
    third = {
        "AttentionReceived": np.zeros(guide, np.int32),
        "RatedAttentionReceived": rng.random((1, guide), np.float32),
        "ReceivedInCache": np.zeros(guide, np.int32),
        "RatedReceivedInCache": rng.random((1, guide), np.float32),
        "ReceivedWithin": np.sort(rng.integers(0, 3, (1, 70))),
    }.get(name)
    if name == "ReceivedWithin":
        k = k[:, :, :70]
    feeds = {"q": q, "k": k} | ({} if third is None else {OPS[name].function.input[2]: third})
    if name.endswith("InCache"):
        feeds["length"] = np.array([5])
        k[:, :, 75:] = np.nan
    got = [run_body(function, feeds) for function in (OPS[name].function, OPS[name].flat_function)]
    if name.endswith("InCache"):
        rows = run_body(OPS[name.replace("ReceivedInCache", "AttentionReceived")].flat_function, first_rows(feeds, 75))
        np.testing.assert_allclose(got[0][:, :75], rows, rtol=2e-5, atol=1e-6)
        assert (got[0][:, 75:] == 0).all()
    np.testing.assert_allclose(got[1], got[0], rtol=2e-5, atol=1e-6)
    assert got[0].sum() > 0


def first_rows(feeds: dict[str, np.ndarray], filled: int) -> dict[str, np.ndarray]:
    """The same call over the filled rows of a cache alone."""
    return {name: value for name, value in feeds.items() if name != "length"} | {"k": feeds["k"][:, :, :filled]}


def run_body(function: onnx.FunctionProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """One node of ours over a body, in ONNX Runtime."""
    inputs = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
        for n, a in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info("received", onnx.TensorProto.FLOAT, [None, None])
    node = onnx.helper.make_node(function.name, list(feeds), ["received"], domain=DOMAIN, scale=0.3)
    graph = onnx.helper.make_graph([node], "g", inputs, [output])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]
