"""AttentionReceived: what each key receives from the guide rows.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, P rows of a piece.

    received[b, t] = Σ_h Σ_{g < G} softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t],   t ≤ T−G+g

Source: SGL's guidance summed over heads and rows (arXiv 2412.03324 §3.2); STAR's second stage and FastV
are the same map with other rows. Shape rule: q [B,H,S,D], k [B,V,T,D], guide [G] → fp32 [B,T].
The S×T map never exists, and the body walks G in pieces of at most 64 rows, so the largest
intermediate is H·64·T (H·G·T in the flat body, for compilers that fail on a Loop). A piece's length is
loop-invariant (a short last piece repeats its last row with weight 0), as TensorRT's loops want it. NaN in,
NaN out: KeepTopK gives it a rank.
"""

from typing import Any

from graphs.ops.op import Op

PIECE = 64
# (causal, weighted) → the body's inputs, and how many guide rows they give
HEADS = {
    (True, False): ("q, k, guide", "guide_1 = Shape (guide)"),
    (True, True): ("q, k, weight", "guide_1 = Shape <start: int = 1, end: int = 2> (weight)"),
    (False, False): ("q, k", "guide_1 = Shape <start: int = 2, end: int = 3> (q)"),
}


def body_of(name: str, *, causal: bool = True, weighted: bool = False, within: bool = False) -> str:
    """The body of this op and of its kin: the same walk over pieces of the last rows.

    causal: the rows are the last ones of ``guide`` (a carrier) and see no later key; else all of q, and see all.
    weighted: the rows' weights [B,G] stand in for the carrier. within: a row sees the keys of its own ``image`` [B,T].
    """
    inputs, guides = HEADS[causal, weighted]
    inputs += ", image" if within else ""
    mask = """last_key = Add (guide_real, before_guide)
      last_key_column = Unsqueeze (last_key, one_1)
      visible = LessOrEqual (key_of, last_key_column)
      logit_seen = Where (visible, logit, none)"""
    own_image = """image_piece = Gather <axis: int = 1> (image, guide_real)
      image_row = Unsqueeze (image_piece, head_and_width)
      image_key = Unsqueeze (image, head_and_row)
      visible = Equal (image_row, image_key)
      logit_seen = Where (visible, logit, none)"""
    seen = mask if causal else own_image if within else "logit_seen = Identity (logit)"
    weight = """weight_piece = Gather <axis: int = 1> (weight, guide_real)
      weight_once = Mul (weight_piece, real)
      weight_column = Unsqueeze (weight_once, head_and_width)"""
    return f"""
<domain: "saccade", opset_import: ["" : 23]>
{name} <scale> ({inputs}) => (received)
{{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  axis_2 = Constant <value_ints: ints = [2]> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  head_and_width = Constant <value_ints: ints = [1, 3]> ()
  rest_1 = Constant <value_ints: ints = [-1]> ()
  none = Constant <value: tensor = float {{-inf}}> ()
  limit_1 = Constant <value_ints: ints = [{PIECE}]> ()
  scale = Constant <value_float: float = @scale> ()
  batch_1 = Shape <start: int = 0, end: int = 1> (k)
  head_1 = Shape <start: int = 1, end: int = 2> (q)
  row_1 = Shape <start: int = 2, end: int = 3> (q)
  group_1 = Shape <start: int = 1, end: int = 2> (k)
  key_1 = Shape <start: int = 2, end: int = 3> (k)
  width_1 = Shape <start: int = 3, end: int = 4> (k)
  {guides}
  piece_1 = Min (guide_1, limit_1)
  piece = Squeeze (piece_1)
  guides = Squeeze (guide_1)
  keys = Squeeze (key_1)
  guides_up = Add (guides, piece)
  guides_up_less = Sub (guides_up, one)
  pieces = Div (guides_up_less, piece)
  last_guide = Sub (guides, one)
  before_guide = Sub (keys, guides)
  first_1 = Sub (row_1, guide_1)
  q_guide = Slice (q, first_1, row_1, axis_2)
  q_wide = Cast <to: int = 1> (q_guide)
  q_scaled = Mul (q_wide, scale)
  k_wide = Cast <to: int = 1> (k)
  k_turned = Transpose <perm: ints = [0, 1, 3, 2]> (k_wide)
  row_of_piece = Range (zero, piece, one)
  key_of = Range (zero, keys, one)
  grouped_shape = Concat <axis: int = 0> (batch_1, group_1, rest_1, width_1)
  map_shape = Concat <axis: int = 0> (batch_1, head_1, piece_1, key_1)
  sum_shape = Concat <axis: int = 0> (batch_1, key_1)
  nothing = ConstantOfShape <value: tensor = float[1] {{0.0}}> (sum_shape)
  yes = Constant <value: tensor = bool {{1}}> ()
  received = Loop (pieces, yes, nothing) <body: graph = one_piece
    (int64 i, bool going, float[B, T] so_far) => (bool goes_on, float[B, T] summed)
    {{
      goes_on = Identity (going)
      offset = Mul (i, piece)
      guide_of = Add (offset, row_of_piece)
      guide_real = Min (guide_of, last_guide)
      q_piece = Gather <axis: int = 2> (q_scaled, guide_real)
      q_grouped = Reshape (q_piece, grouped_shape)
      logit_grouped = MatMul (q_grouped, k_turned)
      logit = Reshape (logit_grouped, map_shape)
      {seen}
      share = Softmax <axis: int = -1> (logit_seen)
      is_real = Equal (guide_of, guide_real)
      real = Cast <to: int = 1> (is_real)
      {weight if weighted else "weight_column = Unsqueeze (real, one_1)"}
      share_real = Mul (share, weight_column)
      share_sum = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
      summed = Add (so_far, share_sum)
    }}>
}}
"""


