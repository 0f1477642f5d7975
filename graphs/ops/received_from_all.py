"""ReceivedFromAll: what each key receives from every row, no row hidden from any.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, P rows of a piece.

    received[b, t] = Σ_h Σ_s softmax_t(scale · q[b, h, s] · k[b, h // (H/V)]ᵀ)[t]

Source: STAR (arXiv 2505.12359), stage 1, with q = k = the visual embeddings, one head and scale 1/√d: r_j = mean_i
A_ij up to the constant 1/S; VisionZip (arXiv 2412.04467) for towers without a class token. Shape rule: q [B,H,S,D],
k [B,V,T,D] → fp32 [B,T]. The S×T map never exists: the body walks S in pieces of at most 64 rows.
"""

from typing import Any

from graphs.ops.attention_received import EVERY_ROW, Mask, bodies_of, received_in_pieces
from graphs.ops.op import Op

NOTHING = Mask("logit_seen = Identity (logit)", "logit_seen = Identity (logit)")
BODY, FLAT_BODY = bodies_of("ReceivedFromAll", "q, k", EVERY_ROW, NOTHING)


def define() -> Any:
    """Register ``saccade::received_from_all(q, k, scale)``, the formula in torch."""
    import torch

    @torch.library.custom_op("saccade::received_from_all", mutates_args=())
    def received_from_all(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        once_BS = torch.ones(q.shape[0], q.shape[2], dtype=torch.float32, device=q.device)
        nothing = torch.zeros((), dtype=torch.bool, device=q.device)
        return received_in_pieces(q, k, once_BS, scale, lambda _: nothing)

    @received_from_all.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return received_from_all


OP = Op("ReceivedFromAll", BODY, define, FLAT_BODY)
