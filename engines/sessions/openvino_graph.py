"""A graph of ours as OpenVINO takes it: functions inlined, and a decoder's caches as blocks that are written in place.

OpenVINO's frontend knows no model-local functions, its ``TopK`` breaks ties by chance, and its ``Attention`` on a past
joins the cache anew, tiles it to the query heads and makes a mask per layer. So nodes of a domain of ours stand in
memory between the file and the frontend, which calls us back for each:

    Past()                            the state of one cache input, empty in the beginning
    Grown(past, new)                  Concat(past, new), which becomes the state
    CachedAttention(q, k, v, …)       one causal attention, which appends to a cache in blocks (``openvino_pages``)
    TopK(x, k)                        ONNX's, ties to the lower index
    BlockAttention(q, k, v, is_real)  ours, as one attention under a mask, which keeps no map
    DequantizeLinear(q, s)            ONNX's, of a weight, kept narrow (``openvino_weights``)

CachedAttention is OpenVINO's PagedAttention, what OpenVINO GenAI turns every language model's attention into. Its other
kernel, the fused one over states, multiplies four query rows at a time in fp32 and does a chunk behind a past row by
row: of a prefill of 1,040 rows 1.1 s instead of 0.3. It gives its keys to nobody else, so keys that a prune point reads
(AttentionReceived) are kept a second time, in a state, ``heard_…``; guidance needs none (``openvino_guidance``).
Source: openvinotoolkit/openvino, PagedAttentionExtension and intel_cpu's paged_attn.cpp; ONNX Attention-23.

Legend: Hkv key-value heads, H query heads, P past rows, S new rows, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import MADV_DONTNEED, mmap
from pathlib import Path
from threading import Event, Thread
from typing import TypeAlias

import onnx
import onnx.inliner
import openvino as ov
from openvino.frontend.onnx import ConversionExtension

from engines.sessions.openvino_guidance import Guiding, ask_instead
from engines.sessions.openvino_nodes import Conversions
from engines.sessions.openvino_pages import BLOCK, length_inputs
from engines.sessions.openvino_weights import (
    DEQUANTIZE,
    dequantised,
    inputs_as_constants,
    read_as_they_lie,
    weights_as_inputs,
)
from graphs.errors import BadArtefact
from graphs.ops import DOMAIN as OUR_OPS
from graphs.ops import OPS
from graphs.rules.rule import all_inputs_of, nodes_of

DOMAIN = "saccade.openvino"
BLOCK_TYPES = {ov.Type.f32: onnx.TensorProto.FLOAT, ov.Type.bf16: onnx.TensorProto.BFLOAT16}
HEARD = "heard_"  # a second state of keys, for what is not the attention itself
K, V, PAST_K, PAST_V = 1, 2, 4, 5  # inputs of Attention
MASK = 3
UNDERSTOOD = {"is_causal", "scale"}
PLUGIN_ATTRIBUTES = "plugin_"
FORGET_EVERY_S = 0.02  # some 50 MB of pages, at the speed at which weights are packed

# A Loop copies what it reads from outside, here all keys at every step. Flat, the map H·G·T is there at once.
FLAT = {"AttentionReceived", "RatedAttentionReceived"}

BLOCKS = "BlockAttention"

Dims: TypeAlias = tuple[int | str, ...]


@dataclass(frozen=True)
class Read:
    """A model, and how the file's interface maps to it.

    inputs, outputs: of the file, name → dimensions. segments: of a decoder whose caches are blocks, the length of a
    segment's cache → its cache inputs. grown: cache output → the cache input that continues it. states: state → the
    cache input whose rows it holds too. files: the weights, mapped. guiding: where the graph gives what
    ``attention_received`` is made of later, which layers guide.
    """

    model: ov.Model
    inputs: dict[str, Dims]
    outputs: dict[str, Dims]
    segments: dict[str, tuple[str, ...]]
    grown: dict[str, str]
    states: dict[str, str]
    files: list[mmap]
    guiding: Guiding | None

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Around what copies the weights into a form of its own: give back the files' pages time and again meanwhile.

        So a model's weights never lie in memory twice; a page that is needed again is read again.
        """
        done = Event()

        def forget() -> None:
            last = False
            while not last:
                last = done.wait(FORGET_EVERY_S)
                for file in self.files:
                    file.madvise(MADV_DONTNEED)

        thread = Thread(target=forget, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def read_graph(core: ov.Core, file: Path, in_blocks: ov.Type | None) -> Read:
    """Read an ONNX file; its external weights are mapped into memory, not copied.

    in_blocks: a decoder's ``past_*`` inputs become blocks of this type, each segment gets the inputs ``length_inputs``,
    and the ``present_*`` outputs go; None: caches go in and out as the file says. Raises BadArtefact where the file is
    no graph or holds an attention on a cache that is not causal.
    """
    try:
        proto = onnx.load(file, load_external_data=False)
        outputs = {v.name: _dims(v) for v in proto.graph.output}
        guiding = ask_instead(proto.graph) if in_blocks else None
        for function in proto.functions:
            if function.domain == OUR_OPS and function.name in FLAT:
                function.CopyFrom(OPS[function.name].flat_function)
        for function in [f for f in proto.functions if (f.domain, f.name) == (OUR_OPS, BLOCKS)]:
            proto.functions.remove(function)  # its nodes stay as they are
        proto = onnx.inliner.inline_local_functions(proto)
    except Exception as e:  # protobuf's and the inliner's share no base class
        raise BadArtefact(f"{file} cannot be read as a graph ({e}); build the bundle again") from None
    for node in nodes_of(proto.graph):
        for attribute in [a for a in node.attribute if a.name.startswith(PLUGIN_ATTRIBUTES)]:
            node.attribute.remove(attribute)
        if (node.domain, node.op_type) in (("", "TopK"), ("", DEQUANTIZE), (OUR_OPS, BLOCKS)):
            node.domain = DOMAIN
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    inputs = {v.name: _dims(v) for v in proto.graph.input}
    segments, grown, states = _cached(proto, file, in_blocks) if in_blocks else ({}, {}, {})
    conversions = Conversions()
    extensions = [
        ConversionExtension(name, DOMAIN, convert)
        for name, convert in (
            ("Past", conversions.past),
            ("Grown", conversions.grown),
            ("CachedAttention", conversions.attention),
            ("TopK", conversions.top),
            (BLOCKS, conversions.blocks),
            (DEQUANTIZE, dequantised),
        )
    ]
    for extension in extensions:
        core.add_extension(extension)
    weights, files = weights_as_inputs(proto, file.parent)
    model = core.read_model(proto.SerializeToString())
    read_as_they_lie(model)
    inputs_as_constants(model, weights)
    model.add_sinks(conversions.sinks)
    model.validate_nodes_and_infer_types()
    return Read(model, inputs, outputs, segments, grown, states, files, guiding)


def _dims(value: onnx.ValueInfoProto) -> Dims:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _cached(
    proto: onnx.ModelProto, file: Path, in_blocks: ov.Type
) -> tuple[dict[str, tuple[str, ...]], dict[str, str], dict[str, str]]:
    """Put our nodes in the place of every attention on a past; return ``Read``'s segments, grown and states."""
    graph = proto.graph
    inputs = {value.name: value for value in graph.input}
    _lengths_of_heard_keys(graph)
    readers = _readers(graph)
    attentions = [n for n in graph.node if n.op_type == "Attention" and not n.domain and len(n.input) > PAST_V]
    segments: dict[str, tuple[str, ...]] = {}
    grown: dict[str, str] = {}
    states: dict[str, str] = {}
    for node in attentions:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        others = [name for name, value in attributes.items() if value and name not in UNDERSTOOD]
        if not attributes.get("is_causal") or node.input[MASK] or "scale" not in attributes or others:
            raise BadArtefact(
                f"{file}: {node.name} attends to a cache otherwise than causally with a scale; "
                "export the checkpoint again"
            )
        q, k, v, _, past_k, past_v = node.input[: PAST_V + 1]
        out, present_k, present_v = node.output[:3]
        segment = inputs[past_k].type.tensor_type.shape.dim[2].dim_param
        segments[segment] = (*segments.get(segment, ()), past_k, past_v)
        grown |= {present_k: past_k, present_v: past_v}
        if others := [n.name for n in readers.get(past_v, ()) if n.output[:1] != node.output[:1]]:
            raise BadArtefact(
                f"{file}: {others[0]} reads a cache's values, not its attention; export the checkpoint again"
            )
        heard = _heard(readers, node, past_k, present_k)
        for attribute in list(node.attribute):
            node.attribute.remove(attribute)
        node.CopyFrom(
            onnx.helper.make_node(
                "CachedAttention",
                [q, k, v, past_k, past_v, *length_inputs(segment)],
                [out],
                node.name,
                domain=DOMAIN,
                scale=attributes["scale"],
            )
        )
        if heard:
            state = HEARD + past_k
            states[state] = past_k
            at = list(graph.node).index(node)
            graph.node.insert(
                at, onnx.helper.make_node("Grown", [state, k], [HEARD + present_k], domain=DOMAIN, state=state)
            )
    for state, past in reversed(states.items()):
        _, heads, _, width = inputs[past].type.tensor_type.shape.dim
        sizes = {"state": state, "heads": heads.dim_value, "width": width.dim_value}
        sizes["dtype"] = inputs[past].type.tensor_type.elem_type
        graph.node.insert(0, onnx.helper.make_node("Past", [], [state], domain=DOMAIN, **sizes))
    for value in [v for v in graph.output if v.name in grown]:
        graph.output.remove(value)
    for segment, names in segments.items():
        for name in names:
            dims = inputs[name].type.tensor_type.shape.dim
            blocks = [f"blocks of {segment}", dims[1].dim_value, BLOCK, dims[3].dim_value]
            inputs[name].CopyFrom(onnx.helper.make_tensor_value_info(name, BLOCK_TYPES[in_blocks], blocks))
        for name, shape in length_inputs(segment).items():
            of = [f"{name} {i}" if size < 0 else size for i, size in enumerate(shape)]
            graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, of))
    return segments, grown, states


