"""A prune point behind many layers, on every target: torch reads a segment's length of any of its keys or values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from graphs.compare import compare
from graphs.lowering import Lowering
from graphs.lowering.export import lowered_export
from graphs.plan_file import plan_from_toml
from graphs.spec import spec_from_folder
from tests.conftest import Outcome
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
