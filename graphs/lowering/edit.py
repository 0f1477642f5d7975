"""What passes share: nodes put in front of others or in their place, constants, weights, values, and branches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def before(node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
    """The one output of a new standard node in front of another."""
    made = ir.node(op_type, inputs, attributes, num_outputs=1)  # type: ignore[arg-type]
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return made.outputs[0]


def constant(node: ir.Node, value: int | list[int] | list[list[int]]) -> ir.Value:
    """An int64 constant, in front of a node."""
    return before(node, "Constant", [], value=ir.tensor(value, dtype=ir.DataType.INT64))


def takes_over(new: ir.Value, old: ir.Value) -> ir.Value:
    """``new`` stands wherever ``old`` stood, under its name; ``old`` is left without a use."""
    name = old.name
    old.name = f"{name}_lowered"
    new.name, new.type, new.shape = name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    return new


def replace(old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``old``, under its names; nodes that only fed ``old`` are removed with it."""
    graph = old.graph
    assert graph is not None
    new.name = old.name
    fed = [value.producer() for value in old.inputs if value is not None]
    graph.insert_before(old, new)
    for made, value in zip(new.outputs, old.outputs, strict=True):
        takes_over(made, value)
    graph.remove(old, safe=True)
    remove_unread(fed)


def remove_unread(nodes: list[ir.Node | None]) -> None:
    """Remove nodes whose outputs nobody reads, and then what fed only them."""
    for node in nodes:
        if node is None or node.graph is None:
            continue
        if any(out.uses() or out.is_graph_output() for out in node.outputs):
            continue
        fed = [value.producer() for value in node.inputs if value is not None]
        node.graph.remove(node, safe=True)
        remove_unread(fed)


def initializer(model: ir.Model, tensor: ir.ExternalTensor) -> ir.Value:
    """The graph's value of an external tensor, made once per name."""
    name = str(tensor.name)
    if name not in model.graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def choose(
    nodes: list[ir.Node], values: Sequence[ir.Value], condition: ir.Value, then: ir.Graph, name: str, rest: str
) -> ir.Node:
    """An If in the place of nodes: ``then`` gives their ``values`` too; its else-branch, named ``rest``, is the nodes.

    The If takes over the values wherever else they stood. In the else-branch they stay what they were, those too that
    its nodes give each other.
    """
    graph = nodes[-1].graph
    assert graph is not None
    choice = ir.node("If", [condition], num_outputs=len(values), name=name)
    graph.insert_before(nodes[-1], choice)
    own = {takes_over(new, old): old for new, old in zip(choice.outputs, values, strict=True)}
    for node in nodes:
        for i, value in enumerate(node.inputs):
            if value is not None and value in own:
                node.replace_input_with(i, own[value])
    graph.remove(nodes)
    choice.attributes["then_branch"] = ir.AttrGraph("then_branch", then)
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", ir.Graph([], values, nodes=nodes, name=rest))
    return choice


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard node of a type that makes a value."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The standard node of a type that alone reads a value."""
    users = list(value.uses())
    node = users[0].node if len(users) == 1 and not value.is_graph_output() else None
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def with_else_branches(graph: ir.Graph) -> list[tuple[ir.Node, ir.Node]]:
    """Each node of a graph with itself, and instead of an If each node of its else-branch with the If."""
    return [
        (top, node)
        for top in list(graph)
        for node in (list(top.attributes["else_branch"].as_graph()) if top.op_type == "If" else [top])
    ]


class Branch:
    """Nodes of a graph inside a graph, under names that the graph around it has not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: object) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=1)  # type: ignore[arg-type]
        made.name = made.outputs[0].name = f"{self.name}/{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(made)
        return made.outputs[0]

    def constant(self, value: np.ndarray) -> ir.Value:
        return self.add("Constant", [], value=ir.tensor(value))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))
