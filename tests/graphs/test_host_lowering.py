"""What the CPU's passes write, held to plain numpy and to the canonical graphs in ONNX Runtime.

Legend: N outputs, K inputs, J blocks, k values of a block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper
from safetensors.numpy import load_file, save_file

from graphs.lowering.host import mapped
from graphs.lowering.packing import Packing
from graphs.lowering.quantised import Bits, quantised
from graphs.packed import PACKED
from graphs.weights import safetensors_file

WIDTH, HEADS, GROUPS, HEAD, VOCAB = 64, 4, 2, 16, 96


def dequantised(q: np.ndarray, scale: np.ndarray, bits: int, width: int) -> np.ndarray:
    """W [N,K] as MatMulNBits documents it: low half first, zero point 2^(bits−1)."""
    if bits == 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:-1], -1)
    return ((q.astype(np.float32) - 2 ** (bits - 1)) * scale[..., None]).reshape(q.shape[0], -1)[:, :width]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 72])
def test_a_value_is_at_most_half_a_step_from_its_code(bits: int, width: int) -> None:
    weight_NK = np.random.default_rng(0).standard_normal((5, width)).astype(np.float32)
    weight_NK[3] = 0
    q, scale_NJ = quantised(weight_NK, bits, 32)
    again_NK = dequantised(q, scale_NJ, bits, width)
    step_NK = np.repeat(np.abs(scale_NJ), 32, axis=1)[:, :width]
    # The one value that may be a whole step off lies opposite to the block's largest, where the codes end.
    assert (np.abs(again_NK - weight_NK) <= step_NK * 1.0001).all()
    assert (np.abs(again_NK - weight_NK) <= step_NK * 0.5001).mean() > 0.97
    assert (again_NK[3] == 0).all()
    largest_N = np.abs(weight_NK).argmax(1)
    rows = np.arange(3)
    assert np.allclose(again_NK[rows, largest_N[:3]], weight_NK[rows, largest_N[:3]], rtol=1e-6)


@pytest.mark.parametrize(("width", "block"), [(896, 128), (64, 64), (96, 32), (1368, 128), (8, 16)])
def test_the_block_divides_the_row_or_pads_it(width: int, block: int) -> None:
    assert Bits(8, 128).block_of(width) == block


def layer(folder: Path, *, dtype: type = np.float32, tied: bool = True, early: bool = False) -> dict[str, np.ndarray]:
    """One attention layer as the exporter writes it, rotated by halves, a table and a head, in three files.

    early: the inputs cos and sin are angles, twice the same before their cosine and sine are taken and scaled, as in
    Llama with YaRN.
    """
    rng = np.random.default_rng(1)

    def drawn(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(dtype)

    held = {
        "table": drawn(VOCAB, WIDTH),
        "q": drawn(HEADS * HEAD, WIDTH),
        "k": drawn(GROUPS * HEAD, WIDTH),
        "v": drawn(GROUPS * HEAD, WIDTH),
        "o": drawn(WIDTH, HEADS * HEAD),
        "up": drawn(3 * WIDTH, WIDTH),
        "down": drawn(WIDTH, 3 * WIDTH),
        "bias": drawn(WIDTH),
    } | ({} if tied else {"head": drawn(VOCAB, WIDTH)})
    save_file(held, folder / "model.safetensors")
    slices = safetensors_file(folder / "model.safetensors").tensors
    kind = T.FLOAT if dtype is np.float32 else T.FLOAT16

    def external(name: str) -> onnx.TensorProto:
        place = slices[name]
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=place.shape, data_location=T.EXTERNAL)
        for key, value in (("location", place.file.name), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def linear(x: str, weight: str, out: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Transpose", [weight], [f"{out}_w"], perm=[1, 0], name=f"{out}_t"),
            helper.make_node("MatMul", [x, f"{out}_w"], [out], name=f"{out}_m"),
        ]

    def split(x: str, count: int, out: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Reshape", [x, f"heads_{count}"], [f"{out}_r"], name=f"{out}_r"),
            helper.make_node("Transpose", [f"{out}_r"], [out], perm=[0, 2, 1, 3], name=f"{out}_s"),
        ]

    def turned(x: str, out: str) -> list[onnx.NodeProto]:
        n = helper.make_node
        return [
            n("Slice", [x, "zero", "half", "last", "one"], [f"{out}_a"], name=f"{out}_1"),
            n("Slice", [x, "half", "end", "last", "one"], [f"{out}_b"], name=f"{out}_2"),
            n("Neg", [f"{out}_b"], [f"{out}_c"], name=f"{out}_3"),
            n("Concat", [f"{out}_c", f"{out}_a"], [f"{out}_d"], axis=-1, name=f"{out}_4"),
            n("Mul", [x, "cos_4"], [f"{out}_e"], name=f"{out}_5"),
            n("Mul", [f"{out}_d", "sin_4"], [f"{out}_f"], name=f"{out}_6"),
            n("Add", [f"{out}_e", f"{out}_f"], [out], name=f"{out}_7"),
        ]

    n = helper.make_node
    nodes = [
        *(
            node
            for name in ("cos", "sin")
            for node in (
                n("Concat", [name, name], [f"{name}_{1 if early else 2}"], axis=-1, name=f"{name}_c"),
                *([n(name.title(), [f"{name}_1"], [f"{name}_0"], name=f"{name}_o")] if early else []),
                *([n("Mul", [f"{name}_0", "scaling"], [f"{name}_2"], name=f"{name}_s")] if early else []),
                n("Unsqueeze", [f"{name}_2", "one"], [f"{name}_4"], name=f"{name}_u"),
            )
        ),
        *linear("inputs_embeds", "q", "q_3"),
        *split("q_3", HEADS, "q_4"),
        *turned("q_4", "q_r"),
        *linear("inputs_embeds", "k", "k_3"),
        *split("k_3", GROUPS, "k_4"),
        *turned("k_4", "k_r"),
        *linear("inputs_embeds", "v", "v_3"),
        *split("v_3", GROUPS, "v_4"),
        n(
            "Attention",
            ["q_r", "k_r", "v_4", "", "past_k_0", "past_v_0"],
            ["a_4", "present_k_0", "present_v_0"],
            is_causal=1,
            name="attention",
        ),
        n("Transpose", ["a_4"], ["a_t"], perm=[0, 2, 1, 3], name="a_t"),
        n("Reshape", ["a_t", "together"], ["a_3"], name="a_3"),
        *linear("a_3", "o", "o_3"),
        n("Add", ["o_3", "bias"], ["o_b"], name="o_b"),
        *linear("o_b", "up", "up_3"),
        *linear("up_3", "down", "down_3"),
        *linear("down_3", "table" if tied else "head", "logits"),
    ]
    ints = {"zero": [0], "half": [HEAD // 2], "end": [2**40], "last": [3], "one": [1], "together": [0, 0, -1]}
    ints |= {f"heads_{count}": [0, 0, count, HEAD] for count in (HEADS, GROUPS)}
    small = [helper.make_tensor(name, T.INT64, [len(value)], value) for name, value in ints.items()]
    small += [helper.make_tensor("scaling", kind, [], [1.25])] if early else []
    of = helper.make_tensor_value_info
    rows = [1, "S", HEAD // 2]
    past = [[1, GROUPS, "P", HEAD], [1, GROUPS, "T", HEAD]]
    weights = [external(name) for name in held if name != "table" or tied]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [of("inputs_embeds", kind, [1, "S", WIDTH]), of("cos", kind, rows), of("sin", kind, rows)]
        + [of(name, kind, past[0]) for name in ("past_k_0", "past_v_0")],
        [of("logits", kind, [1, "S", VOCAB]), *(of(name, kind, past[1]) for name in ("present_k_0", "present_v_0"))],
        [*weights, *small],
    )
    decoder = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    # Shapes as the exporter's own inference writes them.
    decoder = onnx.shape_inference.infer_shapes(decoder, data_prop=True)
    onnx.save(decoder, folder / "decoder.onnx")
    gathered = helper.make_graph(
        [n("Gather", ["table", "input_ids"], ["inputs_embeds"], name="gather")],
        "embed",
        [of("input_ids", T.INT64, [1, "S"])],
        [of("inputs_embeds", kind, [1, "S", WIDTH])],
        [external("table")],
    )
    embed = helper.make_model(gathered, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(embed, folder / "embed.onnx")
    return held


def fed(rows: int, past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    angle = rng.standard_normal((1, rows, HEAD // 2))
    return {
        "inputs_embeds": rng.standard_normal((1, rows, WIDTH)),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "past_k_0": rng.standard_normal((1, GROUPS, past, HEAD)),
        "past_v_0": rng.standard_normal((1, GROUPS, past, HEAD)),
    }


def ran(source: Path | bytes, feed: dict[str, np.ndarray], folder: Path, **options: str) -> list[np.ndarray]:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    for key, value in options.items():
        settings.add_session_config_entry(f"session.{key}", value)
    session = ort.InferenceSession(source if isinstance(source, bytes) else str(source), settings)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    return list(session.run(None, {i.name: feed[i.name].astype(types[i.type]) for i in session.get_inputs()}))


def ops_of(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("rows", "past"), [(5, 0), (1, 6), (3, 4)])
def test_mapped_is_the_same_with_fewer_nodes_and_no_copy(tmp_path: Path, rows: int, past: int, early: bool) -> None:
    layer(tmp_path, early=early)
    model = ir.load(tmp_path / "decoder.onnx")
    assert mapped(model)
    ops = ops_of(model)
    assert (ops.count("FusedMatMul"), ops.count("RotaryEmbedding"), ops.count("Transpose")) == (7, 2, 0)
    assert not {"MatMul", "Reshape", "Slice", "Neg"} & set(ops)
    # What the halves are made by stands once, however many layers read it.
    assert [ops.count(kind) for kind in ("Concat", "Cos", "Sin", "Mul")] == ([0, 1, 1, 2] if early else [0] * 4)
    wanted = ran(tmp_path / "decoder.onnx", fed(rows, past), tmp_path)
    got = ran(ir.serde.serialize_model(model).SerializeToString(), fed(rows, past), tmp_path, disable_prepacking="1")
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def test_weights_of_another_type_are_left_to_the_runtime(tmp_path: Path) -> None:
    layer(tmp_path, dtype=np.float16)
    model = ir.load(tmp_path / "decoder.onnx")
    before = ops_of(model)
    assert not mapped(model)
    assert ops_of(model) == before


def packed(folder: Path, precision: str, out: Path) -> Packing:
    out.mkdir()
    packing = Packing(precision, out)  # type: ignore[arg-type]
    for stage in ("embed", "decoder"):
        model = ir.load(folder / f"{stage}.onnx")
        packing.apply(model)
        assert model.metadata_props[PACKED] == precision
        ir.save(model, out / f"{stage}.onnx")
    packing.write()
    return packing


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_packed_fp32_computes_what_the_weights_say(tmp_path: Path, dtype: type) -> None:
    held = layer(tmp_path, dtype=dtype)
    packed(tmp_path, "fp32", tmp_path / "cpu")
    wide = tmp_path / "wide"
    wide.mkdir()
    layer(wide)  # the same draws in fp32, then the stored values of dtype in their place
    stored = {name: value.astype(np.float32) for name, value in held.items()}
    save_file(stored, wide / "model.safetensors")
    wanted = ran(wide / "decoder.onnx", fed(4, 3), wide)
    got = ran(tmp_path / "cpu" / "decoder.onnx", fed(4, 3), tmp_path / "cpu", disable_prepacking="1")
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
    tensors = load_file(tmp_path / "cpu" / "weights.safetensors")
    assert (next(value for name, value in tensors.items() if name.endswith("up")) == stored["up"]).all()
    assert sum(value.shape == (VOCAB, WIDTH) for value in tensors.values()) == 1, "a tied table lies once"


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_files_compute_with_the_quantised_weights(
    tmp_path: Path, precision: str, bits: int, tied: bool
) -> None:
    """Held to the canonical graph over the rounded weights; what is left is the rounding of activations."""
    held = layer(tmp_path, tied=tied)
    packed(tmp_path, precision, tmp_path / "cpu")
    rounded = {}
    for name, value in held.items():
        of = 8 if name in ("table", "head") else bits
        block = Bits(of, 128).block_of(value.shape[-1])
        rounded[name] = value if value.ndim < 2 else dequantised(*quantised(value, of, block), of, value.shape[1])
    reference = tmp_path / "rounded"
    reference.mkdir()
    layer(reference, tied=tied)
    save_file(rounded, reference / "model.safetensors")
    wanted = ran(reference / "decoder.onnx", fed(4, 3), reference)
    got = ran(tmp_path / "cpu" / "decoder.onnx", fed(4, 3), tmp_path / "cpu")
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()
    ids = {"input_ids": np.array([[3, 95, 0]])}
    rows = ran(tmp_path / "cpu" / "embed.onnx", ids, tmp_path / "cpu")[0]
    assert np.allclose(rows, rounded["table"][ids["input_ids"]], atol=1e-6)
    tensors = load_file(tmp_path / "cpu" / "weights.safetensors")
    tables = [value for name, value in tensors.items() if name.endswith((".table.q", ".head.q"))]
    assert len(tables) == (1 if tied else 2), "a tied table lies once"
