"""G5xx: the graph prunes where the plan says, by the score it says, and gives the guidance it promises."""

from __future__ import annotations

from graphs.ops import DOMAIN, RANKING, RECEIVED
from graphs.plan import BY_ATTENTION, FROM_OUTSIDE
from graphs.rules.rule import Node, Report, Stage, all_inputs_of, nodes_of, stage_rule
from graphs.spec import present_names

AGAIN = "export the checkpoint again under the wanted plan"


@stage_rule("G501", "prune points differ", AGAIN)
def prune_points_differ(stage: Stage) -> Report:
    """There is one op per prune point, the one its plan asks for, and layer l lies behind exactly those before it."""
    if not stage.is_decoder:
        return
    plan, cuts = stage.spec.plan, _ours(stage, *RANKING)
    if len(cuts) != len(plan.points):
        yield "KeepTopK", f"{len(cuts)} in the graph, {len(plan.points)} prune points in plan {plan.name}"
        return
    for i, (cut, point) in enumerate(zip(cuts, plan.points, strict=True)):
        op = "MergeDropped" if point.merge else "KeepPerImage" if point.per_image else "KeepTopK"
        if cut.op_type != op:
            yield f"prune point {i}", f"it is a {cut.op_type}, plan {plan.name} needs {op}"
    before = _bits_before(stage, {name: 1 << i for i, node in enumerate(cuts) for name in node.output})
    for layer in range(stage.spec.language.layers):
        wanted = sum(point.layer <= layer for point in plan.points)
        for name in present_names(layer):
            if name in before and (found := before[name].bit_count()) != wanted:
                yield name, f"it lies behind {found} prune point(s), by plan {plan.name} behind {wanted}"


@stage_rule("G502", "score differs", AGAIN)
def score_differs(stage: Stage) -> Report:
    """A prune point goes by the input ``priority`` or by attention received, as the plan says."""
    cuts = _ours(stage, *RANKING)
    if not stage.is_decoder or len(cuts) != len(stage.spec.plan.points):
        return
    received = {node.output[0]: 2 for node in _ours(stage, *RECEIVED)}
    before = _bits_before(stage, {"priority": 1, **received}, opaque=("CompactRows", "MergeDropped"))
    for i, (cut, point) in enumerate(zip(cuts, stage.spec.plan.points, strict=True)):
        wanted = 1 if point.score in FROM_OUTSIDE else 2
        if not before.get(cut.input[cut.op_type == "MergeDropped"], 0) & wanted:
            yield f"prune point {i}", f"its score does not come from {point.score}"


@stage_rule("G503", "guidance differs", AGAIN)
def guidance_differs(stage: Stage) -> Report:
    """One AttentionReceived for each guidance layer and each prune point by attention, summed into one output."""
    if not stage.is_decoder:
        return
    plan, received = stage.spec.plan, _ours(stage, *RECEIVED)
    layers = plan.guidance.layers if plan.guidance else ()
    wanted = len(layers) + sum(point.score in BY_ATTENTION for point in plan.points)
    if len(received) != wanted:
        yield "AttentionReceived", f"{len(received)} in the graph, plan {plan.name} needs {wanted}"
        return
    if plan.guidance:
        before = _bits_before(stage, {node.output[0]: 1 << i for i, node in enumerate(received)})
        found = before.get("attention_received", 0).bit_count()
        if found != wanted:
            yield "attention_received", f"it sums {found} of {wanted} layers"


@stage_rule("G504", "vision prune point differs", AGAIN)
def vision_prune_point_differs(stage: Stage) -> Report:
    """The vision stage cuts and merges by the ops of the plan's score, and not at all where it has no score there."""
    if stage.name != "vision":
        return
    point = stage.spec.plan.vision
    wanted = dict.fromkeys(("KeepTopK", "KeepPerImage", "MergeContext", "MergeContextWithin", "MergePairs"), 0)
    if point and not point.on_host:
        packed = not stage.spec.grid.tokens_alike
        wanted["KeepPerImage" if packed and point.per_image else "KeepTopK"] = int(point.score != "tome")
        wanted["MergeContextWithin" if packed else "MergeContext"] = int(point.merge > 0)
        wanted["MergePairs"] = point.tower_layers if point.score == "tome" else 0
    for op, count in wanted.items():
        if (found := len(_ours(stage, op))) != count:
            yield op, f"{found} in the graph, plan {stage.spec.plan.name} needs {count}"


def _ours(stage: Stage, *ops: str) -> list[Node]:
    return [node for node in nodes_of(stage.model.graph) if node.domain == DOMAIN and node.op_type in ops]


def _bits_before(stage: Stage, marks: dict[str, int], opaque: tuple[str, ...] = ()) -> dict[str, int]:
    """Value name → the marks of all values it depends on (its own included); nodes come in topological order.

    An ``opaque`` op passes on only what its first input carries.
    """
    bits = dict(marks)
    for node in stage.model.graph.node:
        inputs = node.input[:1] if node.op_type in opaque else all_inputs_of(node)
        carried = 0
        for name in inputs:
            carried |= bits.get(name, 0)
        for name in node.output:
            bits[name] = carried | marks.get(name, 0)
    return bits
