"""Tiny export folders made by hand, without torch: every rule holds and the golden tensors replay.

Legend: D = 8 width, H = 2 heads, V = 1 key-value head, d = 4, 2 decoder layers, vocabulary 16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from safetensors.numpy import save_file

from graphs.ops import OPS
from graphs.plan import PruningPlan
from graphs.policies import plan_of_policy
from graphs.spec import (
    GOLDEN_FILE,
    PROCESSOR_FOLDER,
    SPEC_FILE,
    ExportSpec,
    LanguageModel,
    StageSpec,
    Tokens,
    VisualGrid,
    WeightFile,
)
from graphs.weights import safetensors_file

WEIGHTS = "model.safetensors"
IMAGE_TOKEN = 15
LAYERS = 2
KINDS = {1: "float32", 7: "int64", 6: "int32", 9: "bool"}
CARRIERS = {"guide", "tail", "keep_0"}


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint's tensors."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"patch": (12, 8), "words": (16, 8), "head": (8, 16)}
    for layer in range(LAYERS):
        shapes |= {f"q{layer}": (8, 8), f"k{layer}": (8, 4), f"v{layer}": (8, 4), f"o{layer}": (8, 8)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def vision_text() -> str:
    return """<ir_version: 11, opset_import: ["" : 23]>
    vision (float[N,3,4,4] pixel_values) => (float[V,8] visual_embeds) {
      to_patches = Constant <value_ints: ints = [-1, 12]> ()
      patches = Reshape (pixel_values, to_patches)
      visual_embeds = MatMul (patches, patch)
    }"""


def embed_text() -> str:
    return f"""<ir_version: 11, opset_import: ["" : 23]>
    embed (int64[1,S] input_ids, float[V,8] visual_embeds) => (float[1,S,8] inputs_embeds, bool[1,S] is_visual) {{
      image = Constant <value_int: int = {IMAGE_TOKEN}> ()
      one = Constant <value_int: int = 1> ()
      last = Constant <value_ints: ints = [-1]> ()
      axis_1 = Constant <value_int: int = 1> ()
      zero = Constant <value_int: int = 0> ()
      is_visual = Equal (input_ids, image)
      counted = Cast <to: int = 7> (is_visual)
      upto = CumSum (counted, axis_1)
      row = Sub (upto, one)
      row_or_0 = Max (row, zero)
      text = Gather <axis: int = 0> (words, input_ids)
      seen = Gather <axis: int = 0> (visual_embeds, row_or_0)
      chosen = Unsqueeze (is_visual, last)
      inputs_embeds = Where (chosen, seen, text)
    }}"""


def decoder_text(plan: PruningPlan) -> str:
    """The decoder under a plan: guidance of all layers, or one prune point before layer 1."""
    point = plan.points[0] if plan.points else None
    inputs = ["float[1,S,8] inputs_embeds", "int64[1,S] position_ids"]
    outputs = ["float[1,R,16] logits"]
    if point:
        inputs.append("bool[1,S] is_visual")
    if plan.uses_guide:
        inputs.append("int32[G] guide")
    if point:
        inputs.append("int32[S_1] keep_0")
        outputs.append("int64[1,S_1] kept_0")
    inputs.append("int32[R] tail")
    if plan.uses_priority:
        inputs.append("float[1,S] priority")
    if plan.guidance:
        outputs.append("float[1,T] attention_received")
    for layer in range(LAYERS):
        past = f"P_{layer if point else 0}"
        inputs += [f"float[1,1,{past},4] past_{x}_{layer}" for x in "kv"]
        outputs += [f"float[1,1,T_{layer},4] present_{x}_{layer}" for x in "kv"]
    body = """
      small = Constant <value_float: float = 0.1> ()
      last = Constant <value_ints: ints = [-1]> ()
      axis_1 = Constant <value_ints: ints = [1]> ()
      end = Constant <value_ints: ints = [9223372036854775807]> ()
      heads = Constant <value_ints: ints = [0, 0, 2, 4]> ()
      position = Cast <to: int = 1> (position_ids)
      position_small = Mul (position, small)
      position_column = Unsqueeze (position_small, last)
      x0 = Add (inputs_embeds, position_column)
    """
    for layer in range(LAYERS):
        x = f"x{layer}"
        if point and point.layer == layer:
            body += _cut(point.score, x)
            x = "x_kept"
        body += f"""
      q_{layer} = MatMul ({x}, q{layer})
      k_{layer} = MatMul ({x}, k{layer})
      v_{layer} = MatMul ({x}, v{layer})
      mix_{layer}, present_k_{layer}, present_v_{layer} =
        Attention <is_causal: int = 1, q_num_heads: int = 2, kv_num_heads: int = 1>
          (q_{layer}, k_{layer}, v_{layer}, , past_k_{layer}, past_v_{layer})
      out_{layer} = MatMul (mix_{layer}, o{layer})
      x{layer + 1} = Add ({x}, out_{layer})
        """
        if plan.guidance or (point and point.score == "attention" and point.layer == layer + 1):
            body += f"""
      q_split_{layer} = Reshape (q_{layer}, heads)
      q_heads_{layer} = Transpose <perm: ints = [0, 2, 1, 3]> (q_split_{layer})
      received_{layer} = saccade.AttentionReceived <scale: float = 0.5> (q_heads_{layer}, present_k_{layer}, guide)
            """
    if plan.guidance:
        body += "attention_received = Sum (received_0, received_1)\n"
    body += f"""
      rows = Shape (tail)
      start = Neg (rows)
      x_tail = Slice (x{LAYERS}, start, end, axis_1)
      logits = MatMul (x_tail, head)
    """
    return f"""<ir_version: 11, opset_import: ["" : 23, "saccade" : 1]>
    decoder ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {body} }}"""


def _cut(score: str, x: str) -> str:
    source = "score = Identity (priority)"
    if score == "attention":
        source = """
      chunk = Shape <start: int = 1, end: int = 2> (is_visual)
      chunk_start = Neg (chunk)
      score = Slice (received_0, chunk_start, end, axis_1)"""
    return f"""
      {source}
      kept_0 = saccade.KeepTopK (score, is_visual, keep_0)
      x_kept = saccade.CompactRows ({x}, kept_0)
    """


def model_from_text(text: str, folder: Path) -> onnx.ModelProto:
    """Parse a model, attach our bodies where used, bind free names to the weight file of ``folder``."""
    model = onnx.parser.parse_model(text)
    used = {node.op_type for node in model.graph.node if node.domain == "saccade"}
    model.functions.extend(OPS[name].function for name in sorted(used))
    free = {name for node in model.graph.node for name in node.input}
    for name, tensor in safetensors_file(folder / WEIGHTS).tensors.items():
        if name not in free:
            continue
        proto = model.graph.initializer.add(
            name=name, data_type=onnx.TensorProto.FLOAT, dims=tensor.shape, data_location=onnx.TensorProto.EXTERNAL
        )
        for key, value in (("location", WEIGHTS), ("offset", tensor.offset), ("length", tensor.length)):
            proto.external_data.add(key=key, value=str(value))
    return model


def stage_spec(model: onnx.ModelProto, file: str) -> StageSpec:
    """The interface of a model as spec.json writes it."""

    def tensor(value: Any) -> dict[str, Any]:
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
        carrier = value.name in CARRIERS
        return {"name": value.name, "dtype": KINDS[kind.elem_type], "shape": shape, "carrier": carrier}

    graph = model.graph
    return StageSpec(file=file, inputs=[tensor(i) for i in graph.input], outputs=[tensor(o) for o in graph.output])


def write_export(
    folder: Path, role: str = "small", policy: str = "sgl", *, seed: int = 0, plan: PruningPlan | None = None
) -> Path:
    """Write a whole export folder: two layers, a grid of 2 × 2, greedy golden tensors."""
    folder.mkdir(parents=True)
    save_file(weights(seed), folder / WEIGHTS)
    options = {"fraction": 0.5} if policy == "sgl" and role != "small" else {}
    plan = plan or plan_of_policy(policy, role, LAYERS, **options)  # type: ignore[arg-type]
    texts = {"vision": vision_text(), "embed": embed_text(), "decoder": decoder_text(plan)}
    models = {name: model_from_text(text, folder) for name, text in texts.items()}
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    spec = ExportSpec(
        family="hand_made",
        architecture="HandMade",
        role=role,
        dtype="float32",
        plan=plan,
        language=LanguageModel(layers=LAYERS, width=8, heads=2, kv_heads=1, head_dim=4, vocab=16, max_positions=64),
        grid=VisualGrid(image_height=4, image_width=4, rows=2, columns=2),
        tokens=Tokens(image=IMAGE_TOKEN, image_text="<image>", eos=(1,), pad=0),
        stages={name: stage_spec(model, f"{name}.onnx") for name, model in models.items()},
        weights=(WeightFile(name=WEIGHTS, bytes=(folder / WEIGHTS).stat().st_size),),
        weights_are="copy",
        tools={"hand": "made"},
    )
    (folder / SPEC_FILE).write_text(spec.dumps())
    write_processor(folder / PROCESSOR_FOLDER)
    write_golden(folder, spec, seed)
    return folder


def write_processor(folder: Path) -> None:
    """A tokenizer and a chat template, as files only."""
    folder.mkdir()
    vocab = {f"w{i}": i for i in range(IMAGE_TOKEN)}
    special = [{"id": 1, "content": "w1", "special": True}, {"id": IMAGE_TOKEN, "content": "<image>", "special": True}]
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": special}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w1"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def golden_inputs(spec: ExportSpec, seed: int) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """stage → case → inputs; the decoder's later cases are chained by hand with random caches."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def decoder(rows: int, visual: int, past: int, keep: int) -> dict[str, np.ndarray]:
        is_visual = np.zeros((1, rows), bool)
        is_visual[0, 1 : 1 + visual] = True
        feeds = {
            "inputs_embeds": noise(1, rows, 8),
            "position_ids": past + np.arange(rows, dtype=np.int64)[None],
            "is_visual": is_visual,
            "guide": np.zeros(1, np.int32),
            "keep_0": np.zeros(keep, np.int32),
            "tail": np.zeros(1, np.int32),
            "priority": noise(1, rows),
        }
        for layer in range(LAYERS):
            feeds |= {f"past_{x}_{layer}": noise(1, 1, past, 4) for x in "kv"}
        wanted = {t.name for t in spec.stages["decoder"].inputs}
        return {name: value for name, value in feeds.items() if name in wanted}

    ids = np.array([[2, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 3]], np.int64)
    return {
        "vision": {"one": {"pixel_values": noise(1, 3, 4, 4)}, "two": {"pixel_values": noise(2, 3, 4, 4)}},
        "embed": {"one": {"input_ids": ids, "visual_embeds": noise(4, 8)}},
        "decoder": {"prefill": decoder(7, 4, 0, 5), "chunk": decoder(2, 0, 5, 2), "decode": decoder(1, 0, 7, 1)},
    }


def write_golden(folder: Path, spec: ExportSpec, seed: int) -> None:
    """Inputs, and the outputs that ONNX Runtime gives: these replay by construction."""
    import onnxruntime as ort

    tensors = {}
    for stage, cases in golden_inputs(spec, seed).items():
        session = ort.InferenceSession(folder / f"{stage}.onnx", providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        for case, feeds in cases.items():
            tensors |= {f"{stage}/{case}/in/{name}": value for name, value in feeds.items()}
            results = zip(names, session.run(names, feeds), strict=True)
            tensors |= {f"{stage}/{case}/out/{name}": np.ascontiguousarray(value) for name, value in results}
    save_file(tensors, folder / GOLDEN_FILE, metadata={"schema": "saccade.golden/1"})


def edit_model(folder: Path, stage: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change one stage's graph in place; its external data stays where it is."""
    path = folder / f"{stage}.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def edit_spec(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change spec.json in place."""
    path = folder / SPEC_FILE
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
