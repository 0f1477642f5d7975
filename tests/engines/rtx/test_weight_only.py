"""Weights of 8 and 4 bits in lowered files: held to the rounded weights, parsed and built by TensorRT-RTX."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import convert_model_to_external_data

from engines.bundles.manifest import manifest_of
from engines.sessions.session import open_session
from engines.trt.bounds import Bounds, profiles_of
from engines.trt.engine import engine_from_onnx
from engines.trt.options import EngineOptions
from engines.trt.reading import reading_from
from graphs.errors import UsageError
from graphs.lowering import Lowering
from graphs.lowering.derived import DerivedWeights
from graphs.lowering.export import LoweredExport, lowered_export
from graphs.lowering.roles import Width
from graphs.lowering.weight_only import BLOCK, WeightOnly, narrowed
from graphs.spec import spec_from_folder
from tests.conftest import Outcome
from tests.engines.rtx.conftest import golden, run_onnx
from tests.tiny import tiny_llava

BOUNDS = Bounds(max_prompt=64, max_length=96, max_guide=32, max_tail=8, max_images=2)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths that are multiples of a block."""
    from exporter.export import export_checkpoint

    home = tmp_path_factory.mktemp("weight-only")
    tiny_llava(home / "checkpoint", num_hidden_layers=2, hidden_size=128, intermediate_size=256)
    options = {"policy": "sgl", "role": "alone", "fraction": 0.5, "keep": 0.5}
    export_checkpoint(home / "checkpoint", home / "export", **options)  # type: ignore[arg-type]
    return home / "export"


@pytest.fixture(scope="module")
def lowered(export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, LoweredExport]:
    """The export with weights of 4 and 8 bits, fp32 otherwise, so that only they are measured; 16: all fp16."""
    home = tmp_path_factory.mktemp("lowered")
    made = {}
    for bits, precision in ((4, "float32"), (8, "float32"), (16, "float16")):
        (home / str(bits)).mkdir()
        lowering = Lowering(precision, bits=bits if bits < 16 else None)  # type: ignore[arg-type]
        made[bits] = lowered_export(export, spec_from_folder(export), home / str(bits), lowering)
    return made


@pytest.mark.parametrize("bits", [8, 4])
def test_it_computes_what_rounded_weights_compute(
    export: Path, lowered: dict[int, LoweredExport], tmp_path: Path, bits: Width
) -> None:
    rounded = Path(shutil.copytree(export, tmp_path / "rounded"))
    narrow = ir.load(lowered[bits].file("decoder")).graph.initializers
    for name, value in ir.load(rounded / "decoder.onnx").graph.initializers.items():
        if f"{name}.q" in narrow:
            held = value.const_value
            assert isinstance(held, ir.ExternalTensor)
            width: Width = 8 if narrow[f"{name}.q"].dtype == ir.DataType.INT8 else 4
            wide_NK = rounded_like(held.numpy(), width)
            data = bytearray(Path(held.path).read_bytes())
            at = held.offset or 0
            data[at : at + wide_NK.nbytes] = wide_NK.tobytes()
            Path(held.path).write_bytes(bytes(data))
    for case in (case for case in golden(export) if case.stage == "decoder"):
        wanted = open_session(rounded / "decoder.onnx", threads=1).run(case.inputs, host=["logits"])["logits"]
        got = run_onnx(lowered[bits], case)["logits"]
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()


def rounded_like(weight_NK: np.ndarray, bits: Width) -> np.ndarray:
    """What is left of a weight: rows on 255 steps, or blocks of 128 on 15, each step a number of fp32."""
    block = weight_NK.shape[1] if bits == 8 else 128
    parts = weight_NK.reshape(-1, block)
    steps = {8: 127, 4: 7}[bits]
    scale = np.maximum(abs(parts).max(1, keepdims=True) / np.float32(steps), np.float32(2**-126))
    return np.float32(np.clip(np.rint(parts / scale), -steps, steps) * scale).reshape(weight_NK.shape)


@pytest.mark.parametrize(("bits", "kind"), [(8, ir.DataType.INT8), (4, ir.DataType.INT4)])
def test_every_product_of_the_decoder_reads_narrow_weights(
    lowered: dict[int, LoweredExport], bits: int, kind: ir.DataType
) -> None:
    model = ir.load(lowered[bits].file("decoder"))
    narrow = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(narrow) == 15, "twice q, k, v, o, gate, up and down, and the head"
    kinds = {node.inputs[0].name.removesuffix(".q"): node.inputs[0].dtype for node in narrow}  # type: ignore[union-attr]
    assert {found for name, found in kinds.items() if "layers" in name} == {kind}
    assert {found for name, found in kinds.items() if "layers" not in name} == {ir.DataType.INT8}, "the head"
    assert lowered[bits].weight_bytes["decoder"] < 0.6 * lowered[16].weight_bytes["decoder"] * bits / 8


def test_four_bits_are_stored_low_half_first(export: Path, lowered: dict[int, LoweredExport]) -> None:
    def named(file: Path, ending: str) -> ir.Value:
        return next(v for n, v in ir.load(file).graph.initializers.items() if n.endswith(ending))

    held = named(export / "decoder.onnx", "down_proj.weight").const_value
    q = named(lowered[4].file("decoder"), "down_proj.weight.q").const_value
    assert held is not None
    assert q is not None
    wanted, _ = narrowed(held.numpy(), 4, BLOCK, np.float32)
    assert (q.numpy().astype(np.int8) == wanted).all()


