"""Which provider got which node of a graph, and whether a node on the CPU is arithmetic on shapes or real work.

ONNX Runtime keeps what it computes from ``Shape`` on the CPU on purpose: a few int64 numbers, which the host needs to
launch the next kernel anyway. Anything else on the CPU costs a copy there and back in every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
import onnx.inliner

from graphs.errors import BadArtefact
from graphs.rules.rule import nodes_of, subgraphs_of

CPU = "CPUExecutionProvider"

# What makes a tensor as long as the number it is given, or runs a graph: no arithmetic on a shape.
NO_ARITHMETIC = frozenset(
    "ConstantOfShape Expand EyeLike If Loop NonZero OneHot Pad RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike Range Resize Scan SequenceMap Tile".split()
)
# A constant that can take part in arithmetic on shapes; longer ones are weights and tables.
MOST_ELEMENTS = 64

# ONNX Runtime's transpose optimiser makes these itself, to permute a shape or another short list of int64.
MADE_FOR_SHAPES = {"Gather": ("Gather",)}


@dataclass(frozen=True)
class Placement:
    """providers: provider → how many nodes it got. shapes: the nodes on the CPU that compute shapes; work: the rest.

    A node is told as its operator and its name.
    """

    providers: dict[str, int]
    shapes: tuple[tuple[str, str], ...]
    work: tuple[tuple[str, str], ...]

    def work_in_words(self) -> str:
        """The operators of ``work``, most frequent first, and the first node's name."""
        counts = Counter(op for op, _ in self.work)
        ops = ", ".join(f"{op} ×{n}" if n > 1 else op for op, n in counts.most_common())
        return f"{ops} (first {self.work[0][1]})" if self.work else "none"


def inlined(file: Path) -> onnx.ModelProto:
    """Read a graph without its weights, functions inlined and every node named uniquely, so that it can be found again.

    Raises BadArtefact where the file is no graph.
    """
    try:
        model = onnx.inliner.inline_local_functions(onnx.load(file, load_external_data=False))
    except Exception as e:  # protobuf's and the inliner's share no base class
        raise BadArtefact(f"{file} cannot be read as a graph ({e}); build the bundle again") from None
    for number, node in enumerate(nodes_of(model.graph)):
        node.name = f"{node.name or node.op_type}#{number}"
    return model


def shape_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes whose results follow from shapes and short constants, and from no other tensor's elements."""
    found: set[str] = set()
    _collect(model.graph, set(), set(), found)
    return found


def placement_of(assigned: Iterable[tuple[str, str, str]], shapes: Collection[str]) -> Placement:
    """Sort what a session tells: (provider, operator, node) per node; ``shapes``: what ``shape_nodes`` gave."""
    nodes = list(assigned)
    on_cpu = [(op, name) for provider, op, name in nodes if provider == CPU]
    of_shapes = [(op, name) for op, name in on_cpu if name in shapes or _made_for_shapes(op, name)]
    return Placement(
        dict(Counter(provider for provider, _, _ in nodes)),
        tuple(of_shapes),
        tuple(node for node in on_cpu if node not in of_shapes),
    )


def _made_for_shapes(op: str, name: str) -> bool:
    """A node of ONNX Runtime's own: its name is the operator's, or that with ``_token_`` and a number, never ours."""
    return "#" not in name and name.partition("_token_")[0] in MADE_FOR_SHAPES.get(op, ())


def _collect(graph: onnx.GraphProto, constants: set[str], shapes: set[str], found: set[str]) -> None:
    """Walk in topological order; a nested graph sees the names around it."""
    constants |= {tensor.name for tensor in graph.initializer if prod(tensor.dims) <= MOST_ELEMENTS}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        arithmetic = node.op_type not in NO_ARITHMETIC
        if node.op_type == "Constant":
            if all(prod(attribute.t.dims) <= MOST_ELEMENTS for attribute in node.attribute):
                constants.update(node.output)
        elif arithmetic and inputs and constants.issuperset(inputs):
            constants.update(node.output)
        elif node.op_type in ("Shape", "Size") or (
            arithmetic and inputs and all(name in constants or name in shapes for name in inputs)
        ):
            shapes.update(node.output)
            found.add(node.name)
        for inner in subgraphs_of(node):
            _collect(inner, set(constants), set(shapes), found)
