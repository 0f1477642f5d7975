"""MergeContext: the dominant tokens as they are, and the rest summed up in a few contextual ones, in image order.

Legend: B batch (images), V tokens, C feature width, E key width, A dominant, M contextual, R = V − A the rest.

Of the rest, in image order, every ⌊R/M⌋-th is a target, M of them. Every other joins the target of the most alike
key (cosine; ties: the first), and a target becomes itself plus the mean of those that joined it. A contextual token
stands at its target's place.

Source: VisionZip (arXiv 2412.04467), authors' code dvlab-research/VisionZip ccb20fe, which appends the contextual
tokens behind the dominant ones; here all are in image order, as causal decoders want them. Shape rule:
x [B,V,C], key [B,V,E], dominant int64 [B,A], merge [M] → tokens x's dtype [B,A+M,C], kept int64 [B,A+M]; M ≤ V − A.
A key of zeros (a newline's) is like no other. No sort meets a tie, so every runtime orders alike.
"""

from typing import Any

from graphs.ops.op import Op


def body_of(name: str, *, within: bool = False) -> str:
    """The body of this op and of its kin. within: images are packed in one row, ``target`` is given by the host."""
    inputs = "x, key, image, dominant, target" if within else "x, key, dominant, merge"
    targets = "merge_1 = Shape (target)" if within else "merge_1 = Shape (merge)"
    stride = """stride = Div (rests, merges)
  target = Mul (merge_of, stride)"""
    own_image = """image_rest = GatherElements <axis: int = 1> (image, rest)
  image_row = Unsqueeze (image_rest, last_axis)
  image_target = Gather <axis: int = 1> (image_rest, target)
  image_column = Unsqueeze (image_target, one_1)
  same = Equal (image_row, image_column)
  likeness = Where (same, similarity, never)"""
    return f"""
<domain: "saccade", opset_import: ["" : 23]>
{name} ({inputs}) => (tokens, kept)
{{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  unit = Constant <value: tensor = float {{1.0}}> ()
  tiny = Constant <value: tensor = float {{1e-12}}> ()
  never = Constant <value: tensor = float {{-inf}}> ()
  batch_token_2 = Shape <start: int = 0, end: int = 2> (x)
  token_1 = Shape <start: int = 1, end: int = 2> (x)
  dominant_1 = Shape <start: int = 1, end: int = 2> (dominant)
  {targets}
  rest_1 = Sub (token_1, dominant_1)
  tokens_0 = Squeeze (token_1)
  merges = Squeeze (merge_1)
  rests = Squeeze (rest_1)
  token_of = Range (zero, tokens_0, one)
  none_dominant = ConstantOfShape <value: tensor = int64[1] {{0}}> (batch_token_2)
  dominant_shape = Shape (dominant)
  behind_all = Expand (token_1, dominant_shape)
  late = ScatterElements <axis: int = 1> (none_dominant, dominant, behind_all)
  turn = Add (late, token_of)
  turn_wide = Cast <to: int = 1> (turn)
  rest_turn, rest = TopK <axis: int = 1, largest: int = 0, sorted: int = 1> (turn_wide, rest_1)
  rest_column = Unsqueeze (rest, last_axis)
  x_wide = Cast <to: int = 1> (x)
  key_wide = Cast <to: int = 1> (key)
  x_rest = GatherND <batch_dims: int = 1> (x_wide, rest_column)
  key_rest = GatherND <batch_dims: int = 1> (key_wide, rest_column)
  norm = ReduceL2 <keepdims: int = 1> (key_rest, last_axis)
  norm_real = Max (norm, tiny)
  alike = Div (key_rest, norm_real)
  merge_of = Range (zero, merges, one)
  {"" if within else stride}
  alike_target = Gather <axis: int = 1> (alike, target)
  alike_turned = Transpose <perm: ints = [0, 2, 1]> (alike_target)
  similarity = MatMul (alike, alike_turned)
  {own_image if within else "likeness = Identity (similarity)"}
  joined = ArgMax <axis: int = 2, keepdims: int = 1> (likeness)
  joins = Equal (joined, merge_of)
  joins_wide = Cast <to: int = 1> (joins)
  rest_of = Range (zero, rests, one)
  rest_of_column = Unsqueeze (rest_of, one_1)
  is_target_of = Equal (rest_of_column, target)
  is_target_wide = Cast <to: int = 1> (is_target_of)
  is_target = ReduceMax <keepdims: int = 1> (is_target_wide, one_1)
  is_other = Sub (unit, is_target)
  assigned = Mul (joins_wide, is_other)
  assigned_turned = Transpose <perm: ints = [0, 2, 1]> (assigned)
  summed = MatMul (assigned_turned, x_rest)
  count = ReduceSum <keepdims: int = 1> (assigned_turned, last_axis)
  count_real = Max (count, unit)
  mean = Div (summed, count_real)
  x_target = Gather <axis: int = 1> (x_rest, target)
  context_wide = Add (x_target, mean)
  context = CastLike (context_wide, x)
  context_at = Gather <axis: int = 1> (rest, target)
  dominant_column = Unsqueeze (dominant, last_axis)
  x_dominant = GatherND <batch_dims: int = 1> (x, dominant_column)
  together = Concat <axis: int = 1> (x_dominant, context)
  together_at = Concat <axis: int = 1> (dominant, context_at)
  kept_1 = Add (dominant_1, merge_1)
  at_wide = Cast <to: int = 1> (together_at)
  ordered, order = TopK <axis: int = 1, largest: int = 0, sorted: int = 1> (at_wide, kept_1)
  order_column = Unsqueeze (order, last_axis)
  tokens = GatherND <batch_dims: int = 1> (together, order_column)
  kept = GatherElements <axis: int = 1> (together_at, order)
}}
"""