BODY = body_of("AttentionReceived")


def flat_body_of(name: str, *, causal: bool = True, weighted: bool = False, within: bool = False) -> str:
    """The same meaning without a Loop, for runtimes whose compiler fails on one: the map H·G·T is there at once."""
    inputs, guides = HEADS[causal, weighted]
    inputs += ", image" if within else ""
    own_image = """head_and_width = Constant <value_ints: ints = [1, 3]> ()
  none = Constant <value: tensor = float {-inf}> ()
  image_row = Unsqueeze (image, head_and_width)
  image_key = Unsqueeze (image, head_and_row)
  visible = Equal (image_row, image_key)
  logit_seen = Where (visible, logit, none)"""
    mask = """zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  none = Constant <value: tensor = float {-inf}> ()
  guides = Squeeze (guide_1)
  keys = Squeeze (key_1)
  before_guide = Sub (keys, guides)
  key_of = Range (zero, keys, one)
  last_key = Range (before_guide, keys, one)
  last_key_column = Unsqueeze (last_key, one_1)
  visible = LessOrEqual (key_of, last_key_column)
  logit_seen = Where (visible, logit, none)"""
    weight = """head_and_width = Constant <value_ints: ints = [1, 3]> ()
  weight_column = Unsqueeze (weight, head_and_width)
  share_real = Mul (share, weight_column)"""
    return f"""
<domain: "saccade", opset_import: ["" : 23]>
{name} <scale> ({inputs}) => (received)
{{
  axis_2 = Constant <value_ints: ints = [2]> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  rest_1 = Constant <value_ints: ints = [-1]> ()
  scale = Constant <value_float: float = @scale> ()
  batch_1 = Shape <start: int = 0, end: int = 1> (k)
  head_1 = Shape <start: int = 1, end: int = 2> (q)
  row_1 = Shape <start: int = 2, end: int = 3> (q)
  group_1 = Shape <start: int = 1, end: int = 2> (k)
  key_1 = Shape <start: int = 2, end: int = 3> (k)
  width_1 = Shape <start: int = 3, end: int = 4> (k)
  {guides}
  first_1 = Sub (row_1, guide_1)
  q_guide = Slice (q, first_1, row_1, axis_2)
  q_wide = Cast <to: int = 1> (q_guide)
  q_scaled = Mul (q_wide, scale)
  k_wide = Cast <to: int = 1> (k)
  k_turned = Transpose <perm: ints = [0, 1, 3, 2]> (k_wide)
  grouped_shape = Concat <axis: int = 0> (batch_1, group_1, rest_1, width_1)
  map_shape = Concat <axis: int = 0> (batch_1, head_1, guide_1, key_1)
  q_grouped = Reshape (q_scaled, grouped_shape)
  logit_grouped = MatMul (q_grouped, k_turned)
  logit = Reshape (logit_grouped, map_shape)
  {mask if causal else own_image if within else "logit_seen = Identity (logit)"}
  share = Softmax <axis: int = -1> (logit_seen)
  {weight if weighted else "share_real = Identity (share)"}
  received = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
}}
"""


FLAT_BODY = flat_body_of("AttentionReceived")


def received_in_pieces(q: Any, k: Any, weight_BG: Any, scale: float) -> Any:
    """The formula in torch, each guide row counted by its weight: q [B,H,S,D], k [B,V,T,D], weight fp32 [B,G]."""
    import torch

    (b, h, s, d), (_, v, t, _), g = q.shape, k.shape, weight_BG.shape[1]
    received_BT = torch.zeros(b, t, dtype=torch.float32, device=q.device)
    key_T = torch.arange(t, device=q.device)
    k_BVDT = k.float().transpose(2, 3)
    for start in range(0, g, PIECE):
        row_P = torch.arange(start, min(start + PIECE, g), device=q.device)
        q_BVRD = (q[:, :, s - g + row_P].float() * scale).reshape(b, v, -1, d)
        logit_BHPT = (q_BVRD @ k_BVDT).reshape(b, h, len(row_P), t)
        hidden_PT = key_T > (t - g + row_P)[:, None]
        share_BHPT = logit_BHPT.masked_fill(hidden_PT, -torch.inf).softmax(-1)
        received_BT += (share_BHPT * weight_BG[:, None, row_P, None]).sum((1, 2))
    return received_BT


def define() -> Any:
    """Register ``saccade::attention_received(q, k, guide, scale)``."""
    import torch

    @torch.library.custom_op("saccade::attention_received", mutates_args=())
    def attention_received(q: torch.Tensor, k: torch.Tensor, guide: torch.Tensor, scale: float) -> torch.Tensor:
        every_row_BG = torch.ones(q.shape[0], guide.shape[0], dtype=torch.float32, device=q.device)
        return received_in_pieces(q, k, every_row_BG, scale)

    @attention_received.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, guide: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return attention_received


OP = Op("AttentionReceived", BODY, define, FLAT_BODY)
