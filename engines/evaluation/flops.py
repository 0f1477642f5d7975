"""Estimated floating-point operations of what a model ran: its graph's products, at the lengths it was really fed.

Counted are the matrix products of a stage's graph, canonical or packed, a multiplication and an addition as two:
projections, MLPs and the head 2·rows·in·out, convolutions alike, attention 2·H·S·T·(d_qk + d_v), and the maps and
likenesses that pruning itself needs. That is the cost model of this literature (FastV, arXiv 2403.06764 §4.2:
Σ_layers 4nd² + 2n²d + 2ndm, in multiplications) with each model's own terms for grouped heads and gated MLPs, and
with what papers leave out: vision tower, decode steps, the small model. An estimate: norms, softmax, activations,
selections and copies are left out; causality saves nothing, as in torch's counter; a runtime may fuse or pad.
Legend: B batch, H heads, S rows, T keys, d head width, G guide rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from engines.sessions.session import NOTHING, Session
from graphs.dims import Dim, Sizes, size_of, symbols_of
from graphs.files import path_inside
from graphs.lowering.edit import MICROSOFT
from graphs.ops import DOMAIN, OVER_CACHE, RECEIVED
from graphs.rules.rule import Stage, attribute_of, stage_from_folder
from graphs.spec import ExportSpec, length_name, spec_from_folder

if TYPE_CHECKING:
    from engines.bundles.manifest import Manifest

Dims: TypeAlias = tuple[Dim, ...]
Shapes: TypeAlias = Mapping[str, Dims]
MULTIPLE = re.compile(r"(?:(?P<times>\d+)\*)?(?P<symbol>[A-Za-z]\w*)")


@dataclass(frozen=True)
class StageCost:
    """What a stage's run costs. terms: factors of one product, symbols of ``graphs.spec`` → how often.

    symbols: symbol → an input, an axis of it, and how many times the symbol its length is. uncounted: products whose
    shape is not known.
    """

    terms: Mapping[Dims, int]
    symbols: Mapping[str, tuple[str, int, int]]
    uncounted: tuple[str, ...] = ()

    def flops(self, sizes: Sizes) -> int:
        """Operations of one run at these lengths."""
        return sum(times * prod(size_of(dim, sizes) for dim in term) for term, times in self.terms.items())


@dataclass
class Meter:
    """Notes the lengths of every run of a model's stages; counting them is for later, so that no clock sees it."""

    runs: list[tuple[str, Sizes]] = field(default_factory=list)

    def taken(self) -> list[tuple[str, Sizes]]:
        """What was run since the last call."""
        runs, self.runs = self.runs, []
        return runs


