"""ReceivedInCache: what each row of a cache's buffer receives from the guide rows; rows that are not filled, nothing.

Legend: B batch, H query heads, V key-value heads, S rows, C rows of the buffer, D head width, G guide rows, P rows of a
piece, R rows of q that share a key-value head.

    received[b, t] = Σ_h Σ_{g < G} softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t],   t ≤ length + S − G + g

Source: AttentionReceived, over the first length + S rows of k; what lies behind them is never read as a number, so it
may be anything. Shape rule: q [B,H,S,D], k [B,V,C,D], guide [G], length int64 [1] → fp32 [B,C]. The keys stay as they
lie and the few rows of q are turned, so no copy of k is made. The body walks G in pieces of at most 64 rows.
"""

from typing import Any

from graphs.ops.attention_received import (
    CARRIER,
    FACTORS,
    ONLY_SEEN,
    PIECE,
    PIECES,
    SIZES,
    Guides,
    head_of,
    received_in_pieces,
    sum_of_pieces,
)
from graphs.ops.op import Op

START = f"""axis_2 = Constant <value_ints: ints = [2]> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  rest_1 = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  none = Constant <value: tensor = float {{-inf}}> ()
  {SIZES}
  guides = Squeeze (guide_1)
  keys = Squeeze (key_1)
  filled_1 = Add (length, row_1)
  before_guide = Sub (filled_1, guide_1)
  {FACTORS}
  key_of = Range (zero, keys, one)
  grouped_shape = Concat <axis: int = 0> (batch_1, group_1, rest_1, width_1)"""

SHARE = f"""q_grouped = Reshape (q_piece, grouped_shape)
      q_turned = Transpose <perm: ints = [0, 1, 3, 2]> (q_grouped)
      logit_turned = MatMul (k_wide, q_turned)
      logit_grouped = Transpose <perm: ints = [0, 1, 3, 2]> (logit_turned)
      logit = Reshape (logit_grouped, map_shape)
      last_key = Add (guide_real, before_guide)
      {ONLY_SEEN}
      share = Softmax <axis: int = -1> (logit_seen)"""


def bodies_of(name: str, inputs: str, guides: Guides) -> tuple[str, str]:
    """The body, and the flat one: no Loop, the map H·G·C is there at once."""
    body = f"""{head_of(name, inputs)}
  {guides.number}
  {START}
  head_and_width = Constant <value_ints: ints = [1, 3]> ()
  limit_1 = Constant <value_ints: ints = [{PIECE}]> ()
  piece_1 = Min (guide_1, limit_1)
  piece = Squeeze (piece_1)
  {PIECES}
  row_of_piece = Range (zero, piece, one)
  {sum_of_pieces(SHARE, guides.piece, keys="C")}"""
    flat_body = f"""{head_of(name, inputs)}
  {guides.number}
  {START}
  map_shape = Concat <axis: int = 0> (batch_1, head_1, guide_1, key_1)
  guide_real = Range (zero, guides, one)
  q_piece = Identity (q_scaled)
  {SHARE}
  {guides.flat}
  received = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
}}
"""
    return body, flat_body


BODY, FLAT_BODY = bodies_of("ReceivedInCache", "q, k, guide, length", CARRIER)


def received_from_filled(q: Any, k: Any, weight_BG: Any, length: Any, scale: float) -> Any:
    """The formula in torch: weight fp32 [B,G], length int64 [1]."""
    import torch

    filled = int(length) + q.shape[2]
    received_BT = received_in_pieces(q, k[:, :, :filled], weight_BG, scale)
    return torch.nn.functional.pad(received_BT, (0, k.shape[2] - filled))


def define() -> Any:
    """Register ``saccade::received_in_cache(q, k, guide, length, scale)``."""
    import torch

    @torch.library.custom_op("saccade::received_in_cache", mutates_args=())
    def received_in_cache(
        q: torch.Tensor, k: torch.Tensor, guide: torch.Tensor, length: torch.Tensor, scale: float
    ) -> torch.Tensor:
        every_row_BG = torch.ones(q.shape[0], guide.shape[0], dtype=torch.float32, device=q.device)
        return received_from_filled(q, k, every_row_BG, length, scale)

    @received_in_cache.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, guide: torch.Tensor, length: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return received_in_cache


OP = Op("ReceivedInCache", BODY, define, FLAT_BODY)