def _lengths_of_heard_keys(graph: onnx.GraphProto) -> None:
    """Let what reads a segment's length read it of its last layer's keys, which the prune point behind it hears.

    It stands where torch found the length's symbol, which is any of the segment's keys or values.
    """
    segments = {value.name: _dims(value)[2] for value in graph.input if value.name.startswith(("past_k_", "past_v_"))}
    last = {segment: name for name, segment in segments.items() if name.startswith("past_k_")}
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in segments:
            node.input[0] = last[segments[node.input[0]]]


def _heard(readers: Mapping[str, list[onnx.NodeProto]], attention: onnx.NodeProto, past_k: str, present_k: str) -> bool:
    """Turn others that read the keys, old or grown, to the second state; whether there are any."""
    found, asked = False, (past_k, present_k)
    for node in [node for name in asked for node in readers.get(name, ())]:
        if node.output[:1] == attention.output[:1]:
            continue
        found = True
        for inner in _with_nested(node):
            for i, name in enumerate(inner.input):
                if name in asked:
                    inner.input[i] = HEARD + name
    return found


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Value → the nodes of the main graph that read it, themselves or inside."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in set(all_inputs_of(node)):
            found.setdefault(name, []).append(node)
    return found


def _with_nested(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    yield node
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from nodes_of(attribute.g)
