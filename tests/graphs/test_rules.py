"""Every graph rule has a smallest bad export here: a good one with one thing broken."""

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import helper

from graphs.errors import BadArtefact
from graphs.plan import PruningPlan
from graphs.rules import RULES, export_from_folder, findings_in, refuse_findings
from graphs.weights import safetensors_file
from tests.hand_made import WEIGHTS, edit_model, edit_spec, write_export

BAD = {}


def bad(code, role="small", also=()):
    """Register a function that breaks a good export of this role; ``also``: codes that must come with it."""

    def register(breaks):
        BAD[f"{code}-{breaks.__name__}"] = (code, role, breaks, set(also))
        return breaks

    return register


def nodes(model, op):
    return [n for n in model.graph.node if n.op_type == op]


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    home = tmp_path_factory.mktemp("good")
    return {role: write_export(home / role, role) for role in ("small", "large", "alone")}


@bad("G101")
def body_removed(folder):
    edit_model(folder, "decoder", lambda m: m.ClearField("functions"))


@bad("G102", also={"G103"})
def function_named_like_a_standard_op(folder):
    def change(model):
        function = model.functions.add()
        function.CopyFrom(
            onnx.parser.parse_function(
                '<domain: "saccade", opset_import: ["" : 23]> TopK (a) => (b) { b = Identity (a) }'
            )
        )

    edit_model(folder, "decoder", change)


@bad("G102", also={"G202"})
def name_twice_over_domains(folder):
    def change(model):
        other = model.functions.add()
        other.CopyFrom(model.functions[0])
        other.domain = "elsewhere"

    edit_model(folder, "decoder", change)


@bad("G103")
def body_changed(folder):
    def change(model):
        node = next(n for n in model.functions[0].node if n.op_type in {"Identity", "Mul"})
        node.op_type = "Neg" if len(node.input) == 1 else "Add"

    edit_model(folder, "decoder", change)


def body_of(model, name):
    return next(f for f in model.functions if f.name == name)


@bad("G103", role="large")
def the_worst_rows_kept(folder):
    def change(model):
        node = next(n for n in body_of(model, "KeepTopK").node if n.op_type == "TopK")
        next(a for a in node.attribute if a.name == "largest").i = 0

    edit_model(folder, "decoder", change)


@bad("G103", role="alone")
def a_body_wired_otherwise(folder):
    def change(model):
        body = body_of(model, "AttentionReceived")
        node = next(n for n in body.node if len(n.input) == 2 and n.input[0] != n.input[1])
        node.input[1] = node.input[0]

    edit_model(folder, "decoder", change)


@bad("G103", role="alone")
def another_number_in_a_body(folder):
    def change(model):
        held = [a for n in body_of(model, "AttentionReceived").node for a in n.attribute if a.HasField("t")]
        held[0].t.CopyFrom(onnx.numpy_helper.from_array(np.full_like(onnx.numpy_helper.to_array(held[0].t), 3)))

    edit_model(folder, "decoder", change)


@bad("G104", also={"G602"})
def runtimes_own_op(folder):
    def change(model):
        nodes(model, "MatMul")[0].domain = "com.microsoft"

    edit_model(folder, "vision", change)


@bad("G201", also={"G301"})
def past_cut_off(folder):
    def change(model):
        node = nodes(model, "Attention")[0]
        del node.input[3:]

    edit_model(folder, "decoder", change)


@bad("G202")
def map_as_output(folder):
    edit_model(folder, "decoder", lambda m: nodes(m, "Attention")[0].output.append("qk_map"))


@bad("G202")
def softmax_outside(folder):
    def change(model):
        model.graph.node.append(helper.make_node("Softmax", ["logits"], ["share"]))

    edit_model(folder, "decoder", change)


@bad("G203")
def tail_unread(folder):
    def change(model):
        nodes(model, "Shape")[-1].input[0] = "position_ids"

    edit_model(folder, "decoder", change)


@bad("G203")
def head_before_the_cut(folder):
    def change(model):
        cut, head = nodes(model, "Slice")[-1], nodes(model, "MatMul")[-1]
        model.graph.node.remove(cut)
        model.graph.node.remove(head)
        all_rows = helper.make_node("MatMul", ["x2", "head"], ["all_logits"])
        cut_late = helper.make_node("Slice", ["all_logits", "start", "end", "axis_1"], ["logits"])
        model.graph.node.extend([all_rows, cut_late])

    edit_model(folder, "decoder", change)


