"""AttentionReceived: what each key receives from the guide rows.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, P rows of a piece.

    received[b, t] = Σ_h Σ_{g < G} softmax_t(scale · q[b, h, S−G+g] · k[b, h // (H/V)]ᵀ)[t],   t ≤ T−G+g

Source: SGL's guidance summed over heads and rows (arXiv 2412.03324 §3.2); STAR's second stage and FastV
are the same map with other rows. Shape rule: q [B,H,S,D], k [B,V,T,D], guide [G] → fp32 [B,T].
The S×T map never exists, and the body walks G in pieces of at most 64 rows, so the largest
intermediate is H·64·T (H·G·T in the flat body, for compilers that fail on a Loop). A piece's length is
loop-invariant (a short last piece repeats its last row with weight 0), as TensorRT's loops want it. NaN in,
NaN out: KeepTopK gives it a rank.
Bodies are put together of lines that the kin of this op have in common; ``OP.body`` is one written out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from graphs.ops.op import Op

PIECE = 64


class Guides(NamedTuple):
    """The last rows of q, which the keys receive from, as lines of a body.

    number: make guide_1, how many they are. piece: make weight_column, how much each row of a piece counts; of one that
    only fills it up, 0. flat: make share_real of share, all rows at once.
    """

    number: str
    piece: str
    flat: str


class Mask(NamedTuple):
    """What is hidden from a row: the lines that make logit_seen of logit, for a piece and for all rows at once."""

    piece: str
    flat: str


CARRIER = Guides("guide_1 = Shape (guide)", "weight_column = Unsqueeze (real, one_1)", "share_real = Identity (share)")
RATED = Guides(
    "guide_1 = Shape <start: int = 1, end: int = 2> (weight)",
    """weight_piece = Gather <axis: int = 1> (weight, guide_real)
      weight_once = Mul (weight_piece, real)
      weight_column = Unsqueeze (weight_once, head_and_width)""",
    """head_and_width = Constant <value_ints: ints = [1, 3]> ()
  weight_column = Unsqueeze (weight, head_and_width)
  share_real = Mul (share, weight_column)""",
)
EVERY_ROW = CARRIER._replace(number="guide_1 = Shape <start: int = 2, end: int = 3> (q)")

ONLY_SEEN = """last_key_column = Unsqueeze (last_key, one_1)
      visible = LessOrEqual (key_of, last_key_column)
      logit_seen = Where (visible, logit, none)"""
LATER_KEYS = Mask(
    f"""last_key = Add (guide_real, before_guide)
      {ONLY_SEEN}""",
    f"""zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  none = Constant <value: tensor = float {{-inf}}> ()
  guides = Squeeze (guide_1)
  keys = Squeeze (key_1)
  before_guide = Sub (keys, guides)
  key_of = Range (zero, keys, one)
  last_key = Range (before_guide, keys, one)
  {ONLY_SEEN}""",
)

SIZES = """scale = Constant <value_float: float = @scale> ()
  batch_1 = Shape <start: int = 0, end: int = 1> (k)
  head_1 = Shape <start: int = 1, end: int = 2> (q)
  row_1 = Shape <start: int = 2, end: int = 3> (q)
  group_1 = Shape <start: int = 1, end: int = 2> (k)
  key_1 = Shape <start: int = 2, end: int = 3> (k)
  width_1 = Shape <start: int = 3, end: int = 4> (k)"""
FACTORS = """first_1 = Sub (row_1, guide_1)
  q_guide = Slice (q, first_1, row_1, axis_2)
  q_wide = Cast <to: int = 1> (q_guide)
  q_scaled = Mul (q_wide, scale)
  k_wide = Cast <to: int = 1> (k)"""
LOGIT = """logit_grouped = MatMul (q_grouped, k_turned)
      logit = Reshape (logit_grouped, map_shape)"""
PIECES = """guides_up = Add (guides, piece)
  guides_up_less = Sub (guides_up, one)
  pieces = Div (guides_up_less, piece)
  last_guide = Sub (guides, one)"""


def head_of(name: str, inputs: str) -> str:
    """The beginning of a body."""
    return f"""
