"""What a graph rule is: a code, a title and a function from a stage (or a whole export) to findings.

A rule never changes a graph and never raises for a bad one: it says where, what and what next.
Codes: G1xx functions, G2xx attention and logits, G3xx interface, G4xx weights, G5xx the plan, G6xx the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from graphs.errors import BadArtefact
from graphs.files import path_inside, unreadable
from graphs.spec import ExportSpec, StageSpec, spec_from_folder
from graphs.versions import require_once

Node: TypeAlias = Any  # onnx.NodeProto
Model: TypeAlias = Any  # onnx.ModelProto


@dataclass(frozen=True)
class Finding:
    """One place where a rule does not hold."""

    code: str
    title: str
    where: str
    what: str
    next: str

    def __str__(self) -> str:
        return f"{self.code} {self.title}: {self.where}: {self.what}; {self.next}"


@dataclass(frozen=True)
class Stage:
    """One ONNX file of an export, its weights left on disk."""

    name: str
    model: Model
    spec: ExportSpec
    folder: Path

    @property
    def interface(self) -> StageSpec:
        """What spec.json says about this file."""
        return self.spec.stages[self.name]

    @property
    def is_decoder(self) -> bool:
        """Whether this is the stage that prunes and generates."""
        return self.name == "decoder"


@dataclass(frozen=True)
class Export:
    """An export folder, read."""

    folder: Path
    spec: ExportSpec
    stages: dict[str, Stage]


Report: TypeAlias = Iterator[tuple[str, str]]  # (where in the file, what is wrong)


@dataclass(frozen=True)
class Rule:
    """A code, a short title, what to do about a finding, and the check over one stage or the whole export."""

    code: str
    title: str
    next: str
    of_stage: Callable[[Stage], Report] | None = None
    of_export: Callable[[Export], Report] | None = None

    @property
    def meaning(self) -> str:
        """The first line of the check's docstring."""
        check = self.of_stage or self.of_export
        return (check.__doc__ or "").partition("\n")[0] if check else ""

    def findings(self, export: Export) -> Iterator[Finding]:
        """Every place in an export where the rule does not hold."""
        if self.of_export:
            yield from (Finding(self.code, self.title, at, what, self.next) for at, what in self.of_export(export))
        if self.of_stage:
            for stage in export.stages.values():
                for at, what in self.of_stage(stage):
                    where = f"{stage.interface.file}: {at}" if at else stage.interface.file
                    yield Finding(self.code, self.title, where, what, self.next)


def stage_rule(code: str, title: str, next: str) -> Callable[[Callable[[Stage], Report]], Rule]:  # noqa: A002 (a finding's word)
    """Turn a function over one stage into a rule."""
    return lambda check: Rule(code, title, next, of_stage=check)


def export_rule(code: str, title: str, next: str) -> Callable[[Callable[[Export], Report]], Rule]:  # noqa: A002 (a finding's word)
    """Turn a function over a whole export into a rule."""
    return lambda check: Rule(code, title, next, of_export=check)


def export_from_folder(folder: Path) -> Export:
    """Read spec.json and the stages' graphs, not their weights; BadArtefact where one cannot be read."""
    require_once("onnx", "onnx-ir")
    folder = Path(folder)
    spec = spec_from_folder(folder)
    return Export(folder, spec, {name: stage_from_folder(folder, spec, name) for name in spec.stages})


def stage_from_folder(folder: Path, spec: ExportSpec, name: str) -> Stage:
    """Read one stage's graph; its external tensors stay references."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    file = spec.stages[name].file
    path = path_inside(folder, file)
    if path is None:
        raise BadArtefact(f"{folder}: stage {name} is recorded at {file!r}, outside the folder; do not use it")
    try:
        model = onnx.load(path, load_external_data=False, format="protobuf")
    except OSError as e:
        raise unreadable(path, e, "export the checkpoint again") from None
    except DecodeError:
        raise BadArtefact(f"{path} is not an ONNX file or is damaged; export the checkpoint again") from None
    if not model.graph.node:
        raise BadArtefact(
            f"{path} holds no graph, so it is not an ONNX file or is truncated; export the checkpoint again"
        )
    return Stage(name, model, spec, folder)


def nodes_of(graph: Any) -> Iterator[Node]:
    """All nodes of a graph (or of a function), those of nested graphs included."""
    for node in graph.node:
        yield node
        for inner in subgraphs_of(node):
            yield from nodes_of(inner)


def subgraphs_of(node: Node) -> Iterator[Any]:
    """The graphs nested directly in a node (Loop, If, Scan)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_inputs_of(node: Node) -> list[str]:
    """A node's inputs, those its nested graphs take from outside included."""
    names = [name for name in node.input if name]
    for inner in subgraphs_of(node):
        for deeper in nodes_of(inner):
            names += [name for name in deeper.input if name]
        names += [output.name for output in inner.output]
    return names


def label(node: Node) -> str:
    """How a finding names a node."""
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} → {', '.join(node.output)}"


def attribute_of(node: Node, name: str, default: int = 0) -> int:
    """An integer attribute of a node."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)
