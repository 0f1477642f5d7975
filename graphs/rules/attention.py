"""G2xx: causality is stated where it holds, and no map or logit is computed that nobody reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphs.ops import DOMAIN
from graphs.rules.rule import Node, Report, Stage, all_inputs_of, attribute_of, label, nodes_of, stage_rule

PAST_KEY, VALID_LENGTH = 4, 6  # inputs of ONNX Attention-23 and -24
MAP_OUTPUT = 3
MATRIX_PRODUCTS = {"MatMul", "Gemm", "MatMulNBits", "MatMulInteger"}
ROW_CUTS = {"Slice", "Gather", "GatherND", "GatherElements", "Compress", "CompactRows", "Split"}


@stage_rule("G201", "causal without a past", "give the node its past_key and past_value, or an explicit mask")
def causal_without_past(stage: Stage) -> Report:
    """Attention with is_causal=1 has a past_key: without one it is aligned upper-left and wrong at decode."""
    for node in nodes_of(stage.model.graph):
        if node.op_type == "Attention" and attribute_of(node, "is_causal"):
            given = [i < len(node.input) and bool(node.input[i]) for i in (PAST_KEY, VALID_LENGTH)]
            if not any(given):
                yield label(node), "is_causal=1 and neither past_key nor nonpad_kv_seqlen"


@stage_rule("G202", "attention map", "take what each key received from saccade::AttentionReceived instead")
def attention_map(stage: Stage) -> Report:
    """No S×T map leaves an Attention node or is built by a Softmax outside our bodies (decoder)."""
    graphs = [stage.model.graph, *(f for f in stage.model.functions if f.domain != DOMAIN)]
    for graph in graphs:
        for node in nodes_of(graph):
            if node.op_type == "Attention" and len(node.output) > MAP_OUTPUT and node.output[MAP_OUTPUT]:
                yield label(node), f"its map {node.output[MAP_OUTPUT]} is an output"
            if stage.is_decoder and node.op_type == "Softmax":
                yield label(node), "a Softmax over a whole map"


@stage_rule("G203", "logits of all rows", "cut the hidden states to the last len(tail) rows before the head")
def logits_of_all_rows(stage: Stage) -> Report:
    """The decoder's head is applied to the last R rows only, R being the length of ``tail``."""
    if not stage.is_decoder:
        return
    graph = stage.model.graph
    if not any("tail" in node.input for node in nodes_of(graph)):
        yield "tail", "no node reads its length"
        return
    makers = {name: node for node in graph.node for name in node.output}
    head, cuts_behind = _head(makers, "logits")
    if head and cuts_behind:
        yield label(cuts_behind[0]), f"rows are cut behind the head {label(head)}, not before it"
    elif head and not _is_cut_to_tail(graph, makers, head):
        yield label(head), "no rows are cut before it by the length of tail"


def _is_cut_to_tail(graph: Any, makers: dict[str, Node], head: Node) -> bool:
    """Whether a cut on the way back from ``head`` along first inputs takes its places from ``tail``."""
    of_tail = {"tail"}
    for node in graph.node:
        if of_tail.intersection(all_inputs_of(node)):
            of_tail.update(node.output)
    return any(
        node.op_type in ROW_CUTS and of_tail.intersection(node.input[1:]) for node in _way_back(makers, head.input[0])
    )


def _head(makers: dict[str, Node], output: str) -> tuple[Node | None, list[Node]]:
    """The last matrix product before ``output`` on the way back along first inputs, and the cuts behind it."""
    cuts: list[Node] = []
    for node in _way_back(makers, output):
        if node.op_type in MATRIX_PRODUCTS:
            return node, cuts
        if node.op_type in ROW_CUTS:
            cuts.append(node)
    return None, cuts


def _way_back(makers: Mapping[str, Node], name: str) -> Iterator[Node]:
    """The nodes before a value along first inputs; a damaged graph may go round in a circle."""
    seen: set[str] = set()
    while name in makers and name not in seen:
        seen.add(name)
        yield makers[name]
        name = makers[name].input[0] if makers[name].input else ""