@bad("G203")
def nothing_cut_before_the_head(folder):
    def change(model):
        cut = nodes(model, "Slice")[-1]
        cut.op_type = "Identity"
        del cut.input[1:]

    edit_model(folder, "decoder", change)


@bad("G301", also={"G303"})
def positions_unread(folder):
    def change(model):
        nodes(model, "Cast")[0].input[0] = "tail"

    edit_model(folder, "decoder", change)


@bad("G302")
def renamed_output(folder):
    def change(model):
        model.graph.output[0].name = nodes(model, "MatMul")[0].output[0] = "visual"

    edit_model(folder, "vision", change)


@bad("G302")
def other_order(folder):
    edit_spec(folder, lambda s: s["stages"]["embed"]["inputs"].reverse())


@bad("G302")
def other_dtype(folder):
    edit_spec(folder, lambda s: s["stages"]["vision"]["inputs"][0].update(dtype="float16"))


@bad("G302")
def another_width_of_heads(folder):
    edit_spec(folder, lambda s: s["language"].update(head_dim=5))


@bad("G302")
def more_heads_of_keys(folder):
    edit_spec(folder, lambda s: s["language"].update(kv_heads=2))


@bad("G302", role="large")
def more_layers_than_caches(folder):
    edit_spec(folder, lambda s: s["language"].update(layers=3))


@bad("G302")
def other_rank(folder):
    edit_spec(folder, lambda s: s["stages"]["vision"]["outputs"][0].update(shape=["V", "D", 8]))


@bad("G302")
def fixed_where_symbolic(folder):
    edit_spec(folder, lambda s: s["stages"]["vision"]["outputs"][0].update(shape=["V", "D"]))


@bad("G303")
def carrier_read(folder):
    def change(model):
        nodes(model, "Cast")[0].input[0] = "guide"
        model.graph.node.insert(0, helper.make_node("Identity", ["position_ids"], ["unused"]))

    edit_model(folder, "decoder", change)


def relocate(folder, stage, location):
    def change(model):
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location

    edit_model(folder, stage, change)


@bad("G401", also={"G403", "G602"})
def absolute(folder):
    relocate(folder, "vision", str(folder / WEIGHTS))


@bad("G401", also={"G403", "G602"})
def upwards(folder):
    relocate(folder, "vision", f"../{folder.name}/{WEIGHTS}")


@bad("G401", also={"G403", "G602"})
def symbolic_link(folder):
    (folder / "link").symlink_to(WEIGHTS)
    relocate(folder, "vision", "link")


@bad("G401", also={"G403", "G602"})
def a_name_no_file_can_have(folder):
    relocate(folder, "vision", "a" * 300)


@bad("G401", also={"G602"})
def hard_link(folder):
    os.link(folder / WEIGHTS, folder / "elsewhere")


@bad("G402")
def past_the_end(folder):
    def change(model):
        for entry in model.graph.initializer[0].external_data:
            if entry.key == "offset":
                entry.value = str((folder / WEIGHTS).stat().st_size - 4)

    edit_model(folder, "vision", change)


@bad("G402")
def offset_is_no_number(folder):
    def change(model):
        next(e for e in model.graph.initializer[0].external_data if e.key == "offset").value = "-4"

    edit_model(folder, "vision", change)


@bad("G402")
def offset_of_5000_digits(folder):
    def change(model):
        next(e for e in model.graph.initializer[0].external_data if e.key == "offset").value = "1" * 5000

    edit_model(folder, "vision", change)


def held_inside(**tensor):
    return lambda m: m.graph.initializer.add(name="odd", data_type=onnx.TensorProto.FLOAT, **tensor)


@bad("G402", also={"G602"})
def too_few_bytes_inside(folder):
    edit_model(folder, "vision", held_inside(dims=(100, 10), raw_data=bytes(range(256)) * 15))


@bad("G402", also={"G602"})
def sizes_below_zero(folder):
    edit_model(folder, "vision", held_inside(dims=(-4, -100), raw_data=bytes(range(200)) * 8))


@bad("G402")
def no_type_of_onnx(folder):
    def change(model):
        model.graph.initializer[0].data_type = 99

    edit_model(folder, "vision", change)


