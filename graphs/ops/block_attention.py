"""BlockAttention: full attention inside each block, with padding keys left out.

Legend: B blocks (windows, or images), H heads, K places of a block, D head width, P rows of a piece.

    out[b, h, i] = Σ_j softmax_j(scale · q[b, h, i] · k[b, h, j]ᵀ, over is_real[b, j]) v[b, h, j]

Source: the vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL (transformers, cu_seqlens attention).
Shape rule: q, k, v [B,H,K,D], is_real bool [B,K] → q's [B,H,K,D]; what stands in padding rows is not defined.
The body walks the query rows in pieces of at most 256, so the largest intermediate is B·H·256·K: linear in
the number of patches both for windows (K fixed, B grows) and for one large image (B = 1, K grows). The flat body is the
formula as it stands, for a compiler that holds no map of it.
"""

from typing import Any

from graphs.ops.op import Op

PIECE = 256

HEAD = """
<domain: "saccade", opset_import: ["" : 23]>
BlockAttention <scale> (q, k, v, is_real) => (out)
{
"""

SCALED = """  scale = Constant <value_float: float = @scale> ()
  scale_like = CastLike (scale, q)
  q_scaled = Mul (q, scale_like)
  k_turned = Transpose <perm: ints = [0, 1, 3, 2]> (k)
  visible = Unsqueeze (is_real, head_and_row)
"""

SHARE = """  logit_wide = Cast <to: int = 1> (logit)
  logit_seen = Where (visible, logit_wide, none)
  share_wide = Softmax <axis: int = -1> (logit_seen)
  share = CastLike (share_wide, v)
"""

BODY = f"""{HEAD}
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  none = Constant <value: tensor = float {{-inf}}> ()
  limit_1 = Constant <value_ints: ints = [{PIECE}]> ()
{SCALED}  row_1 = Shape <start: int = 2, end: int = 3> (q)
  piece_1 = Min (row_1, limit_1)
  piece = Squeeze (piece_1)
  rows = Squeeze (row_1)
  last_row = Sub (rows, one)
  rows_up = Add (last_row, piece)
  pieces = Div (rows_up, piece)
  row_of_piece = Range (zero, piece, one)
  yes = Constant <value: tensor = bool {{1}}> ()
  zero_1 = Constant <value_ints: ints = [0]> ()
  axis_2 = Constant <value_ints: ints = [2]> ()
  joined = Constant <value_ints: ints = [0, 0, -1]> ()
  width_1 = Shape <start: int = 3, end: int = 4> (q)
  out_pieces = Loop (pieces, yes) <body: graph = one_piece
    (int64 i, bool going) => (bool goes_on, out_piece)
    {{
      goes_on = Identity (going)
      offset = Mul (i, piece)
      row_of = Add (offset, row_of_piece)
      row_real = Min (row_of, last_row)
      q_piece = Gather <axis: int = 2> (q_scaled, row_real)
      logit = MatMul (q_piece, k_turned)
{SHARE}      out_piece = MatMul (share, v)
    }}>
  out_turned = Transpose <perm: ints = [1, 2, 0, 3, 4]> (out_pieces)
  out_shape = Concat <axis: int = 0> (joined, width_1)
  out_padded = Reshape (out_turned, out_shape)
  out = Slice (out_padded, zero_1, row_1, axis_2)
}}
"""

FLAT_BODY = f"""{HEAD}
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  none = Constant <value: tensor = float {{-inf}}> ()
{SCALED}  logit = MatMul (q_scaled, k_turned)
{SHARE}  out = MatMul (share, v)
}}
"""


def define() -> Any:
    """Register ``saccade::block_attention(q, k, v, is_real, scale)``."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    @torch.library.custom_op("saccade::block_attention", mutates_args=())
    def block_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_real: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=is_real[:, None, None], scale=scale).contiguous()

    @block_attention.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_real: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(q.shape)

    return block_attention


OP = Op("BlockAttention", BODY, define, flat_body=FLAT_BODY, carries=True)
