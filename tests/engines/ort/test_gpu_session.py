"""A session on a GPU, by a stand-in of the runtime: how it is opened, what stays on the device, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.bundles.golden import cases_of, refuse_disagreement, replay
from engines.sessions.ort_gpu import cuda_session, rtx_session, tensorrt_session
from engines.sessions.placement import inlined, shape_nodes
from graphs.errors import BackendMissing, OperationFailed
from graphs.rules.rule import nodes_of
from graphs.spec import spec_from_folder
from tests.engines.ort.conftest import CUDA

TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"


def first_of(file: Path, *ops: str) -> list[str]:
    """The name of the first node of each operator, as the session gives it."""
    nodes = list(nodes_of(inlined(file).graph))
    return [next(node.name for node in nodes if node.op_type == op) for op in ops]


@pytest.mark.parametrize("role", ["small", "large"])
def test_golden_tensors_replay_through_the_inlined_graph(exports, role, stand_in):
    folder = exports[role]
    stand_in(on_cpu=shape_nodes(inlined(folder / "decoder.onnx")))
    replays = list(replay(folder, spec_from_folder(folder), cuda_session))
    assert len(replays) == 6
    refuse_disagreement(replays, role)


def test_how_it_is_opened(exports, stand_in):
    told = stand_in()
    cuda_session(exports["large"] / "decoder.onnx", threads=1)
    [(name, options)] = told.opened[0].asked
    assert name == CUDA
    assert options["use_tf32"] == "0", "fp32 would be computed with 10 bits of mantissa"


def test_only_what_the_host_asks_for_leaves_the_device(exports, stand_in):
    told, folder = stand_in(), exports["large"]
    session = cuda_session(folder / "decoder.onnx")
    [case] = [c for c in cases_of(folder, spec_from_folder(folder)) if (c.stage, c.name) == ("decoder", "prefill")]
    caches = [name for name in case.outputs if name.startswith("present")]
    out = session.run(case.inputs, host=("logits", "kept_0"), device=caches)
    assert told.opened[0].bound == {"logits": "cpu", "kept_0": "cpu", **dict.fromkeys(caches, "cuda")}
    assert isinstance(out["logits"], np.ndarray)
    assert not isinstance(out["present_k_0"], np.ndarray)
    np.testing.assert_array_equal(session.to_host(out["present_k_0"]), case.outputs["present_k_0"])


def test_a_provider_that_did_not_load_is_no_gpu(exports, stand_in):
    stand_in(loads=())
    with pytest.raises(BackendMissing, match="did not load CUDAExecutionProvider and would run on the CPU instead"):
        cuda_session(exports["large"] / "embed.onnx")


def test_work_of_the_decoder_on_the_cpu_is_refused(exports, stand_in):
    file = exports["large"] / "decoder.onnx"
    stand_in(on_cpu=[*shape_nodes(inlined(file)), *first_of(file, "MatMul", "TopK")])
    with pytest.raises(
        BackendMissing, match=r"decoder\.onnx: CUDAExecutionProvider leaves 2 nodes to the CPU: MatMul, TopK"
    ):
        cuda_session(file)


def test_work_of_another_stage_on_the_cpu_is_said(exports, stand_in, capsys):
    file = exports["large"] / "vision.onnx"
    [name] = first_of(file, "MatMul")
    stand_in(on_cpu=[name])
    assert cuda_session(file).placement.work == (("MatMul", name),)
    assert "vision.onnx: CUDAExecutionProvider leaves 1 nodes to the CPU: MatMul" in capsys.readouterr().err


@pytest.mark.parametrize(("opened", "name"), [(tensorrt_session, TENSORRT), (rtx_session, RTX)])
def test_the_tensorrt_providers_get_all_but_the_decoder(exports, stand_in, opened, name, capsys):
    told = stand_in(loads=(name, CUDA))
    opened(exports["large"] / "vision.onnx")
    opened(exports["large"] / "decoder.onnx")
    assert [[provider for provider, _ in session.asked] for session in told.opened] == [[name, CUDA], [CUDA]]
    assert capsys.readouterr().err == ""


def test_a_tensorrt_provider_that_takes_nothing_is_said(exports, stand_in, monkeypatch, capsys):
    told = stand_in(loads=(TENSORRT, CUDA))
    monkeypatch.setattr(told, "get_providers", lambda self: [CUDA, TENSORRT])
    tensorrt_session(exports["large"] / "vision.onnx")
    assert "vision.onnx: TensorrtExecutionProvider took none of the nodes" in capsys.readouterr().err


def test_full_memory_is_called_that(exports, stand_in, monkeypatch):
    told, folder = stand_in(), exports["large"]
    session = cuda_session(folder / "embed.onnx")

    def full(*_):
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr(told, "run_with_iobinding", full)
    [case] = [c for c in cases_of(folder, spec_from_folder(folder)) if c.stage == "embed"]
    with pytest.raises(OperationFailed, match="memory is full: keep fewer visual tokens"):
        session.run(case.inputs, host=list(case.outputs))
