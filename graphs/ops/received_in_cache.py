"""ReceivedInCache: what each row of a cache's buffer receives from the guide rows; rows that are not filled, nothing.

Legend: B batch, H query heads, V key-value heads, S rows, C rows of the buffer, D head width, G guide rows, P rows of a
piece, R rows of q that share a key-value head.

    received[b, t] = Σ_h Σ_{g < G} softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t],   t ≤ length + S − G + g

Source: AttentionReceived, over the first length + S rows of k; what lies behind them is never read as a number, so it
may be anything. Shape rule: q [B,H,S,D], k [B,V,C,D], guide [G], length int64 [1] → fp32 [B,C]. The keys stay as they
lie and the few rows of q are turned, so no copy of k is made. The body walks G in pieces of at most 64 rows.
"""

from typing import Any

from graphs.ops.attention_received import PIECE, received_in_pieces
from graphs.ops.op import Op

START = """
  axis_2 = Constant <value_ints: ints = [2]> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  rest_1 = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  none = Constant <value: tensor = float {-inf}> ()
  scale = Constant <value_float: float = @scale> ()
  batch_1 = Shape <start: int = 0, end: int = 1> (k)
  head_1 = Shape <start: int = 1, end: int = 2> (q)
  row_1 = Shape <start: int = 2, end: int = 3> (q)
  group_1 = Shape <start: int = 1, end: int = 2> (k)
  key_1 = Shape <start: int = 2, end: int = 3> (k)
  width_1 = Shape <start: int = 3, end: int = 4> (k)
  guides = Squeeze (guide_1)
  keys = Squeeze (key_1)
  filled_1 = Add (length, row_1)
  before_guide = Sub (filled_1, guide_1)
  first_1 = Sub (row_1, guide_1)
  q_guide = Slice (q, first_1, row_1, axis_2)
  q_wide = Cast <to: int = 1> (q_guide)
  q_scaled = Mul (q_wide, scale)
  k_wide = Cast <to: int = 1> (k)
  key_of = Range (zero, keys, one)
  grouped_shape = Concat <axis: int = 0> (batch_1, group_1, rest_1, width_1)"""

SHARES = """q_grouped = Reshape (q_piece, grouped_shape)
      q_turned = Transpose <perm: ints = [0, 1, 3, 2]> (q_grouped)
      logit_turned = MatMul (k_wide, q_turned)
      logit_grouped = Transpose <perm: ints = [0, 1, 3, 2]> (logit_turned)
      logit = Reshape (logit_grouped, map_shape)
      last_key = Add (guide_real, before_guide)
      last_key_column = Unsqueeze (last_key, one_1)
      visible = LessOrEqual (key_of, last_key_column)
      logit_seen = Where (visible, logit, none)
      share = Softmax <axis: int = -1> (logit_seen)"""


def _head(name: str, weighted: bool) -> str:
    third = "weight" if weighted else "guide"
    axes = "<start: int = 1, end: int = 2> " if weighted else ""
    return f"""
<domain: "saccade", opset_import: ["" : 23]>
{name} <scale> (q, k, {third}, length) => (received)
{{
  guide_1 = Shape {axes}({third}){START}"""


def body_of(name: str, weighted: bool = False) -> str:
    """The body; weighted: the rows' weights [B,G] stand in for the carrier."""
    weight = """weight_piece = Gather <axis: int = 1> (weight, guide_real)
      weight_once = Mul (weight_piece, real)
      weight_column = Unsqueeze (weight_once, head_and_width)"""
    return f"""{_head(name, weighted)}
  head_and_width = Constant <value_ints: ints = [1, 3]> ()
  limit_1 = Constant <value_ints: ints = [{PIECE}]> ()
  piece_1 = Min (guide_1, limit_1)
  piece = Squeeze (piece_1)
  guides_up = Add (guides, piece)
  guides_up_less = Sub (guides_up, one)
  pieces = Div (guides_up_less, piece)
  last_guide = Sub (guides, one)
  row_of_piece = Range (zero, piece, one)
  map_shape = Concat <axis: int = 0> (batch_1, head_1, piece_1, key_1)
  sum_shape = Concat <axis: int = 0> (batch_1, key_1)
  nothing = ConstantOfShape <value: tensor = float[1] {{0.0}}> (sum_shape)
  yes = Constant <value: tensor = bool {{1}}> ()
  received = Loop (pieces, yes, nothing) <body: graph = one_piece
    (int64 i, bool going, float[B, C] so_far) => (bool goes_on, float[B, C] summed)
    {{
      goes_on = Identity (going)
      offset = Mul (i, piece)
      guide_of = Add (offset, row_of_piece)
      guide_real = Min (guide_of, last_guide)
      q_piece = Gather <axis: int = 2> (q_scaled, guide_real)
      {SHARES}
      is_real = Equal (guide_of, guide_real)
      real = Cast <to: int = 1> (is_real)
      {weight if weighted else "weight_column = Unsqueeze (real, one_1)"}
      share_real = Mul (share, weight_column)
      share_sum = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
      summed = Add (so_far, share_sum)
    }}>
}}
"""


def flat_body_of(name: str, weighted: bool = False) -> str:
    """The same meaning without a Loop: the map H·G·C is there at once."""
    weight = """head_and_width = Constant <value_ints: ints = [1, 3]> ()
  weight_column = Unsqueeze (weight, head_and_width)
  share_real = Mul (share, weight_column)"""
    return f"""{_head(name, weighted)}
  map_shape = Concat <axis: int = 0> (batch_1, head_1, guide_1, key_1)
  guide_real = Range (zero, guides, one)
  q_piece = Identity (q_scaled)
  {SHARES}
  {weight if weighted else "share_real = Identity (share)"}
  received = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
}}
"""


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


OP = Op("ReceivedInCache", body_of("ReceivedInCache"), define, flat_body_of("ReceivedInCache"))