<domain: "saccade", opset_import: ["" : 23]>
{name} <scale> ({inputs}) => (received)
{{"""


def sum_of_pieces(share: str, weight_column: str, keys: str = "T") -> str:
    """The end of a body, a Loop over pieces. share: the lines that make share of q_piece, whose rows are guide_real."""
    return f"""map_shape = Concat <axis: int = 0> (batch_1, head_1, piece_1, key_1)
  sum_shape = Concat <axis: int = 0> (batch_1, key_1)
  nothing = ConstantOfShape <value: tensor = float[1] {{0.0}}> (sum_shape)
  yes = Constant <value: tensor = bool {{1}}> ()
  received = Loop (pieces, yes, nothing) <body: graph = one_piece
    (int64 i, bool going, float[B, {keys}] so_far) => (bool goes_on, float[B, {keys}] summed)
    {{
      goes_on = Identity (going)
      offset = Mul (i, piece)
      guide_of = Add (offset, row_of_piece)
      guide_real = Min (guide_of, last_guide)
      q_piece = Gather <axis: int = 2> (q_scaled, guide_real)
      {share}
      is_real = Equal (guide_of, guide_real)
      real = Cast <to: int = 1> (is_real)
      {weight_column}
      share_real = Mul (share, weight_column)
      share_sum = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
      summed = Add (so_far, share_sum)
    }}>
}}
"""


def bodies_of(name: str, inputs: str, guides: Guides, mask: Mask) -> tuple[str, str]:
    """The body of this op or of one of its kin, and the flat one: no Loop, the map H·G·T is there at once."""
    share = f"""q_grouped = Reshape (q_piece, grouped_shape)
      {LOGIT}
      {mask.piece}
      share = Softmax <axis: int = -1> (logit_seen)"""
    body = f"""{head_of(name, inputs)}
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  axis_2 = Constant <value_ints: ints = [2]> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  head_and_width = Constant <value_ints: ints = [1, 3]> ()
  rest_1 = Constant <value_ints: ints = [-1]> ()
  none = Constant <value: tensor = float {{-inf}}> ()
  limit_1 = Constant <value_ints: ints = [{PIECE}]> ()
  {SIZES}
  {guides.number}
  piece_1 = Min (guide_1, limit_1)
  piece = Squeeze (piece_1)
  guides = Squeeze (guide_1)
  keys = Squeeze (key_1)
  {PIECES}
  before_guide = Sub (keys, guides)
  {FACTORS}
  k_turned = Transpose <perm: ints = [0, 1, 3, 2]> (k_wide)
  row_of_piece = Range (zero, piece, one)
  key_of = Range (zero, keys, one)
  grouped_shape = Concat <axis: int = 0> (batch_1, group_1, rest_1, width_1)
  {sum_of_pieces(share, guides.piece)}"""
    flat_body = f"""{head_of(name, inputs)}
  axis_2 = Constant <value_ints: ints = [2]> ()
  head_and_row = Constant <value_ints: ints = [1, 2]> ()
  rest_1 = Constant <value_ints: ints = [-1]> ()
  {SIZES}
  {guides.number}
  {FACTORS}
  k_turned = Transpose <perm: ints = [0, 1, 3, 2]> (k_wide)
  grouped_shape = Concat <axis: int = 0> (batch_1, group_1, rest_1, width_1)
  map_shape = Concat <axis: int = 0> (batch_1, head_1, guide_1, key_1)
  q_grouped = Reshape (q_scaled, grouped_shape)
  {LOGIT}
  {mask.flat}
  share = Softmax <axis: int = -1> (logit_seen)
  {guides.flat}
  received = ReduceSum <keepdims: int = 0> (share_real, head_and_row)
}}
"""
    return body, flat_body


BODY, FLAT_BODY = bodies_of("AttentionReceived", "q, k, guide", CARRIER, LATER_KEYS)


def received_in_pieces(q: Any, k: Any, weight_BG: Any, scale: float, hidden: Callable[[Any], Any] | None = None) -> Any:
    """The formula in torch, each guide row counted by its weight: q [B,H,S,D], k [B,V,T,D], weight fp32 [B,G].

    hidden: of guide rows int64 [P] bool […,P,T], the keys that they do not see; None: later ones.
    """
    import torch

    (b, h, s, d), (_, v, t, _), g = q.shape, k.shape, weight_BG.shape[1]
    received_BT = torch.zeros(b, t, dtype=torch.float32, device=q.device)
    key_T = torch.arange(t, device=q.device)
    hidden = hidden or (lambda row_P: key_T > (t - g + row_P)[:, None])
    k_BVDT = k.float().transpose(2, 3)
    for start in range(0, g, PIECE):
        row_P = torch.arange(start, min(start + PIECE, g), device=q.device)
        q_BVRD = (q[:, :, s - g + row_P].float() * scale).reshape(b, v, -1, d)
        logit_BHPT = (q_BVRD @ k_BVDT).reshape(b, h, len(row_P), t)
        share_BHPT = logit_BHPT.masked_fill(hidden(row_P), -torch.inf).softmax(-1)
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


OP = Op("AttentionReceived", BODY, define, FLAT_BODY, in_cache="ReceivedInCache")
