"""What the rules hold at their bounds: the first value that does not pass, the last that does, and what lies deep."""

import numpy as np
import onnx
import pytest
from onnx import helper

from graphs.rules import export_from_folder, findings_in
from tests.hand_made import edit_model, edit_spec, write_export


@pytest.fixture
def small(tmp_path):
    return write_export(tmp_path / "small", "small")


@pytest.fixture
def large(tmp_path):
    return write_export(tmp_path / "large", "large")


def codes_of(folder):
    return {finding.code for finding in findings_in(export_from_folder(folder))}


def drawn(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def add_constants(folder, **values):
    def change(model):
        model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())

    edit_model(folder, "vision", change)


def add_nested(folder, node, constants=(), shape=(1,)):
    """Put a node that gives ``inner`` into both branches of an If of the vision graph."""

    def change(model):
        inner = [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, shape)]
        branch = helper.make_graph([node], "branch", [], inner, constants)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
        model.graph.node.append(helper.make_node("If", ["yes"], ["outer"], then_branch=branch, else_branch=branch))

    edit_model(folder, "vision", change)


@pytest.mark.parametrize("version", [22, 25])
def test_an_opset_beside_the_range_is_found(small, version):
    edit_model(small, "vision", lambda m: setattr(m.opset_import[0], "version", version))
    assert "G601" in codes_of(small)


@pytest.mark.parametrize("version", [9, 14])
def test_an_ir_version_beside_the_range_is_found(small, version):
    edit_model(small, "vision", lambda m: setattr(m, "ir_version", version))
    assert "G601" in codes_of(small)


def test_the_opset_of_a_function_counts_too(small):
    edit_model(small, "decoder", lambda m: setattr(m.functions[0].opset_import[0], "version", 22))
    assert "G601" in codes_of(small)


def test_a_body_with_one_input_more_is_another_body(small):
    def change(model):
        next(n for n in model.functions[0].node if len(n.input) == 2).input.append("q")

    edit_model(small, "decoder", change)
    assert "G103" in codes_of(small)


@pytest.mark.parametrize(("numbers", "found"), [(16384, False), (16385, True)])
def test_a_constant_of_64_kib_may_lie_in_the_graph_and_not_a_number_more(small, numbers, found):
    add_constants(small, one=drawn(numbers))
    assert ("G404" in codes_of(small)) == found


def test_a_constant_that_is_there_twice_is_found(small):
    add_constants(small, one=drawn(2, 1024), other=drawn(2, 1024))
    assert "G405" in codes_of(small)


def test_constants_that_begin_alike_and_end_otherwise_are_two(small):
    other = drawn(2, 1024)
    other[1, -1] += 1
    add_constants(small, one=drawn(2, 1024), other=other)
    assert "G405" not in codes_of(small)


def test_two_constants_of_nothing_but_zeros_are_no_weight_stored_twice(small):
    add_constants(small, one=np.zeros((2, 1024), np.float32), other=np.zeros((2, 1024), np.float32))
    assert "G405" not in codes_of(small)


def test_a_nan_far_behind_the_first_bytes_is_found(small):
    values = np.ones(4096, np.float32)
    values[-1] = np.nan
    (small / "far.bin").write_bytes(values.tobytes())

    def change(model):
        tensor = model.graph.initializer.add(
            name="far",
            data_type=onnx.TensorProto.FLOAT,
            dims=values.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", "far.bin"), ("offset", 0), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))

    edit_model(small, "vision", change)
    assert "G406" in codes_of(small)


def test_an_offset_in_digits_that_are_not_ascii_is_no_number(small):
    def change(model):
        next(e for e in model.graph.initializer[0].external_data if e.key == "offset").value = "²"

    edit_model(small, "vision", change)
    assert "G402" in codes_of(small)


def test_a_foreign_op_in_a_branch_is_found(small):
    add_nested(small, helper.make_node("Odd", [], ["inner"], domain="com.microsoft"))
    assert "G104" in codes_of(small)


def test_a_weight_in_a_branch_is_found(small):
    weight = onnx.numpy_helper.from_array(drawn(12, 9999), "weight")
    add_nested(small, helper.make_node("Identity", ["weight"], ["inner"]), [weight], (12, 9999))
    assert "G404" in codes_of(small)


def test_a_vision_point_of_the_host_needs_nothing_in_the_graph(large):
    edit_spec(large, lambda s: s["plan"].update(vision={"score": "divprune", "keep": 0.5}))
    assert "G504" not in codes_of(large)


def test_a_vision_point_that_merges_needs_the_op_that_does(large):
    vision = {"score": "zip", "keep": 0.5, "per_image": True, "merge": 0.5}
    edit_spec(large, lambda s: s["plan"].update(vision=vision))
    found = [str(finding) for finding in findings_in(export_from_folder(large)) if finding.code == "G504"]
    assert any("MergeContext:" in finding for finding in found), found


def test_a_circle_behind_the_head_ends(small):
    """A damaged file is a finding (the checker's), not a run without end."""

    def change(model):
        head = next(node for node in model.graph.node if "logits" in node.output)
        head.input[0] = "round"
        model.graph.node.append(helper.make_node("Mul", ["round_too", "round_too"], ["round"]))
        model.graph.node.append(helper.make_node("Mul", ["round", "round"], ["round_too"]))

    edit_model(small, "decoder", change)
    assert "G602" in codes_of(small)
