"""Our ops, one file each: formula, torch meaning, ONNX function body, shape rule, source."""

from graphs.ops import (
    attention_received,
    block_attention,
    compact_rows,
    keep_per_image,
    keep_topk,
    merge_context,
    merge_context_within,
    merge_dropped,
    merge_pairs,
    rated_attention_received,
    rated_received_in_cache,
    received_from_all,
    received_in_cache,
    received_within,
    text_raters,
)
from graphs.ops.op import DOMAIN, VERSION, Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        attention_received.OP,
        keep_topk.OP,
        compact_rows.OP,
        rated_attention_received.OP,
        received_from_all.OP,
        text_raters.OP,
        merge_context.OP,
        merge_pairs.OP,
        block_attention.OP,
        keep_per_image.OP,
        received_within.OP,
        merge_context_within.OP,
        merge_dropped.OP,
        received_in_cache.OP,
        rated_received_in_cache.OP,
    )
}
# What guide rows ask of a chunk's keys: op → the op of the same meaning over a cache that is written in place.
OVER_CACHE = {op.name: op.in_cache for op in OPS.values() if op.in_cache}
RECEIVED = frozenset(OVER_CACHE)
RANKING = frozenset(op.name for op in OPS.values() if op.ranks)

__all__ = ["DOMAIN", "OPS", "OVER_CACHE", "RANKING", "RECEIVED", "VERSION", "Op"]
