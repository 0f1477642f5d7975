"""G1xx, G6xx: every op has one meaning that all readers of the file can find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from graphs.ops import DOMAIN, OPS
from graphs.rules.rule import Report, Stage, label, nodes_of, stage_rule
from graphs.rules.tensors import content_of

OPSETS = range(23, 25)  # 23: Attention with GQA and a past; 24 is the newest all our targets read
IR_VERSIONS = range(10, 14)  # ONNX Runtime 1.31 ends at 13
AGAIN = "export the checkpoint again with this version of saccade"


@stage_rule("G101", "op without body", f"attach the function body after optimising: {AGAIN}")
def op_without_body(stage: Stage) -> Report:
    """A node of our domain has its function body in the file, so that no reader needs a library of ours."""
    bodies = {(f.domain, f.name) for f in stage.model.functions}
    graphs = [stage.model.graph, *stage.model.functions]
    missing = Counter(n.op_type for g in graphs for n in nodes_of(g) if n.domain == DOMAIN)
    for name, count in sorted(missing.items()):
        if (DOMAIN, name) not in bodies:
            yield f"{DOMAIN}::{name}", f"{count} node(s) and no function of that name"


@stage_rule("G102", "ambiguous function name", "rename the function; TensorRT-RTX looks functions up by name alone")
def ambiguous_function_name(stage: Stage) -> Report:
    """A function's name, whatever its domain, is unique in the file and is no standard op's."""
    import onnx

    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain in ("", "ai.onnx.ml")}
    for name, count in sorted(Counter(f.name for f in stage.model.functions).items()):
        if count > 1:
            yield name, f"{count} functions have this name"
        if name in standard:
            yield name, "the function is named like a standard op"


@stage_rule("G103", "body of another version", AGAIN)
def body_of_another_version(stage: Stage) -> Report:
    """A body of our domain is the one this version of saccade attaches: nodes, attributes and wiring."""
    for function in stage.model.functions:
        if function.domain != DOMAIN:
            continue
        if function.name not in OPS:
            yield function.name, f"this version knows only {', '.join(sorted(OPS))}"
            continue
        ours = OPS[function.name].function
        if _outline(function) != _outline(ours):
            yield function.name, "its nodes, attributes or wiring are not those of this version's body"


def _outline(function: Any) -> list[object]:
    """A body but for the names of its values, which are numbered as they appear."""
    number: dict[str, int] = {"": 0}
    outline: list[object] = [
        sorted(function.attribute),
        [_attribute(a, number) for a in _by_name(function.attribute_proto)],
    ]
    return outline + _wiring(function, [*function.input], [*function.output], number)


def _wiring(graph: Any, inputs: list[str], outputs: list[str], number: dict[str, int]) -> list[object]:
    def numbers(names: Iterable[str]) -> list[int]:
        return [number.setdefault(name, len(number)) for name in names]

    wiring: list[object] = [numbers(inputs)]
    for node in graph.node:
        attributes = [_attribute(a, number) for a in _by_name(node.attribute)]
        wiring.append((node.domain, node.op_type, attributes, numbers(node.input), numbers(node.output)))
    return [*wiring, numbers(outputs)]


def _by_name(attributes: Iterable[Any]) -> list[Any]:
    return sorted(attributes, key=lambda attribute: str(attribute.name))


def _attribute(attribute: Any, number: dict[str, int]) -> tuple[object, ...]:
    """An attribute's name, type and value; of graphs their bodies, of tensors their values."""
    graphs = [attribute.g] * attribute.HasField("g") + [*attribute.graphs]
    tensors = [attribute.t] * attribute.HasField("t") + [*attribute.tensors]
    plain = (attribute.f, attribute.i, attribute.s, *attribute.floats, *attribute.ints, *attribute.strings)
    bodies = [_wiring(g, [i.name for i in g.input], [o.name for o in g.output], number) for g in graphs]
    values = [(t.data_type, [*t.dims], content_of(t)) for t in tensors]
    return attribute.name, attribute.type, attribute.ref_attr_name, plain, bodies, values


@stage_rule("G104", "foreign op", "keep to standard ops and those of domain saccade, which every target reads")
def foreign_op(stage: Stage) -> Report:
    """A node is a standard op or one of ours; a runtime's own ops would bind the file to that runtime."""
    for graph in (stage.model.graph, *stage.model.functions):
        for node in nodes_of(graph):
            if node.domain not in ("", "ai.onnx", DOMAIN):
                yield label(node), f"it is of domain {node.domain}"


@stage_rule("G601", "unsupported version", AGAIN)
def unsupported_version(stage: Stage) -> Report:
    """Opset and IR version are ones that all targets read, in the graph and in each function."""
    if stage.model.ir_version not in IR_VERSIONS:
        yield "ir_version", f"{stage.model.ir_version}, but must be {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}"
    places = [("the graph", stage.model), *((f.name, f) for f in stage.model.functions)]
    for where, place in places:
        opsets = {i.domain: i.version for i in place.opset_import}
        version = opsets.get("", opsets.get("ai.onnx", 0))
        if version not in OPSETS:
            yield where, f"opset {version}, but must be {OPSETS[0]} or {OPSETS[-1]}"


@stage_rule("G602", "invalid ONNX", "report it: the exporter wrote a file that onnx's own checker refuses")
def invalid_onnx(stage: Stage) -> Report:
    """onnx.checker accepts the file where it lies, external data included."""
    import onnx

    try:
        onnx.checker.check_model(stage.folder / stage.interface.file)
    except Exception as e:  # the checker raises its own error, ValueError and others
        yield "", " ".join(str(e).split())[:300]
