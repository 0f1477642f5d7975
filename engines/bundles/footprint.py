"""How much memory a model takes on a target: estimated at the build from its graphs, held against what is free at open.

Weights as files, caches at the bounds, and the most that lives at once between the nodes of each stage's graph, every
size at its bound. What a runtime packs or fuses is its own business, so these are estimates: of weights on a CPU by a
measured factor, of attention as if no kernel were fused; the insides of bodies other than AttentionReceived's are left
out.
Legend: S rows of a chunk, T rows of a cache, G guide rows, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from engines.bundles.manifest import EngineEntry, Footprint, MemberEntry
from engines.sessions.host_memory import free_memory
from engines.targets import TARGETS
from engines.trt.bounds import Bounds
from graphs.console import say, warn
from graphs.dims import size_of, symbols_of
from graphs.errors import OperationFailed
from graphs.ops import DOMAIN, RECEIVED
from graphs.ops.attention_received import PIECE
from graphs.rules.rule import Export, Stage, all_inputs_of, attribute_of
from graphs.spec import ExportSpec, form_of

if TYPE_CHECKING:
    from engines.bundles.bundle import Bundle

# Bytes in memory per byte of weights: a decoder of 8 layers of width 768, ONNX Runtime 1.31.1 on x86-64. Its whole
# estimate was 0.84 (fp32) and 0.99 (fp16) of what a prefill of 2,000 rows and three steps took at their peak.
ON_A_CPU = {"float32": 1.2, "float16": 2.2, "bfloat16": 1.2}
# The same of fp16 where the target makes fp32 of it and packs that: Qwen2-VL-2B in OpenVINO 2026.4.1, 4.4 GB of fp16
# computed in fp32, took 19.8 GB, of which caches and activations are estimated as 2.4.
MADE_WIDE_AND_PACKED = 4.0
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
OLD_AND_NEW = 2  # a step reads one cache and writes the next; written in place, two conversations' views
# ONNX element type → bytes; a float takes what the target computes in.
BYTES = {2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 11: 8}
FLOATS = (1, 10, 16)

Shapes = dict[str, tuple[int, tuple[int, ...]]]  # value → bytes of an element, sizes at the bounds


def footprint_of(
    export: Export, target: str, dtype: str, weight_bytes: int, engines: Mapping[str, EngineEntry]
) -> Footprint:
    """Estimate a model on a target.

    export: its canonical graphs. dtype: what it computes in there. engines: those built for it, whose profiles are the
    bounds; for graphs, which have none, the defaults of engines.
    """
    bounds = _bounds_of(engines) if engines else Bounds()
    bounds = bounds.fitted(export.spec, None)
    sizes = _sizes(export.spec, bounds)
    on_host = TARGETS[target].memory == "host"
    language = export.spec.language
    width = 4 if on_host else WIDTHS[dtype]  # a CPU computes in fp32
    held = 4 if dtype in TARGETS[target].wide_caches else WIDTHS[dtype]
    factor = MADE_WIDE_AND_PACKED if dtype == "float16" and TARGETS[target].widened else ON_A_CPU[dtype]
    per_row = 2 * language.layers * language.kv_heads * language.head_dim * held
    return Footprint(
        rows=sizes["T"],
        images=sizes["N"],
        weight_bytes=sum(e.bytes for e in engines.values()) or int(weight_bytes * (factor if on_host else 1)),
        cache_bytes=OLD_AND_NEW * per_row * sizes["T"],
        activation_bytes={name: live_bytes(stage, sizes, width) for name, stage in export.stages.items()},
    )


def live_bytes(stage: Stage, sizes: Mapping[str, int], float_bytes: int) -> int:
    """The most bytes of intermediate tensors that live at once, each from its node to its last reader.

    sizes: symbol → its bound. Not counted: inputs, outputs, and what is made of weights alone.
    """
    graph = stage.model.graph
    shapes = _shapes(stage.model, sizes, float_bytes)
    outer = {value.name for value in (*graph.input, *graph.output)}
    fixed = {value.name for value in graph.initializer}
    reads = [all_inputs_of(node) for node in graph.node]
    last = {name: i for i, names in enumerate(reads) for name in names}
    most, live = 0, 0
    dying: dict[int, int] = {}
    for i, node in enumerate(graph.node):
        names = [name for name in node.output if name]
        if all(name in fixed for name in reads[i]):
            fixed.update(names)
            continue
        for name in names:
            if name in shapes and name not in outer:
                width, shape = shapes[name]
                live += width * prod(shape)
                dying[last.get(name, i)] = dying.get(last.get(name, i), 0) + width * prod(shape)
        most = max(most, live + _inside(node, shapes, float_bytes, sizes))
        live -= dying.pop(i, 0)
    return most


def refuse_what_cannot_fit(bundle: Bundle) -> None:
    """Compare an opened bundle's estimates with the free bytes of its target's memory, or say that these are unknown.

    OperationFailed where the weights of its models, as files or what is made of them at every opening, are more than is
    free; a warning where the whole is.
    """
    of = "host memory" if TARGETS[bundle.target].memory == "host" else "device memory"
    entries = [member.targets[bundle.target] for member in bundle.manifest.members.values()]
    weights = sum(_held_weights(bundle.target, member) for member in bundle.manifest.members.values())
    needed = sum(e.footprint.total for e in entries)
    free = free_bytes(bundle.target)
    if free is None:
        say(
            f"how much {of} is free cannot be determined on this machine, so the estimated need of {_gb(needed)} is "
            "not checked"
        )
        return
    if weights > free:
        chosen = TARGETS[bundle.target]
        narrower = " or with a narrower --precision" if chosen.precisions or chosen.runs == "engines" else ""
        raise OperationFailed(
            f"{bundle.path} cannot be opened on target {bundle.target}: its weights alone take {_gb(weights)} of {of}, "
            f"and {_gb(free)} are free; free some, or build it from smaller models{narrower}"
        )
    if needed > free:
        rows, images = (max(getattr(e.footprint, which) for e in entries) for which in ("rows", "images"))
        warn(
            f"{bundle.path} is estimated to take {_gb(needed)} of {of} with caches of {rows} rows and {images} images "
            f"or tiles, and {_gb(free)} are free; long conversations may not fit"
        )


def _held_weights(target: str, member: MemberEntry) -> int:
    """What weights take at least: the files' bytes, or of fp16 on a host their copies in fp32, a table's left out.

    Rows of a table are looked up in fp16.
    """
    entry, language = member.targets[target], member.language
    if TARGETS[target].memory != "host" or entry.dtype != "float16":
        return entry.weight_bytes
    return 2 * entry.weight_bytes - 2 * language.vocab * language.width


def free_bytes(target: str) -> int | None:
    """Free bytes of the memory that a target takes; None where the system or the driver does not say."""
    if TARGETS[target].memory == "host":
        return free_memory()
    return _free_on_device()


def footprint_in_words(footprint: Footprint) -> str:
    """The parts as one line."""
    stages = ", ".join(f"{stage} {_gb(count)}" for stage, count in footprint.activation_bytes.items())
    return (
        f"{_gb(footprint.total)}: weights {_gb(footprint.weight_bytes)}, caches of {footprint.rows} rows "
        f"{_gb(footprint.cache_bytes)}, activations of {stages}"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _free_on_device() -> int | None:
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    try:
        error, free, _ = runtime.cudaMemGetInfo()
        if int(error):
            return None
        _, integrated = runtime.cudaDeviceGetAttribute(runtime.cudaDeviceAttr.cudaDevAttrIntegrated, 0)
    except RuntimeError:  # the binding's own, where no driver can be loaded
        return None
    # Where the host's memory is the GPU's, CUDA counts pages of files in it as taken.
    return free_memory() if integrated else int(free)


def _bounds_of(engines: Mapping[str, EngineEntry]) -> Bounds:
    """The bounds that engines were built with, read back from their profiles."""
    decoder, vision = (engines[stage].profiles for stage in ("decoder", "vision"))
    largest: dict[str, tuple[int, ...]] = {}
    for profile in decoder.values():
        for name, (_, _, most) in profile.items():
            largest[name] = max(largest.get(name, most), most)
    pixels = [profile["pixel_values"][2] for profile in vision.values()]
    return Bounds(
        max_prompt=largest["inputs_embeds"][1],
        # A buffer is as long as the cache may become; a past is one row shorter, for the step's own.
        max_length=largest["past_k_0"][2] + (form_of(largest) == "concat"),
        max_guide=largest["guide"][0] if "guide" in largest else None,
        max_tail=largest["tail"][0],
        # Rank 4: images or tiles. Packed patches do not tell.
        max_images=max(most[0] for most in pixels) if all(len(most) == 4 for most in pixels) else None,
    )


def _sizes(spec: ExportSpec, bounds: Bounds) -> dict[str, int]:
    """Symbol of ``graphs.spec`` → its bound; a number behind it (S_1, P_0) does not make it larger."""
    rows, length, images = bounds.max_prompt or 1, bounds.max_length or 1, bounds.max_images or 1
    grid = spec.grid
    patches = grid.merge**2 * rows
    return {
        "S": rows,
        "T": length,
        "P": max(0, length - rows),
        "G": bounds.max_guide or 1,
        "R": bounds.max_tail or 1,
        "V": rows,
        "N": images,
        "I": images,
        "K": patches,
        "W": grid.most_windows(patches, images),
        "M": rows,
        "Q": rows,
    }


def _shapes(model: Any, sizes: Mapping[str, int], float_bytes: int) -> Shapes:
    """Every value of the main graph whose type and rank are known."""
    if not model.graph.value_info:
        import onnx

        model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    found: Shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        width = float_bytes if kind.elem_type in FLOATS else BYTES.get(kind.elem_type, 4)
        if kind.HasField("shape"):
            dims = kind.shape.dim
            found[value.name] = width, tuple(d.dim_value or _size(d.dim_param, sizes) for d in dims)
    return found


def _size(dimension: str, sizes: Mapping[str, int]) -> int:
    """A symbolic dimension at its bound, 1 where it has no name; of a quotient the largest symbol in it."""
    at = {symbol: sizes.get(symbol.partition("_")[0], sizes["T"]) for symbol in symbols_of(dimension)}
    if not dimension or "/" in dimension or "(" in dimension:
        return max(at.values(), default=sizes["T"] if dimension else 1)
    try:
        return max(1, size_of(dimension, at))
    except KeyError:
        return sizes["T"]


def _inside(node: Any, shapes: Shapes, float_bytes: int, sizes: Mapping[str, int]) -> int:
    """Bytes that a node takes for itself while it runs: the map of an attention."""
    if node.op_type == "Attention" and not node.domain:
        return _map_bytes(node, shapes, float_bytes, sizes)
    if node.domain == DOMAIN and node.op_type in RECEIVED and node.input[0] in shapes:
        _, q_BHSd = shapes[node.input[0]]
        return q_BHSd[1] * min(PIECE, sizes["G"]) * sizes["T"] * 4
    return 0


def _map_bytes(node: Any, shapes: Shapes, float_bytes: int, sizes: Mapping[str, int]) -> int:
    """H · S · T of one attention, from 3D inputs with head counts as attributes or from 4D ones."""
    if not {*node.input[:2]} <= shapes.keys():
        return 0
    (_, q), (_, k) = (shapes[name] for name in node.input[:2])
    heads, rows = (q[1], q[2]) if len(q) == 4 else (attribute_of(node, "q_num_heads", 1), q[1])
    has_past = len(node.input) > 4 and node.input[4]
    keys = sizes["T"] if has_past else k[-2]
    return q[0] * heads * rows * keys * float_bytes