class Metered:
    """A session whose runs are noted."""

    def __init__(self, session: Session, stage: str, cost: StageCost, meter: Meter) -> None:
        self._session, self._stage, self._cost, self._meter = session, stage, cost, meter

    def run(
        self,
        feeds: Mapping[str, Any],
        host: Collection[str] = (),
        device: Collection[str] = (),
        in_place: Mapping[str, str] = NOTHING,
    ) -> dict[str, Any]:
        """See ``engines.sessions.session.Session.run``."""
        symbols = self._cost.symbols.items()
        sizes = {symbol: _shape(feeds[name])[axis] // times for symbol, (name, axis, times) in symbols}
        # A cache that is written in place has a buffer's shape, and its length beside it.
        lengths = {f"P_{j}": feeds[length_name(j)] for j in range(len(feeds)) if length_name(j) in feeds}
        self._meter.runs.append((self._stage, sizes | {symbol: int(value[0]) for symbol, value in lengths.items()}))
        return self._session.run(feeds, host=host, device=device, in_place=in_place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def stage_flops(
    model: str, runs: Sequence[tuple[str, Sizes]], costs: Mapping[str, StageCost], checked: bool = False
) -> dict[str, int]:
    """Operations of one answer by the stages of ``Answer.milliseconds``.

    runs: what the model ran for it, in order. checked: whether the last run of the decoder is the consistency pass.
    """
    decoder = [costs[stage].flops(sizes) for stage, sizes in runs if stage == "decoder"]
    spent = {
        "vision": [costs[stage].flops(sizes) for stage, sizes in runs if stage == "vision"],
        "prefill": decoder[:1],
        "decode": decoder[1:-1] if checked else decoder[1:],
        "consistency": decoder[-1:] if checked else [],
    }
    return {f"{model}_{stage}": sum(parts) for stage, parts in spent.items() if parts}


def costs_of(bundle: Path, manifest: Manifest, member: str) -> dict[str, StageCost] | None:
    """The costs of a model's stages; None where the bundle holds engines only, whose layers cannot be read."""
    entry = manifest.members[member]  # type: ignore[index]
    for target in entry.targets.values():
        spec_file = path_inside(bundle, f"{entry.folder}/{target.spec}")
        if spec_file and all(stage.file.endswith(".onnx") for stage in target.stages.values()):
            spec = spec_from_folder(spec_file.parent)
            return stage_costs(bundle / entry.folder, spec)
    return None


def stage_costs(folder: Path, spec: ExportSpec) -> dict[str, StageCost]:
    """The costs of an export's stages, by name."""
    return {name: cost_of(stage_from_folder(folder, spec, name)) for name in spec.stages}


def cost_of(stage: Stage) -> StageCost:
    """Read the products of a graph."""
    shapes = _shapes_of(stage.model)
    terms: Counter[Dims] = Counter()
    uncounted = []
    for node in (n for graph in (stage.model.graph, *_many(stage.model.graph)) for n in graph.node):
        count = COUNTS.get((node.domain, node.op_type))
        if not count:
            continue
        try:
            found = count(node, shapes)
            terms.update(found if isinstance(found, list) else [found])
        except (KeyError, IndexError):
            uncounted.append(f"{node.op_type} {node.name}".strip())
    used = {symbol for term in terms for dim in term for symbol in symbols_of(dim)}
    places: dict[str, tuple[str, int, int]] = {}
    for tensor in stage.interface.inputs:
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str) and (whole := MULTIPLE.fullmatch(dim)):
                places.setdefault(whole["symbol"], (tensor.name, axis, int(whole["times"] or 1)))
    # Tracing leaves one length without a name: the tokens of Qwen2.5-VL, merged in the order of its windows.
    if stage.name == "vision" and "V" in places:
        places |= dict.fromkeys(used - places.keys(), places["V"])
    # Of a buffer the run says how many rows are filled.
    fed = {value.name for value in stage.model.graph.input}
    lengths = {f"P_{j}" for j in range(len(fed)) if length_name(j) in fed}
    known = {
        term: times for term, times in terms.items() if all(_countable(dim, places.keys() | lengths) for dim in term)
    }
    missing = [" · ".join(map(str, term)) for term in terms if term not in known]
    return StageCost(known, {s: places[s] for s in used & places.keys()}, (*uncounted, *missing))


def _countable(dim: Dim, symbols: Iterable[str]) -> bool:
    try:
        return size_of(dim, dict.fromkeys(symbols, 1)) is not None
    except KeyError:
        return False


def _shape(value: Any) -> Sequence[int]:
    """The shape of an array or of a runtime's handle."""
    found = value.shape
    shape: Sequence[int] = found() if callable(found) else found
    return shape


def _many(graph: Any) -> list[Any]:
    """One branch of every choice, for the others count the same: what a decoder does for a few rows together."""
    choices = [node for node in graph.node if node.op_type == "If" and not node.domain]
    branches = [a.g for node in choices for a in node.attribute if a.name == "else_branch"]
    return branches + [inner for branch in branches for inner in _many(branch)]


def _shapes_of(model: Any) -> dict[str, Dims]:
    graph = model.graph
    inside = [value for branch in _many(graph) for value in (*branch.value_info, *branch.output)]
    shapes: dict[str, Dims] = {}
    for value in (*graph.input, *graph.value_info, *graph.output, *inside):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.dim_value or d.dim_param for d in kind.shape.dim):
            shapes[value.name] = tuple(d.dim_value or _plain(d.dim_param) for d in kind.shape.dim)
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _plain(dim: str) -> Dim:
    return int(dim) if dim.isdigit() else dim


def _matmul(node: Any, shapes: Shapes) -> Dims:
    return (2, *shapes[node.output[0]], shapes[node.input[0]][-1])


def _quantised(node: Any, shapes: Shapes) -> Dims:
    return (2, *shapes[node.output[0]], attribute_of(node, "K"))


def _gemm(node: Any, shapes: Shapes) -> Dims:
    return (2, *shapes[node.output[0]], shapes[node.input[0]][0 if attribute_of(node, "transA") else -1])


def _conv(node: Any, shapes: Shapes) -> Dims:
    return (2, *shapes[node.output[0]], *shapes[node.input[1]][1:])


