"""RatedAttentionReceived: what each key receives from the guide rows, each row counted by its weight.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, P rows of a piece.

    received[b, t] = Σ_h Σ_{g < G} weight[b, g] · softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t],   t ≤ T−G+g

Source: SparseVLM (arXiv 2410.04417), the mean over heads and over raters up to a constant; the weights come
from TextRaters. Shape rule: q [B,H,S,D], k [B,V,T,D], weight fp32 [B,G] → fp32 [B,T]. The body is
AttentionReceived's with one product more.
"""

from typing import Any

from graphs.ops.attention_received import PIECE, body_of
from graphs.ops.op import Op

BODY = body_of("RatedAttentionReceived", weighted=True)


def define() -> Any:
    """Register ``saccade::rated_attention_received(q, k, weight, scale)``, the formula in torch."""
    import torch

    @torch.library.custom_op("saccade::rated_attention_received", mutates_args=())
    def rated_attention_received(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
        (b, h, s, d), (_, v, t, _), g = q.shape, k.shape, weight.shape[1]
        received_BT = torch.zeros(b, t, dtype=torch.float32, device=q.device)
        key_T = torch.arange(t, device=q.device)
        k_BVDT = k.float().transpose(2, 3)
        for start in range(0, g, PIECE):
            row_P = torch.arange(start, min(start + PIECE, g), device=q.device)
            q_BVRD = (q[:, :, s - g + row_P].float() * scale).reshape(b, v, -1, d)
            logit_BHPT = (q_BVRD @ k_BVDT).reshape(b, h, len(row_P), t)
            hidden_PT = key_T > (t - g + row_P)[:, None]
            share_BHPT = logit_BHPT.masked_fill(hidden_PT, -torch.inf).softmax(-1)
            received_BT += (share_BHPT * weight[:, None, row_P, None]).sum((1, 2))
        return received_BT

    @rated_attention_received.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return rated_attention_received


OP = Op("RatedAttentionReceived", BODY, define)
