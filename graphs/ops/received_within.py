"""ReceivedWithin: what each row receives from every row of its own image, images packed behind each other.

Legend: B batch, H query heads, V key-value heads, S rows, D head width, P rows of a piece.

    received[b, t] = Σ_h Σ_{s in t's image} softmax_{keys of that image}(scale · q[b, h, s] · k[b, h // (H/V)]ᵀ)[t]

Source: ReceivedFromAll, image by image, where images have no common length (patches, joined tiles). Shape rule:
q [B,H,S,D], k [B,V,S,D], image int64 [B,S] → fp32 [B,S]. Rows are walked in pieces of at most 64, so no S×S map exists.
"""

from typing import Any

from graphs.ops.attention_received import PIECE, body_of, flat_body_of
from graphs.ops.op import Op

BODY = body_of("ReceivedWithin", causal=False, within=True)
FLAT_BODY = flat_body_of("ReceivedWithin", causal=False, within=True)


def define() -> Any:
    """Register ``saccade::received_within(q, k, image, scale)``, the formula in torch."""
    import torch

    @torch.library.custom_op("saccade::received_within", mutates_args=())
    def received_within(q: torch.Tensor, k: torch.Tensor, image: torch.Tensor, scale: float) -> torch.Tensor:
        (b, h, s, d), (_, v, t, _) = q.shape, k.shape
        received_BT = torch.zeros(b, t, dtype=torch.float32, device=q.device)
        k_BVDT = k.float().transpose(2, 3)
        for start in range(0, s, PIECE):
            q_BHPD = q[:, :, start : start + PIECE].float() * scale
            logit_BHPT = (q_BHPD.reshape(b, v, -1, d) @ k_BVDT).reshape(b, h, q_BHPD.shape[2], t)
            other_BPT = image[:, start : start + PIECE, None] != image[:, None]
            received_BT += logit_BHPT.masked_fill(other_BPT[:, None], -torch.inf).softmax(-1).sum((1, 2))
        return received_BT

    @received_within.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, image: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return received_within


OP = Op("ReceivedWithin", BODY, define, FLAT_BODY)
