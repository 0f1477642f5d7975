"""Qwen2.5-VL packed for the CPU, tower, embedding and a decoder that writes in place: held to the golden tensors."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from engines.bundles.losses import losses_of
from engines.bundles.packed import pack_member
from engines.sessions.session import open_session
from tests.families.conftest import Sample


@pytest.mark.parametrize("sample", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("int8", 0.2)])
def test_a_packed_family_computes_its_golden_tensors(
    sample: Sample, tmp_path: Path, precision: str, error: float
) -> None:
    source = sample.onnx.folder
    packed = pack_member("alone", source, sample.onnx.spec, tmp_path / "cpu", precision)  # type: ignore[arg-type]
    assert packed.spec.cache == "in-place"
    assert open_session(tmp_path / packed.spec.stages["decoder"].file, threads=1).form == "in-place"
    losses = losses_of(source, packed.spec, tmp_path, lambda file: open_session(file, threads=1))
    assert {loss.stage for loss in losses} == set(packed.spec.stages)
    numbers = [loss.max_error for loss in losses if loss.overlap is None]
    assert max(numbers) < error
    tower = onnx.load(tmp_path / packed.spec.stages["vision"].file, load_external_data=False)
    ops = {node.op_type for node in tower.graph.node}
    assert "MultiHeadAttention" in ops
    assert not {"BlockAttention", "Conv"} & ops