BODY = body_of("MergeContext")


def merged(x: Any, key: Any, dominant: Any, target: Any, image: Any = None) -> Any:
    """The formula in torch: x [B,V,C], key [B,V,E], dominant [B,A], target [M] into the rest, image [B,V] or None."""
    import torch

    (b, v, _), a, m = x.shape, dominant.shape[1], target.shape[0]
    image_B1 = torch.arange(b, device=x.device)[:, None]
    late_BV = torch.zeros(b, v, device=x.device).scatter(1, dominant, 1)
    rest_BR = late_BV.sort(dim=1, stable=True).indices[:, : v - a]
    x_BRC, key_BRE = x[image_B1, rest_BR].float(), key[image_B1, rest_BR].float()
    alike_BRE = key_BRE / key_BRE.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    likeness_BRM = alike_BRE @ alike_BRE[:, target].transpose(1, 2)
    if image is not None:
        of_BR = image.gather(1, rest_BR)
        likeness_BRM = likeness_BRM.masked_fill(of_BR[:, :, None] != of_BR[:, None, target], -torch.inf)
    assigned_BRM = torch.nn.functional.one_hot(likeness_BRM.argmax(-1), m).float()
    assigned_BRM[:, target] = 0
    summed_BMC = assigned_BRM.transpose(1, 2) @ x_BRC
    context_BMC = x_BRC[:, target] + summed_BMC / assigned_BRM.sum(1).clamp(min=1)[..., None]
    together = torch.cat([x[image_B1, dominant], context_BMC.to(x.dtype)], 1)
    kept, order = torch.cat([dominant, rest_BR[:, target]], 1).sort(dim=1)
    return together[image_B1, order], kept


def define() -> Any:
    """Register ``saccade::merge_context(x, key, dominant, merge)``."""
    import torch

    @torch.library.custom_op("saccade::merge_context", mutates_args=())
    def merge_context(
        x: torch.Tensor, key: torch.Tensor, dominant: torch.Tensor, merge: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        m = merge.shape[0]
        return merged(x, key, dominant, torch.arange(m, device=x.device) * ((x.shape[1] - dominant.shape[1]) // m))

    @merge_context.register_fake
    def _(
        x: torch.Tensor, key: torch.Tensor, dominant: torch.Tensor, merge: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = dominant.shape[1] + merge.shape[0]
        return x.new_empty(x.shape[0], kept, x.shape[2]), dominant.new_empty(x.shape[0], kept)

    return merge_context


OP = Op("MergeContext", BODY, define, carries=True)
