"""RatedReceivedInCache: ReceivedInCache with each guide row counted by its weight.

Legend: B batch, H query heads, V key-value heads, S rows, C rows of the buffer, D head width, G guide rows.

    received[b, t] = Σ_h Σ_{g < G} weight[b, g] · softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t]

for t ≤ length + S − G + g. Source: RatedAttentionReceived (SparseVLM, arXiv 2410.04417) over the first length + S rows
of k. Shape rule: q [B,H,S,D], k [B,V,C,D], weight fp32 [B,G], length int64 [1] → fp32 [B,C].
"""

from typing import Any

from graphs.ops.attention_received import RATED
from graphs.ops.op import Op
from graphs.ops.received_in_cache import bodies_of, received_from_filled

BODY, FLAT_BODY = bodies_of("RatedReceivedInCache", "q, k, weight, length", RATED)


def define() -> Any:
    """Register ``saccade::rated_received_in_cache(q, k, weight, length, scale)``."""
    import torch

    @torch.library.custom_op("saccade::rated_received_in_cache", mutates_args=())
    def rated_received_in_cache(
        q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, length: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return received_from_filled(q, k, weight, length, scale)

    @rated_received_in_cache.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, length: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return rated_received_in_cache


OP = Op("RatedReceivedInCache", BODY, define, FLAT_BODY, scores=(2,))
