"""What the CPU's passes make of a tower, held to the canonical nodes in ONNX Runtime and to plain numpy.

Legend: B blocks, H heads, K places, D head width, M samples, C channels, N outputs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper
from safetensors.numpy import save_file

from graphs.lowering.patches import PatchesByProduct
from graphs.lowering.rotary import OneRotary
from graphs.lowering.tiled import LONG, TowersTiled
from graphs.ops import DOMAIN
from graphs.ops.block_attention import OP
from graphs.weights import safetensors_file

HEADS, WIDTH = 2, 8


def blocks(dtype: int = T.FLOAT, *, rows_first: bool = True) -> onnx.ModelProto:
    """Two attentions of one is_real, behind the transposes that the exporter writes or straight from the inputs."""
    shape: list[int | str] = ["B", "K", HEADS, WIDTH] if rows_first else ["B", HEADS, "K", WIDTH]
    nodes, names = [], ["q", "k", "v"]
    if rows_first:
        nodes = [helper.make_node("Transpose", [n], [f"{n}_t"], perm=[0, 2, 1, 3], name=f"{n}_t") for n in names]
        names = [f"{n}_t" for n in names]
    for i, out in enumerate(("first", "second")):
        values = names if not i else [names[1], names[0], names[2]]
        attention = [*values, "is_real"]
        nodes.append(helper.make_node("BlockAttention", attention, [out], domain=DOMAIN, name=out, scale=0.3))
    known = [helper.make_tensor_value_info(n, dtype, ["B", HEADS, "K", WIDTH]) for n in names if rows_first]
    graph = helper.make_graph(
        nodes,
        "tower",
        [
            *(helper.make_tensor_value_info(n, dtype, shape) for n in ("q", "k", "v")),
            helper.make_tensor_value_info("is_real", T.BOOL, ["B", "K"]),
        ],
        [helper.make_tensor_value_info(n, dtype, ["B", HEADS, "K", WIDTH]) for n in ("first", "second")],
        value_info=known,
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[OP.function], ir_version=10)


def ran(
    model: onnx.ModelProto | ir.Model, feeds: dict[str, np.ndarray], folder: Path | None = None
) -> list[np.ndarray]:
    proto = ir.serde.serialize_model(model) if isinstance(model, ir.Model) else model
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if folder:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    found = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )
    return [np.asarray(value) for value in found]


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize(("count", "places"), [(3, 5), (1, 700)])
def test_blocks_without_a_map_give_what_the_op_says(count: int, places: int, rows_first: bool) -> None:
    rng = np.random.default_rng(places)
    model = blocks(rows_first=rows_first)
    lowered = ir.from_proto(model)
    assert TowersTiled()(lowered).modified
    assert [n.op_type for n in lowered.graph if n.op_type in ("BlockAttention", "MultiHeadAttention")] == [
        "MultiHeadAttention"
    ] * 2
    assert not lowered.functions
    shape = (count, places, HEADS, WIDTH) if rows_first else (count, HEADS, places, WIDTH)
    feeds = {name: 3 * rng.standard_normal(shape).astype(np.float32) for name in ("q", "k", "v")}
    # What stands in a padding row is any number, and weighs nothing.
    feeds["is_real"] = np.arange(places) < rng.integers(1, places + 1, (count, 1))
    hidden = ~feeds["is_real"][:, :, None, None] if rows_first else ~feeds["is_real"][:, None, :, None]
    feeds["v"] = np.where(hidden, np.float32(1e6), feeds["v"])
    for got, wanted in zip(ran(lowered, feeds), ran(model, feeds), strict=True):
        real_BHKD = np.broadcast_to(feeds["is_real"][:, None, :, None], got.shape)
        assert np.abs(got - wanted)[real_BHKD].max() < 1e-5 * np.abs(wanted[real_BHKD]).max()


def test_blocks_of_another_type_are_left() -> None:
    assert not TowersTiled()(ir.from_proto(blocks(T.FLOAT16))).modified


def tower(places: int | str, *, dtype: int = T.FLOAT, merged: bool = True, mask: bool = False) -> onnx.ModelProto:
    """One attention over all places, as the exporter writes it; merged: its heads are put together behind it."""
    n, width = helper.make_node, HEADS * WIDTH
    nodes = []
    for x in "qkv":
        nodes += [n("Reshape", [x, "split"], [f"{x}_r"]), n("Transpose", [f"{x}_r"], [f"{x}_4"], perm=[0, 2, 1, 3])]
    nodes.append(n("Attention", ["q_4", "k_4", "v_4", *(["mask"] if mask else [])], ["a_4"], scale=0.3))
    nodes.append(n("Reshape", ["a_4", "same"], ["a_r"]))
    if merged:
        nodes += [n("Transpose", ["a_r"], ["a_t"], perm=[0, 2, 1, 3]), n("Reshape", ["a_t", "merge"], ["a"])]
    else:
        nodes.append(n("Neg", ["a_r"], ["a"]))
    of = helper.make_tensor_value_info
    ints = {
        "split": [0, 0, HEADS, WIDTH],
        "same": [0, HEADS, places if places != "K" else -1, WIDTH],
        "merge": [0, 0, width],
    }
    out = ["B", places, width] if merged else ["B", HEADS, places, WIDTH]
    graph = helper.make_graph(
        nodes,
        "tower",
        [of(x, dtype, ["B", places, width]) for x in "qkv"] + ([of("mask", T.BOOL, [places, places])] if mask else []),
        [of("a", dtype, out)],
        [helper.make_tensor(name, T.INT64, [len(value)], value) for name, value in ints.items()],
        value_info=[of(x, dtype, ["B", HEADS, places, WIDTH]) for x in ("q_4", "k_4", "v_4", "a_4", "a_r")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(
    ("places", "kind"), [(LONG - 1, "Attention"), (LONG, "MultiHeadAttention"), ("K", "MultiHeadAttention")]
)
def test_attention_over_whole_images_takes_rows_of_all_heads(places: int | str, kind: str, merged: bool) -> None:
    model = tower(places, merged=merged)
    lowered = ir.from_proto(model)
    assert TowersTiled()(lowered).modified
    behind = [] if merged else ["Reshape", "Transpose", "Reshape", "Neg"]
    assert [n.op_type for n in lowered.graph if n.op_type != "Constant"] == [kind, *behind]
    rng = np.random.default_rng(0)
    shape = (2, 5 if places == "K" else places, HEADS * WIDTH)
    feeds = {name: 2 * rng.standard_normal(shape).astype(np.float32) for name in "qkv"}
    (got,), (wanted,) = ran(lowered, feeds), ran(model, feeds)
    q, k, v = (feeds[x].reshape(*shape[:2], HEADS, WIDTH).transpose(0, 2, 1, 3).astype(np.float64) for x in "qkv")
    share = np.exp(0.3 * q @ k.swapaxes(2, 3))
    plain = (share / share.sum(-1, keepdims=True)) @ v
    plain = plain.transpose(0, 2, 1, 3).reshape(shape) if merged else -plain
    assert np.abs(got - plain).max() < 1e-5 * np.abs(plain).max()
    assert np.abs(got - wanted).max() < 1e-5 * np.abs(plain).max()


def test_rows_of_one_image_that_are_split_into_two_are_not_taken_whole() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    tower (float[1,6,8] x) => (float[2,3,8] y) {
      split = Constant <value_ints: ints = [2, 3, 2, 4]> ()
      merge = Constant <value_ints: ints = [0, 0, 8]> ()
      heads = Reshape (x, split)
      turned = Transpose <perm: ints = [0, 2, 1, 3]> (heads)
      seen = Attention (turned, turned, turned)
      back = Transpose <perm: ints = [0, 2, 1, 3]> (seen)
      y = Reshape (back, merge)
    }"""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    lowered = ir.from_proto(model)
    assert TowersTiled()(lowered).modified
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 6, 8)).astype(np.float32)}
    np.testing.assert_allclose(ran(lowered, feeds)[0], ran(model, feeds)[0], atol=1e-6)


