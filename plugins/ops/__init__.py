"""Which ops of ``graphs.ops`` kernels serve, one file each; neither torch nor Triton nor a runtime is imported here."""

from plugins.ops import attention_received, compact_rows, keep_topk
from plugins.ops.served import ServedOp

SERVED: dict[str, ServedOp] = {
    served.op: served
    for served in (
        attention_received.PLAIN,
        attention_received.RATED,
        attention_received.PLAIN_CACHED,
        attention_received.RATED_CACHED,
        keep_topk.SERVED,
        compact_rows.SERVED,
    )
}

__all__ = ["SERVED", "ServedOp"]
