"""Families packed for the CPU, tower, embedding and a decoder that writes in place: held to the golden tensors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from engines.bundles.losses import losses_of
from engines.bundles.packed import pack_member
from engines.sessions.session import open_session
from graphs.spec import ExportSpec
from tests.families.conftest import Sample


def packed_within(error: float, sample: Sample, folder: Path, precision: str) -> ExportSpec:
    source = sample.onnx.folder
    spec = pack_member("alone", source, sample.onnx.spec, folder / "cpu", precision).spec  # type: ignore[arg-type]
    losses = losses_of(source, spec, folder, lambda file: open_session(file, threads=1))
    assert {loss.stage for loss in losses} == set(spec.stages)
    assert max(loss.max_error for loss in losses if loss.overlap is None) < error
    return spec


def ops_of(folder: Path, spec: ExportSpec, stage: str) -> Counter[str]:
    """Nodes of a stage's own graph, functions and branches apart."""
    graph = onnx.load(folder / spec.stages[stage].file, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def test_every_family_computes_its_golden_tensors_with_single_nodes(sample: Sample, tmp_path: Path) -> None:
    spec = packed_within(1e-4, sample, tmp_path, "fp32")
    decoder, tower = ops_of(tmp_path, spec, "decoder"), ops_of(tmp_path, spec, "vision")
    assert decoder["RotaryEmbedding"] >= 2 * spec.language.layers
    assert not decoder["Neg"] + tower["Neg"]
    assert not tower["BlockAttention"]
    # GroupQueryAttention takes widths that are multiples of 8.
    assert (spec.cache == "in-place") == (not decoder["Attention"]) == (spec.language.head_dim % 8 == 0)
    for stage in ("vision", "decoder"):
        for node in onnx.load(tmp_path / spec.stages[stage].file, load_external_data=False).graph.node:
            masked = len(node.input) > 3 and node.input[3]
            if node.op_type == "Attention" and not masked:
                assert any(told.name == "q_num_heads" for told in node.attribute), node.name


@pytest.mark.parametrize("sample", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("int8", 0.2)])
def test_a_packed_tower_has_no_map_of_scores_and_its_decoder_writes_in_place(
    sample: Sample, tmp_path: Path, precision: str, error: float
) -> None:
    spec = packed_within(error, sample, tmp_path, precision)
    assert spec.cache == "in-place"
    assert open_session(tmp_path / spec.stages["decoder"].file, threads=1).form == "in-place"
    tower = ops_of(tmp_path, spec, "vision")
    assert tower["MultiHeadAttention"]
    assert not {"BlockAttention", "Conv"} & set(tower)
