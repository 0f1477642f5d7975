"""The network that TensorRT-RTX's parser makes of a lowered decoder computes what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphs.compare import TOLERANCES, compare
from tests.engines.rtx.conftest import Exports, Lower, golden, interpreted, run_onnx

pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(
    ("role", "precision", "plugins", "capacity"),
    [
        ("small", "float32", False, 40),
        ("small", "float32", True, 40),
        ("large", "float32", False, None),
        ("large", "float16", False, 40),
    ],
)
def test_the_parsed_decoder_is_the_same_function(
    exports: Exports, lower: Lower, tmp_path: Path, role: str, precision: str, plugins: bool, capacity: int | None
) -> None:
    lowered = lower(role, precision, plugins, capacity=capacity)
    cases = [case for case in golden(exports[role]) if case.stage == "decoder"]
    assert {case.name for case in cases} == {"prefill", "chunk", "decode"}
    got = interpreted(lowered, cases, tmp_path, plugins)
    for case in cases:
        for name, wanted in run_onnx(lowered, case).items():
            compared = compare(name, got[case.name][name], wanted, TOLERANCES[precision] / 10)
            assert compared.agrees, f"{case.name}: {compared.problem}"


def test_causality_left_to_the_flag_would_be_found_out(exports: Exports, lower: Lower, tmp_path: Path) -> None:
    """The interpreter tells a wrong mask from a right one: with the last cached key hidden, decode differs."""
    import onnx_ir as ir

    lowered = lower("small")
    cases = [case for case in golden(exports["small"]) if case.name == "decode" and case.stage == "decoder"]
    right = interpreted(lowered, cases, tmp_path, False)["decode"]["logits"]
    file = lowered.file("decoder")
    kept = file.read_bytes()
    try:
        model = ir.load(file)
        for node in model.graph:
            if node.op_type == "LessOrEqual":
                node.op_type = "Less"
        ir.save(model, file)
        wrong = interpreted(lowered, cases, tmp_path, False)["decode"]["logits"]
    finally:
        file.write_bytes(kept)
    assert np.abs(right - wrong).max() > 1e-3


def test_a_layer_that_the_interpreter_does_not_know_is_an_error(exports: Exports, lower: Lower, tmp_path: Path) -> None:
    cases = [case for case in golden(exports["small"]) if case.stage == "vision"]
    with pytest.raises(AssertionError, match="is of kind CONVOLUTION, which this interpreter does not know"):
        interpreted(lower("small"), cases, tmp_path, False, "vision")