@pytest.mark.parametrize("other", [{"dtype": T.FLOAT16}, {"mask": True}])
def test_attention_that_the_tiled_kernel_cannot_do_is_left(other: dict[str, Any]) -> None:
    assert not TowersTiled()(ir.from_proto(tower(600, **other))).modified


def turned(axis: int) -> onnx.ModelProto:
    """Two rotations of a tower's rows by the same angles, as the exporter writes them."""
    n, half = helper.make_node, WIDTH // 2
    nodes = [
        n("Concat", ["angle", "angle"], ["angles"], axis=-1),
        *(n(kind, ["angles"], [kind.lower()]) for kind in ("Cos", "Sin")),
        *(n("Unsqueeze", [name, "heads_axis"], [f"{name}_3"]) for name in ("cos", "sin")),
    ]
    for x in "qk":
        nodes += [
            n("Slice", [x, "zero", "half", "last", "one"], [f"{x}_a"]),
            n("Slice", [x, "half", "end", "last", "one"], [f"{x}_b"]),
            n("Neg", [f"{x}_b"], [f"{x}_c"]),
            n("Concat", [f"{x}_c", f"{x}_a"], [f"{x}_d"], axis=-1),
            n("Mul", [x, "cos_3"], [f"{x}_e"]),
            n("Mul", [f"{x}_d", "sin_3"], [f"{x}_f"]),
            n("Add", [f"{x}_e", f"{x}_f"], [f"{x}_r"]),
        ]
    ints = {"zero": [0], "half": [half], "end": [2**62], "last": [2], "one": [1], "heads_axis": [axis]}
    of, shape = helper.make_tensor_value_info, ["M", HEADS, WIDTH]
    graph = helper.make_graph(
        nodes,
        "tower",
        [*(of(x, T.FLOAT, shape) for x in "qk"), of("angle", T.FLOAT, ["M", half])],
        [of(f"{x}_r", T.FLOAT, shape) for x in "qk"],
        [helper.make_tensor(name, T.INT64, [len(value)], value) for name, value in ints.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


@pytest.mark.parametrize("axis", [-2, 1])
def test_a_towers_rotation_is_one_node(axis: int) -> None:
    model = turned(axis)
    lowered = ir.from_proto(model)
    assert OneRotary()(lowered).modified
    kinds = Counter(node.op_type for node in lowered.graph)
    assert (kinds["RotaryEmbedding"], kinds["Cos"], kinds["Sin"], kinds["Unsqueeze"]) == (2, 1, 1, 2)
    assert not {"Slice", "Neg", "Mul", "Concat"} & set(kinds)
    rng = np.random.default_rng(0)
    feeds = {x: rng.standard_normal((11, HEADS, WIDTH)).astype(np.float32) for x in "qk"}
    feeds["angle"] = rng.standard_normal((11, WIDTH // 2)).astype(np.float32)
    cos, sin = (np.tile(f(feeds["angle"]), 2)[:, None] for f in (np.cos, np.sin))
    got = ran(lowered, feeds)
    for x, mine, canonical in zip("qk", got, ran(model, feeds), strict=True):
        first, second = np.split(feeds[x], 2, axis=-1)
        assert np.abs(mine - (feeds[x] * cos + np.concatenate([-second, first], -1) * sin)).max() < 1e-6
        assert np.abs(mine - canonical).max() < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "covers"), [((2, 4, 4), True), ((2, 4, 2), False)])
def test_a_kernel_as_large_as_its_samples_is_a_product(
    tmp_path: Path, kernel: tuple[int, ...], covers: bool, bias: bool
) -> None:
    rng = np.random.default_rng(0)
    held = {"w": rng.standard_normal((6, 3, *kernel)).astype(np.float32), "b": np.arange(6, dtype=np.float32)}
    save_file(held, tmp_path / "model.safetensors")
    external = []
    for name, place in safetensors_file(tmp_path / "model.safetensors").tensors.items():
        tensor = onnx.TensorProto(name=name, data_type=T.FLOAT, dims=place.shape, data_location=T.EXTERNAL)
        for key, value in (("location", "model.safetensors"), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(value))
        external.append(tensor)
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    node = helper.make_node("Conv", inputs, ["y"], name="conv", kernel_shape=kernel, strides=kernel)
    out = ["M", 6, *(4 // size if i else 1 for i, size in enumerate(kernel))]
    graph = helper.make_graph(
        [node],
        "patches",
        [helper.make_tensor_value_info("x", T.FLOAT, ["M", 3, 2, 4, 4])],
        [helper.make_tensor_value_info("y", T.FLOAT, out)],
        initializer=[tensor for tensor in external if tensor.name in inputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    lowered = ir.load(tmp_path / "m.onnx")
    assert PatchesByProduct()(lowered).modified == covers
    x = rng.standard_normal((5, 3, 2, 4, 4)).astype(np.float32)
    (got,) = ran(lowered, {"x": x}, tmp_path)
    if covers:
        assert [n.op_type for n in lowered.graph if n.op_type != "Constant"] == ["Reshape", "Gemm", "Reshape"]
        wanted_MN = x.reshape(5, -1) @ held["w"].reshape(6, -1).T + (held["b"] if bias else 0)
        assert got.shape == (5, 6, 1, 1, 1)
        assert np.abs(got[:, :, 0, 0, 0] - wanted_MN).max() < 1e-4
