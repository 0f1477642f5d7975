"""A prune point behind many layers, on every target: torch reads a segment's length of any of its keys or values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from graphs.compare import compare
from graphs.errors import BadArtefact, OperationFailed
from graphs.lowering import Lowering
from graphs.lowering.export import lowered_export
from graphs.plan_file import plan_from_toml
from graphs.spec import spec_from_folder
from tests.conftest import Outcome
from tests.engines.openvino.conftest import needs_openvino
from tests.engines.rtx.conftest import golden, run_onnx
from tests.tiny import tiny_llava

CUTS = [4, 10]
LAYERS = 12
WAYS = {
    "cpu": ("--target", "cpu"),
    "packed": ("--target", "cpu", "--precision", "fp32"),
    "openvino": ("--target", "openvino"),
}
PLAN = """
schema = "saccade.plan/1"
name = "deep"
[[point]]
where = {cut}
score = "attention"
rows = "text"
keep = 0.25
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    from exporter.export import export_checkpoint

    home = tmp_path_factory.mktemp("deep")
    checkpoint = tiny_llava(home / "checkpoint", num_hidden_layers=LAYERS, hidden_size=64)
    for cut in CUTS:
        export_checkpoint(checkpoint, home / str(cut), plan=plan_from_toml(PLAN.format(cut=cut)), role="alone")
    return {cut: home / str(cut) for cut in CUTS}


def test_lengths_are_read_of_values_too(exports: dict[int, Path]) -> None:
    """What the cases below are for; where torch names its symbols otherwise, cuts must be chosen anew."""
    read = set()
    for folder in exports.values():
        nodes = onnx.load(str(folder / "decoder.onnx"), load_external_data=False).graph.node
        read |= {n.input[0] for n in nodes if n.op_type == "Shape" and n.input[0].startswith("past_")}
    assert {name[:6] for name in read} == {"past_k", "past_v"}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_target_computes_the_golden_tensors(
    exports: dict[int, Path], saccade_cli: Callable[..., Outcome], tmp_path: Path, cut: int, way: str
) -> None:
    bundle = tmp_path / "b"
    assert saccade_cli("build", exports[cut], "-o", bundle, *WAYS[way]).code == 0
    verified = saccade_cli("verify", bundle)
    assert verified.code == 0, verified.stderr


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("capacity", [None, 64])
def test_so_do_the_files_that_engines_are_built_from(
    exports: dict[int, Path], tmp_path: Path, cut: int, capacity: int | None
) -> None:
    folder = exports[cut]
    lowered = lowered_export(folder, spec_from_folder(folder), tmp_path, Lowering("float32", capacity=capacity))
    for case in golden(folder):
        for name, got in run_onnx(lowered, case).items():
            assert compare(name, got, case.outputs[name], 1e-4).agrees, (case.name, name)


@pytest.fixture
def read_otherwise(exports: dict[int, Path], tmp_path: Path) -> Path:
    """An export whose decoder reads a cache's values in a way that no lowering knows."""
    folder = Path(shutil.copytree(exports[CUTS[0]], tmp_path / "otherwise"))
    model = onnx.load(str(folder / "decoder.onnx"), load_external_data=False)
    [last] = [node for node in model.graph.node if node.output[0] == "logits"]
    last.output[0] = "own"
    for made in (
        onnx.helper.make_node("ReduceSum", ["past_v_1"], ["sum"], "stranger", keepdims=0),
        onnx.helper.make_node("Add", ["own", "sum"], ["logits"], "last"),
    ):
        model.graph.node.append(made)
    [logits] = [output for output in model.graph.output if output.name == "logits"]
    own, total = model.graph.value_info.add(), onnx.helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, [])
    own.CopyFrom(logits)
    own.name = "own"
    model.graph.value_info.append(total)
    onnx.save(model, str(folder / "decoder.onnx"))
    return folder


def test_other_readers_of_a_cache_are_refused(
    read_otherwise: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome]
) -> None:
    packed = saccade_cli("build", read_otherwise, "-o", tmp_path / "b", "--target", "cpu", "--precision", "fp32")
    assert (packed.code, (tmp_path / "b").exists()) == (1, False)
    assert "past_v_1 is read by more than its layer's attention" in packed.stderr
    spec = spec_from_folder(read_otherwise)
    with pytest.raises(OperationFailed, match="past_v_1 is read by more"):
        lowered_export(read_otherwise, spec, tmp_path, Lowering("float32", capacity=64))


@needs_openvino
def test_openvino_refuses_other_readers_of_a_cache(read_otherwise: Path) -> None:
    from engines.sessions.openvino_session import OpenVinoSession

    with pytest.raises(BadArtefact, match="stranger reads a cache's values, not its attention; export"):
        OpenVinoSession(read_otherwise / "decoder.onnx")