@bad("G402")
def shape_and_length_disagree(folder):
    def change(model):
        model.graph.initializer[0].dims[0] += 1

    edit_model(folder, "vision", change)


@bad("G403", also={"G402", "G602"})
def weights_gone(folder):
    (folder / WEIGHTS).unlink()


@bad("G403")
def weights_grown(folder):
    with (folder / WEIGHTS).open("ab") as f:
        f.write(b"\0")


@bad("G403")
def unlisted(folder):
    shutil.copyfile(folder / WEIGHTS, folder / "other.safetensors")
    relocate(folder, "vision", "other.safetensors")


def embed_in(model, values):
    old = model.graph.initializer[0]
    old.CopyFrom(onnx.numpy_helper.from_array(values, old.name))


@bad("G404")
def weight_inside(folder):
    edit_model(folder, "vision", lambda m: embed_in(m, np.random.default_rng(0).random((12, 9999), np.float32)))


def large_list(**values):
    return lambda m: m.graph.node.insert(0, helper.make_node("Constant", [], ["large"], **values))


@bad("G404")
def numbers_in_an_attribute(folder):
    edit_model(folder, "vision", large_list(value_floats=[float(i) for i in range(20000)]))


@bad("G404")
def whole_numbers_in_an_attribute(folder):
    edit_model(folder, "vision", large_list(value_ints=list(range(20000))))


@bad("G404")
def text_in_an_attribute(folder):
    edit_model(folder, "vision", large_list(value_strings=["word"] * 20000))


@bad("G404")
def weight_in_a_nested_graph(folder):
    def change(model):
        inner = helper.make_graph(
            [helper.make_node("Identity", ["within"], ["out"])],
            "inner",
            [],
            [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, (20000,))],
            [onnx.numpy_helper.from_array(np.arange(20000, dtype=np.float32), "within")],
        )
        model.graph.node.insert(0, helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", 9, (), [1])))
        model.graph.node.insert(1, helper.make_node("If", ["yes"], ["of_if"], then_branch=inner, else_branch=inner))

    edit_model(folder, "vision", change)


@bad("G404")
def sparse_weight_inside(folder):
    def change(model):
        values = onnx.numpy_helper.from_array(np.arange(1, 20001, dtype=np.float32), "sparse")
        places = onnx.numpy_helper.from_array(np.arange(20000, dtype=np.int64))
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [21000]))

    edit_model(folder, "vision", change)


@bad("G405")
def weight_also_elsewhere(folder):
    table = safetensors_file(folder / WEIGHTS).tensors
    a, b = table["words"], table["head"]
    with (folder / WEIGHTS).open("r+b") as f:
        f.seek(a.offset)
        content = f.read(a.length)
        f.seek(b.offset)
        f.write(content)


@bad("G405")
def one_place_twice_in_a_graph(folder):
    def change(model):
        twin = model.graph.initializer.add()
        twin.CopyFrom(next(t for t in model.graph.initializer if t.name == "head"))
        twin.name = "head_again"

    edit_model(folder, "decoder", change)


def poke(folder, name, value):
    tensor = safetensors_file(folder / WEIGHTS).tensors[name]
    with (folder / WEIGHTS).open("r+b") as f:
        f.seek(tensor.offset + 8)
        f.write(np.float32(value).tobytes())


@bad("G406")
def nan(folder):
    poke(folder, "q1", np.nan)


@bad("G406")
def infinite(folder):
    poke(folder, "patch", -np.inf)


@bad("G406")
def empty(folder):
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.dims[0] = 0
        next(e for e in tensor.external_data if e.key == "length").value = "0"

    edit_model(folder, "vision", change)


@bad("G501", role="large", also={"G301"})
def nothing_is_cut(folder):
    def change(model):
        cut, compact = nodes(model, "KeepTopK")[0], nodes(model, "CompactRows")[0]
        cut.domain, cut.op_type = "", "Identity"
        del cut.input[1:]
        compact.domain, compact.op_type = "", "Identity"
        del compact.input[1:]

    edit_model(folder, "decoder", change)


@bad("G501", role="large")
def cut_before_another_layer(folder):
    edit_spec(folder, lambda s: s["plan"]["points"][0].update(layer=0))


