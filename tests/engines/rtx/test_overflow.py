"""The guard names the tensors that come near the end of fp16, before an engine is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from safetensors import safe_open

from engines.trt.member import build_member
from engines.trt.options import EngineOptions
from engines.trt.overflow import LARGEST, WATCH, guard_against_overflow, near_overflow
from graphs.errors import OperationFailed
from graphs.lowering import Lowering
from graphs.lowering.export import LoweredExport, lowered_export
from graphs.spec import spec_from_folder
from tests.engines.rtx.conftest import Exports, Lower, golden

NAME = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def scaled(exports: Exports, tmp_path: Path) -> LoweredExport:
    """The small export with one weight so large that its product nearly leaves fp16."""
    folder = Path(shutil.copytree(exports["small"], tmp_path / "scaled"))
    file = folder / "model.safetensors"
    with safe_open(file, "numpy") as tensors:
        [name] = [key for key in tensors.keys() if key.endswith(NAME.partition("layers")[2])]  # noqa: SIM118
        size = tensors.get_tensor(name)
        data = bytearray(file.read_bytes())
    at = bytes(data).index(size.tobytes())
    grown = (size * (30000 / np.abs(size).max())).astype(np.float32)
    data[at : at + grown.nbytes] = grown.tobytes()
    file.write_bytes(bytes(data))
    (tmp_path / "lowered").mkdir()
    return lowered_export(folder, spec_from_folder(folder), tmp_path / "lowered", Lowering("float16"))


def test_silence_where_nothing_comes_near(exports: Exports, lower: Lower, capsys: pytest.CaptureFixture[str]) -> None:
    guard_against_overflow(lower("small", "float16"), exports["small"])
    assert "warning" not in capsys.readouterr().err


def test_the_magnitudes_are_those_of_the_tensors(exports: Exports, lower: Lower) -> None:
    """Held to the golden outputs: the keys of every layer are watched too."""
    lowered = lower("small", "float16")
    found = {
        near.tensor: near.magnitude for near in near_overflow(lowered, exports["small"], 0) if near.stage == "decoder"
    }
    cases = [case for case in golden(exports["small"]) if case.stage == "decoder"]
    for name in ("present_k_0", "present_v_1"):
        wanted = max(float(np.abs(case.outputs[name]).max()) for case in cases)
        assert found[name] == pytest.approx(wanted, rel=0.01)


def test_a_tensor_that_overflows_is_named(
    exports: Exports, scaled: LoweredExport, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list(near_overflow(scaled, exports["small"]))
    assert found
    assert all(near.stage == "decoder" and near.magnitude >= LARGEST / 4 for near in found)
    with pytest.raises(
        OperationFailed, match=r"leave the range of fp16 in the golden replay, first decoder: .*--precision bf16"
    ):
        guard_against_overflow(scaled, exports["small"])
    said = capsys.readouterr().err
    assert all(f"warning: decoder: {near.tensor} reaches " in said for near in found)


def test_it_speaks_before_anything_is_built(
    exports: Exports, scaled: LoweredExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.trt.member.engine_from_onnx", lambda *a, **k: pytest.fail("a build has begun"))
    spec = spec_from_folder(tmp_path / "scaled")
    with pytest.raises(OperationFailed, match="leave the range of fp16"):
        build_member("small", tmp_path / "scaled", spec, tmp_path / "m", EngineOptions((89,), "fp16"))


def test_a_value_is_measured_and_freed_before_the_next(
    exports: Exports, lower: Lower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which ONNX Runtime ran the nodes, by its own profile: all at the end would keep every activation."""
    opened, real = [], ort.InferenceSession

    def profiled(model: bytes, options: ort.SessionOptions, **more: object) -> ort.InferenceSession:
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        opened.append(real(model, options, **more))
        return opened[-1]

    monkeypatch.setattr(ort, "InferenceSession", profiled)
    list(near_overflow(lower("large", "float16"), exports["large"]))
    for session in opened:
        events = json.loads(Path(session.end_profiling()).read_text())
        kernels = [e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")]
        watched = sum(output.name.startswith(WATCH) for output in session.get_outputs())
        run = kernels[: len(kernels) * watched // kernels.count("ReduceMax")]
        work = [i for i, op in enumerate(run) if op in ("MatMul", "Attention", "Softmax")]
        if work:
            measured = [i for i, op in enumerate(run) if op == "ReduceMax"]
            assert sum(i < work[-1] for i in measured) > len(measured) / 2