def test_the_parser_takes_rows_of_int8_and_the_engine_builds(export: Path, tmp_path: Path) -> None:
    spec = spec_from_folder(export)
    lowering = EngineOptions((89,), "int8", "body", BOUNDS).checked().lowering(spec)
    made = lowered_export(export, spec, tmp_path, lowering)
    assert made.spec.dtype == "float16"
    profiles = profiles_of("decoder", made.spec, BOUNDS.fitted(made.spec, None))
    file = made.file("decoder")
    answer = engine_from_onnx(file, tmp_path / "e", sms=[89], profiles=profiles, ops=made.ops["decoder"])
    reading = reading_from(answer["reading"])
    assert reading.unused == ()
    assert all(attention.mask and attention.cache for attention in reading.attentions)
    assert (tmp_path / "e").stat().st_size == answer["bytes"]


def test_a_bundle_of_int4_for_rtx_and_cpu_says_what_it_costs(
    export: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome]
) -> None:
    bounds = ("--max-prompt", "64", "--max-length", "96", "--max-tail", "8", "--max-images", "2")
    targets = ("--target", "rtx", "--target", "cpu", "--sm", "89")
    told = saccade_cli("build", export, "-o", tmp_path / "b", *targets, "--precision", "int4", *bounds)
    assert told.code == 0, told.stderr
    assert "alone in int4 on rtx, golden tensors, by ONNX Runtime: decoder: error at most" in told.stderr
    entries = manifest_of(tmp_path / "b").members["alone"].targets
    assert {name: (entry.precision, entry.dtype) for name, entry in entries.items()} == {
        "rtx": ("int4", "float16"),
        "cpu": ("int4", "float32"),
    }
    [rtx, cpu] = [
        max(loss.mean_error for loss in entries[name].losses if loss.tensor == "logits") for name in ("rtx", "cpu")
    ]
    assert 1e-3 < rtx < 0.2
    assert cpu == pytest.approx(rtx, rel=2)
    assert "on rtx: int4 weights, float16" in saccade_cli("show", tmp_path / "b").stdout
    assert saccade_cli("verify", tmp_path / "b", "--target", "cpu").code == 0


def test_files_for_others(export: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome]) -> None:
    told = saccade_cli("lower", export, "-o", tmp_path / "l", "--precision", "int8", "--parser", "10.3")
    assert told.code == 0, told.stderr
    model = ir.load(tmp_path / "l" / "decoder.onnx")
    assert model.opset_imports[""] == 20
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph) == 15
    told = saccade_cli("lower", export, "-o", tmp_path / "m", "--precision", "int4", "--parser", "10.3")
    assert told.code == 2
    assert "no bf16 and no int4" in told.stderr


def test_a_precision_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="choose fp16, bf16, fp32, int8, int4"):
        EngineOptions((89,), "int2").checked()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_whose_scale_fp16_rounds_is_clipped_and_keeps_its_signs(bits: Width) -> None:
    """Its least number is 2⁻²⁴, so that a scale of 1.4 of them becomes one, and a value 1.4 times the largest code."""
    largest = {8: 127, 4: 7}[bits]
    value_K = np.linspace(-1, 1, BLOCK, dtype=np.float32) * np.float32(1.4 * largest * 2**-24)
    q, scale = narrowed(np.stack([value_K, np.zeros_like(value_K)]), bits, BLOCK)
    assert (scale == 2**-24).all(), "none is 0, also of zeros"
    assert (q[0, 0], q[0, -1]) == (-largest, largest)
    assert (np.sign(q[0]) == np.sign(np.rint(value_K * 2**24))).all()
    assert not q[1].any()


def test_rows_of_no_whole_blocks_are_int8_made_in_pieces_and_what_is_read_otherwise_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 5, BLOCK + 64
    monkeypatch.setattr("graphs.lowering.weight_only.CHUNK", 2 * k)
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("w", (n, k)), ("g", (k, k)))}
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], "turned", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"], "product"),
        helper.make_node("Gemm", ["x", "g"], ["z"], "not_turned"),
        helper.make_node("Gather", ["g", "ids"], ["columns"], "columns", axis=1),
    ]
    kinds = {"x": (TensorProto.FLOAT, ["S", k]), "ids": (TensorProto.INT64, ["I"])}
    given = [helper.make_tensor_value_info(name, *kind) for name, kind in kinds.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z", "columns")]
    stored = [helper.make_tensor(name, TensorProto.FLOAT, v.shape, v.tobytes(), raw=True) for name, v in held.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", given, results, stored))
    convert_model_to_external_data(model, location="wide.bin", size_threshold=0)
    onnx.save(model, tmp_path / "wide.onnx")
    read, derived = ir.load(tmp_path / "wide.onnx"), DerivedWeights(tmp_path)
    WeightOnly(derived, ir.DataType.FLOAT, lambda value: 4, tables=True)(read)
    derived.write()
    made = {name: value.const_value for name, value in read.graph.initializers.items() if name not in held}
    assert set(made) == {"w.q", "w.scale"}
    q, scale = narrowed(held["w"], 8, k, np.float32)
    narrow, scales = made["w.q"], made["w.scale"]
    assert narrow is not None
    assert scales is not None
    assert narrow.dtype == ir.DataType.INT8
    assert (narrow.numpy() == q).all()
    assert (scales.numpy() == scale[:, 0]).all()
