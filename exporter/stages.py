"""From a traced program to one ONNX file: example inputs, weights bound to their files, the interface."""

from pathlib import Path

import onnx_ir as ir
import torch

from exporter.family import Dims, Tensors
from exporter.feeds import Lengths, decoder_feed, empty_past, positions_of
from exporter.program import DecoderProgram, Program, VisionProgram
from exporter.weights import PlacedWeights
from graphs.errors import OperationFailed
from graphs.spec import (
    DType,
    LanguageModel,
    StageSpec,
    TensorSpec,
    VisualGrid,
    deepstack_names,
    past_names,
    visual_names,
)
from graphs.weights import TensorSlice

ONNX_NAME = {"float32": "FLOAT", "float16": "FLOAT16"}
CARRIERS = ("guide", "tail", "keep_", "merge_", "recycle_")
DTYPES: dict[str, DType] = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


def examples_of(
    vision: VisionProgram, decoder: DecoderProgram, language: LanguageModel, grid: VisualGrid, dtype: torch.dtype
) -> dict[str, tuple[Tensors, Dims]]:
    """Example inputs and dimension names per stage.

    Dimensions of a stage differ in size, so that one taken for another shows; with seven prune points and more some do
    not.
    """
    width, rows = language.width, 23
    points = len(decoder.plan.points)
    past = empty_past(decoder, language, dtype, [3 + 2 * j for j in range(points + 1)])
    deepstack = deepstack_names(language)
    embedded = {
        "inputs_embeds": torch.zeros(1, rows, width, dtype=dtype),
        "is_visual": torch.zeros(1, rows, dtype=torch.bool),
        **{name: torch.zeros(1, rows, width, dtype=dtype) for name in deepstack},
    }
    lengths = Lengths(guide=6, keep=tuple(rows - 2 - i for i in range(points)), tail=2, merging=(3, 5))
    feed = decoder_feed(decoder, embedded, past, positions_of(language, 0, rows), lengths)
    dims: Dims = {
        "inputs_embeds": (1, "S", width),
        "position_ids": (1, "S") if language.position_axes == 1 else (3, 1, "S"),
        "is_visual": (1, "S"),
        "priority": (1, "S"),
        "guide": ("G",),
        "tail": ("R",),
        "image_index": (1, "S"),
        **{f"{name}_{i}": (f"S_{i + 1}",) for i in range(points) for name in ("keep", "pick")},
        **{f"merge_{i}": (f"M_{i + 1}",) for i in range(points)},
        **{f"recycle_{i}": (f"Q_{i + 1}",) for i in range(points)},
        **dict.fromkeys(deepstack, (1, "S", width)),
    }
    for j, segment in enumerate(decoder.segments):
        for i in segment:
            dims |= dict.fromkeys(past_names(i), (1, language.kv_heads, f"P_{j}", language.head_dim))
    visual = {name: torch.zeros(5, width, dtype=dtype) for name in visual_names(language)}
    embed_dims: Dims = {"input_ids": (1, "S"), **dict.fromkeys(visual, ("V", width))}
    return {
        "vision": (vision.example(2), vision.dims),
        "embed": ({"input_ids": torch.zeros(1, 7, dtype=torch.int64), **visual}, embed_dims),
        "decoder": (feed, {name: dims[name] for name in feed}),
    }


def weights_used(model: ir.Model, program: Program, names: dict[int, str]) -> dict[str, str]:
    """Initialiser name → the model's name of that parameter, for those that are parameters."""
    parameters = dict(program.named_parameters(remove_duplicate=False))
    return {name: names[id(parameters[name])] for name in model.graph.initializers if name in parameters}


def bind(model: ir.Model, used: dict[str, str], placed: PlacedWeights, base: Path) -> None:
    """Point the initialisers into the weight files; those of one place become one, which a runtime loads once."""
    bound: dict[TensorSlice, ir.Value] = {}
    for name, parameter in used.items():
        where = placed.slices[parameter]
        value = model.graph.initializers[name]
        if bound.setdefault(where, value) is not value:
            ir.convenience.replace_all_uses_with(value, bound[where])
            del model.graph.initializers[name]
            continue
        value.const_value = ir.ExternalTensor(
            where.file.name,
            where.offset,
            where.length,
            ir.DataType[ONNX_NAME[where.dtype]],
            shape=ir.Shape(where.shape),
            name=name,
            base_dir=base,
        )


def write_stage(model: ir.Model, work: Path, name: str) -> StageSpec:
    """Save one stage's file and return its interface, read from the finished graph."""
    ir.save(model, work / f"{name}.onnx")
    return StageSpec(
        file=f"{name}.onnx",
        inputs=tuple(_tensor_spec(v) for v in model.graph.inputs),
        outputs=tuple(_tensor_spec(v) for v in model.graph.outputs),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise OperationFailed(f"tracing left {value!r} without name, dtype or shape; report this checkpoint")
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(
        name=value.name, dtype=DTYPES[value.dtype.name], shape=shape, carrier=value.name.startswith(CARRIERS)
    )