@bad("G501", role="large")
def a_budget_per_image_promised(folder):
    edit_spec(folder, lambda s: s["plan"]["points"][0].update(per_image=True))


@bad("G501", role="large")
def clusters_promised(folder):
    edit_spec(folder, lambda s: s["plan"]["points"][0].update(merge=0.5))


@bad("G502", role="large", also={"G503"})
def attention_was_promised(folder):
    edit_spec(folder, lambda s: s["plan"]["points"][0].update(score="attention"))


@bad("G502", role="alone", also={"G503"})
def priority_was_promised(folder):
    edit_spec(folder, lambda s: s["plan"]["points"][0].update(score="priority"))


@bad("G503")
def a_layer_forgotten(folder):
    edit_model(folder, "decoder", lambda m: nodes(m, "Sum")[0].input.pop())


@bad("G503")
def fewer_layers_promised(folder):
    edit_spec(folder, lambda s: s["plan"]["guidance"].update(layers=[0]))


@bad("G504", role="large")
def a_vision_point_promised(folder):
    edit_spec(folder, lambda s: s["plan"].update(vision={"score": "received", "keep": 0.5}))


@bad("G504", role="large")
def layers_of_merging_promised(folder):
    vision = {"score": "tome", "keep": 0.5, "per_image": True, "tower_layers": 2}
    edit_spec(folder, lambda s: s["plan"].update(vision=vision))


@bad("G601")
def old_opset(folder):
    def change(model):
        model.opset_import[0].version = 22

    edit_model(folder, "vision", change)


@bad("G601", also={"G602"})
def newer_ir(folder):
    def change(model):
        model.ir_version = 99

    edit_model(folder, "vision", change)


@bad("G602")
def value_from_nowhere(folder):
    def change(model):
        nodes(model, "Add")[0].input[1] = "nowhere"

    edit_model(folder, "decoder", change)


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_bad_export_is_found(case, good, tmp_path):
    code, role, breaks, also = BAD[case]
    folder = tmp_path / "export"
    shutil.copytree(good[role], folder)
    breaks(folder)
    found = findings_in(export_from_folder(folder))
    codes = {finding.code for finding in found}
    assert {code, *also} <= codes, [str(f) for f in found]
    unexpected = codes - {code} - also
    assert not unexpected, [str(f) for f in found]
    with pytest.raises(BadArtefact, match=r"breaks graph rule G\d\d\d"):
        refuse_findings(folder)


def test_every_rule_has_a_bad_export_and_a_meaning():
    assert {code for code, *_ in BAD.values()} == {rule.code for rule in RULES}
    assert len({rule.code for rule in RULES}) == len(RULES)
    assert all(rule.meaning for rule in RULES)


def test_a_body_may_name_its_values_otherwise(good, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(good["large"], folder)

    def change(model):
        for function in model.functions:
            for names in (function.input, function.output, *(x for n in function.node for x in (n.input, n.output))):
                names[:] = [f"{name}_again" if name else "" for name in names]

    edit_model(folder, "decoder", change)
    assert findings_in(export_from_folder(folder)) == []


@pytest.mark.parametrize("role", ["small", "large", "alone"])
def test_a_good_export_has_no_finding(good, role):
    assert findings_in(export_from_folder(good[role])) == []


def test_a_plan_of_nothing_has_no_finding(tmp_path):
    folder = write_export(tmp_path / "x", "alone", plan=PruningPlan(name="none"))
    assert findings_in(export_from_folder(folder)) == []


@pytest.mark.parametrize(
    ("content", "says"), [(None, "is missing"), (b"\xff\xffno", "not an ONNX file"), (b"", "holds no graph")]
)
def test_a_stage_that_cannot_be_read(good, tmp_path, content, says):
    folder = tmp_path / "export"
    shutil.copytree(good["small"], folder)
    (folder / "vision.onnx").unlink()
    if content is not None:
        (folder / "vision.onnx").write_bytes(content)
    with pytest.raises(BadArtefact, match=says):
        export_from_folder(folder)


def test_a_stage_outside_the_folder(good, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(good["small"], folder)
    edit_spec(folder, lambda s: s["stages"]["vision"].update(file="../vision.onnx"))
    with pytest.raises(BadArtefact, match="outside the folder"):
        export_from_folder(folder)