def _attention(node: Any, shapes: Shapes) -> list[Dims]:
    """4D inputs, as the exporter writes them, or heads side by side; keys are those of the cache and the chunk."""
    heads = attribute_of(node, "q_num_heads")
    if heads and len(node.output) == 1:
        return [_over_all(heads, shapes[node.output[0]])]
    if heads:
        (batch, rows, _), k_BHTd, v_BHTd = (shapes[name] for name in node.output[:3])
        return [(2, batch, heads, rows, width, k_BHTd[2]) for width in (k_BHTd[3], v_BHTd[3])]
    q_BHSd, v_BHTd = (shapes[node.input[i]] for i in (0, 2))
    keys = shapes[node.output[1]][2] if len(node.output) > 1 and node.output[1] else v_BHTd[2]
    return [(2, *q_BHSd, keys), (2, *q_BHSd[:3], keys, v_BHTd[3])]


def _grouped(node: Any, shapes: Shapes) -> Dims:
    """GroupQueryAttention over a buffer: q and out hold all heads side by side, keys are the filled rows."""
    batch, rows, _ = shapes.get(node.output[0]) or shapes[node.input[0]]
    buffer, width = shapes[node.input[3]][2:]
    return (4, batch, attribute_of(node, "num_heads"), rows, _filled(buffer, rows), width)


def _received(node: Any, shapes: Shapes) -> Dims:
    """Guide rows (all rows where there is no guide) against keys."""
    (batch, heads, rows, width), k_BVTd = (shapes[node.input[i]] for i in (0, 1))
    buffered = node.op_type in OVER_CACHE.values()
    guided = buffered or node.op_type in RECEIVED
    keys = _filled(k_BVTd[2], rows) if buffered else k_BVTd[2]
    return (2, batch, heads, shapes[node.input[2]][-1] if guided else rows, keys, width)


def _filled(buffer: Dim, rows: Dim) -> Dim:
    """What a chunk sees of a buffer of C_j rows: the P_j rows that were filled, and its own."""
    if not isinstance(buffer, str) or not buffer.startswith("C_"):
        raise KeyError(buffer)  # a capacity that is a number does not say whose it is
    return f"{buffer.replace('C_', 'P_', 1)} + {rows}"


def _block_attention(node: Any, shapes: Shapes) -> Dims:
    q_BHKd = shapes[node.input[0]]
    return (4, *q_BHKd, q_BHKd[2])


def _tiled(node: Any, shapes: Shapes) -> Dims:
    """A tower's attention as the CPU's packed stages have it; a column that says what is padding is left out."""
    return _over_all(attribute_of(node, "num_heads"), shapes[node.output[0]])


def _over_all(heads: int, out_BKD: Dims) -> Dims:
    """Every row of heads side by side against every row."""
    batch, rows, width = out_BKD
    return (4, batch, heads, rows, int(width) // heads, rows)


def _text_raters(node: Any, shapes: Shapes) -> Dims:
    return (2, *shapes[node.input[0]], shapes[node.input[2]][0])


def _merge_context(node: Any, shapes: Shapes) -> Dims:
    """The rest against the contextual tokens."""
    (batch, tokens, width), dominant_BA, targets_M = (shapes[node.input[i]] for i in (1, -2, -1))
    return (2, batch, f"({tokens}) - ({dominant_BA[1]})", targets_M[0], width)


def _merge_pairs(node: Any, shapes: Shapes) -> Dims:
    batch, tokens, width = shapes[node.input[3]]
    return (2, batch, f"(({tokens}) + 1)//2", f"({tokens})//2", width)


def _merge_dropped(node: Any, shapes: Shapes) -> Dims:
    (recycled,) = shapes[node.input[5]]
    return (2, shapes[node.input[0]][0], recycled, recycled, shapes[node.input[0]][2])


COUNTS: dict[tuple[str, str], Callable[[Any, Shapes], Dims | list[Dims]]] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "Attention"): _attention,
    (MICROSOFT, "GroupQueryAttention"): _grouped,
    (MICROSOFT, "FusedMatMul"): _matmul,  # packed stages turn the second factor only
    (MICROSOFT, "MatMulNBits"): _quantised,
    (MICROSOFT, "MultiHeadAttention"): _tiled,
    (DOMAIN, "AttentionReceived"): _received,
    (DOMAIN, "RatedAttentionReceived"): _received,
    (DOMAIN, "ReceivedInCache"): _received,
    (DOMAIN, "RatedReceivedInCache"): _received,
    (DOMAIN, "ReceivedFromAll"): _received,
    (DOMAIN, "ReceivedWithin"): _received,
    (DOMAIN, "BlockAttention"): _block_attention,
    (DOMAIN, "TextRaters"): _text_raters,
    (DOMAIN, "MergeContext"): _merge_context,
    (DOMAIN, "MergeContextWithin"): _merge_context,
    (DOMAIN, "MergePairs"): _merge_pairs,
    (DOMAIN, "MergeDropped"): _merge_dropped,
}
