"""RatedAttentionReceived: what each key receives from the guide rows, each row counted by its weight.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, P rows of a piece.

    received[b, t] = Σ_h Σ_{g < G} weight[b, g] · softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t],   t ≤ T−G+g

Source: SparseVLM (arXiv 2410.04417), the mean over heads and over raters up to a constant; the weights come
from TextRaters. Shape rule: q [B,H,S,D], k [B,V,T,D], weight fp32 [B,G] → fp32 [B,T]. The body is
AttentionReceived's with one product more.
"""

from typing import Any

from graphs.ops.attention_received import LATER_KEYS, RATED, bodies_of, received_in_pieces
from graphs.ops.op import Op

BODY, FLAT_BODY = bodies_of("RatedAttentionReceived", "q, k, weight", RATED, LATER_KEYS)


def define() -> Any:
    """Register ``saccade::rated_attention_received(q, k, weight, scale)``."""
    import torch

    @torch.library.custom_op("saccade::rated_attention_received", mutates_args=())
    def rated_attention_received(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
        return received_in_pieces(q, k, weight, scale)

    @rated_attention_received.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return rated_attention_received


OP = Op("RatedAttentionReceived", BODY, define, FLAT_BODY, scores=(2,), in_cache="RatedReceivedInCache")
