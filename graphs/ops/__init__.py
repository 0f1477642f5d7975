"""Our ops, one file each: formula, torch meaning, ONNX function body, shape rule, source."""

from graphs.ops import attention_received, block_attention, compact_rows, keep_topk
from graphs.ops.op import DOMAIN, VERSION, Op

OPS: dict[str, Op] = {op.name: op for op in (attention_received.OP, keep_topk.OP, compact_rows.OP, block_attention.OP)}

__all__ = ["DOMAIN", "OPS", "VERSION", "Op"]
