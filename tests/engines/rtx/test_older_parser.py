"""What TensorRT 10.3's parser does not know is written out, and equals the file it was made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from graphs.compare import TOLERANCES, compare
from graphs.errors import UsageError
from graphs.lowering.flat import FlatBodies
from graphs.lowering.older_parser import written_out
from graphs.lowering.operators_10_3 import CONSTANT_INPUT, OPERATORS
from graphs.ops import DOMAIN, OPS
from graphs.spec import spec_from_folder
from tests.conftest import Outcome
from tests.engines.openvino.test_ops import CASES, SCALE, one_op
from tests.engines.rtx.conftest import Exports, Lower, golden, run_onnx


@pytest.mark.parametrize(("role", "precision"), [("small", "float32"), ("large", "float16")])
def test_a_written_out_export_is_the_same_in_fewer_operators(
    exports: Exports, lower: Lower, role: str, precision: str
) -> None:
    old, new = lower(role, precision, False, "10.3"), lower(role, precision)
    for stage in old.spec.stages:
        model = onnx.load(old.file(stage))
        onnx.checker.check_model(str(old.file(stage)))
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
        assert model.ir_version <= 10
        assert not model.functions
        assert {node.op_type for node in model.graph.node} <= OPERATORS
    for case in golden(exports[role]):
        got, wanted = run_onnx(old, case), run_onnx(new, case)
        for name in wanted:
            assert compare(
                name, got[name], wanted[name], {"float32": 1e-5}.get(precision, TOLERANCES[precision])
            ).agrees, (case.name, name)


def test_the_table_is_the_parsers() -> None:
    assert {"Loop", "TopK", "GatherND", "IsNaN", "LayerNormalization", "CastLike", "Mod"} <= OPERATORS
    assert not {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter", "Unique"} & OPERATORS
    assert set(CONSTANT_INPUT) <= OPERATORS
    assert len(OPERATORS) == 150


def test_weights_still_lie_in_their_file(exports: Exports, lower: Lower) -> None:
    old = lower("small", "float32", False, "10.3")
    assert old.weight_bytes == lower("small").weight_bytes
    assert all(old.file(stage).stat().st_size < 300_000 for stage in old.spec.stages)


def graph_of(text: str, *ops: str) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23, "{DOMAIN}" : 1]>\n{text}')
    for op in ops:
        function = ir.serde.deserialize_function(OPS[op].function)
        model.functions[function.identifier()] = function
    return model


@pytest.mark.parametrize(
    ("text", "ops", "sentence"),
    [
        (
            "g (float[2,K] x, int64 n, bool yes) => (float[n,2,K] out) {"
            " out = Loop (n, yes) <body: graph = b (int64 i, bool going) => (bool on, y)"
            " { on = Identity (going) y = Neg (x) }> }",
            [],
            "stacks as many rows as its input has",
        ),
        ("g (float[N] x) => (float[N] out) { out = Det (x) }", [], "it has no Det"),
        (
            "g (float[2,N] x, int64[1] axes) => (float[M] out) { out = ReduceSum <keepdims: int = 0> (x, axes) }",
            [],
            "takes its axes from a tensor",
        ),
    ],
)
def test_what_the_parser_lacks_is_refused(text: str, ops: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        written_out(graph_of(text, *ops))


@pytest.mark.parametrize("name", OPS)
def test_every_ops_body_is_written_out(name: str) -> None:
    """In the form that engines are built from, beside ONNX Runtime on the body itself."""
    for arrays in CASES[name]:
        torch_op, scales = OPS[name].torch_op, [SCALE] * len(OPS[name].function.attribute)
        wanted = torch_op(*(torch.from_numpy(np.array(a)) for a in arrays), *scales)
        wanted = [t.numpy() for t in (wanted if isinstance(wanted, tuple) else (wanted,))]
        model = FlatBodies()(ir.from_proto(one_op(name, arrays, wanted))).model
        file = ir.to_proto(written_out(model)).SerializeToString()
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        feeds = dict(zip(OPS[name].function.input, arrays, strict=True))
        read = {value.name for value in session.get_inputs()}
        got = session.run(None, {name: array for name, array in feeds.items() if name in read})
        for ours, reference in zip(got, wanted, strict=True):
            np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
def test_block_attention_without_a_loop_is_its_formula(rows: int) -> None:
    text = (
        "g (float[2,3,K,4] q, float[2,3,K,4] k, float[2,3,K,4] v, bool[2,K] real) => (float[2,3,K,4] out) {"
        " out = saccade.BlockAttention <scale: float = 0.5> (q, k, v, real) }"
    )
    rng = np.random.default_rng(rows)
    q, k, v = rng.standard_normal((3, 2, 3, rows, 4), np.float32)
    real = np.ones((2, rows), bool)
    real[1, rows // 2 + 1 :] = False
    feeds = {"q": q, "k": k, "v": v, "real": real}
    logits = np.where(real[:, None, None], 0.5 * q @ k.transpose(0, 1, 3, 2), -np.inf)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = shares / shares.sum(-1, keepdims=True) @ v
    with_body, flat, old = (graph_of(text, "BlockAttention") for _ in range(3))
    for model in (with_body, FlatBodies()(flat).model, written_out(FlatBodies()(old).model)):
        proto = ir.to_proto(model)
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(["out"], feeds)[0], wanted, atol=1e-5)


def test_the_verb_writes_them_for_a_build_elsewhere(
    exports: Exports, saccade_cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "old"
    outcome = saccade_cli("lower", exports["large"], "-o", out, "--precision", "fp16", "--parser", "10.3")
    assert (outcome.code, outcome.stdout) == (0, f"{out}\n")
    stages = {f"{name}.onnx" for name in ("vision", "embed", "decoder")}
    assert {path.name for path in out.iterdir()} == stages | {"spec.json", "weights.safetensors"}
    assert spec_from_folder(out).dtype == "float16"
    for stage in stages:
        onnx.checker.check_model(str(out / stage))


@pytest.mark.parametrize(
    "options", [("--parser", "9"), ("--parser", "10.3", "--ops", "plugin"), ("--parser", "10.3", "--precision", "bf16")]
)
def test_what_cannot_be_lowered_leaves_nothing(
    exports: Exports, saccade_cli: Callable[..., Outcome], tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert saccade_cli("lower", exports["large"], "-o", tmp_path / "old", *options).code == 2
    assert not any(tmp_path.iterdir())


def test_an_export_in_the_folder_that_is_replaced_or_around_it_is_left_alone(
    exports: Exports, saccade_cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    export = tmp_path / "lowered" / "mine"
    shutil.copytree(exports["large"], export)
    (tmp_path / "lowered" / "spec.json").write_text("{}")
    told = saccade_cli("lower", export, "-o", tmp_path / "lowered", "--overwrite")
    assert (told.code, "itself, which would be replaced" in told.stderr) == (2, True)
    told = saccade_cli("lower", export, "-o", export / "b")
    assert (told.code, "which is read; give a place outside it" in told.stderr) == (2, True)
    assert {p.name for p in export.iterdir()} == {p.name for p in exports["large"].iterdir()}
