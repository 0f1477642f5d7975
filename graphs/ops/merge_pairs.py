"""MergePairs: one step of bipartite merging; the most alike tokens become one until S' are left.

Legend: B batch (images), S tokens, C feature width, E key width, a even tokens ⌈S/2⌉, b odd tokens ⌊S/2⌋, r = S − S'.

Even tokens are a, odd ones b. Each a is tied to the b of the most alike key (cosine; ties: the first). The r ties of
highest likeness are merged: b becomes the mean of all it holds, each weighted by its size (how many original tokens
it stands for), and keeps its place. The other a stay. A token at a place below 0 (the class token) is never merged.
A key of zeros is like no other. Result: the a that stay, in order, then all b.

Source: ToMe (arXiv 2210.09461), facebookresearch/ToMe 207459a. Shape rule: x [B,S,C], size fp32 [B,S],
place int64 [B,S], key [B,S,E], keep [S'] → x's dtype [B,S',C], fp32 [B,S'], int64 [B,S']; S' ≥ b, and ≥ b + 1 with a
class token.
"""

from typing import Any

from graphs.ops.op import Op

BODY = """
<domain: "saccade", opset_import: ["" : 23]>
MergePairs (x, size, place, key, keep) => (merged, merged_size, merged_place)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  two = Constant <value_int: int = 2> ()
  nought = Constant <value_int: int = 0> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  unit = Constant <value: tensor = float {1.0}> ()
  tiny = Constant <value: tensor = float {1e-12}> ()
  never = Constant <value: tensor = float {-inf}> ()
  token_1 = Shape <start: int = 1, end: int = 2> (x)
  keep_1 = Shape (keep)
  tokens = Squeeze (token_1)
  even = Range (zero, tokens, two)
  odd = Range (one, tokens, two)
  odd_1 = Shape (odd)
  odds = Squeeze (odd_1)
  stay_1 = Sub (keep_1, odd_1)
  key_wide = Cast <to: int = 1> (key)
  norm = ReduceL2 <keepdims: int = 1> (key_wide, last_axis)
  norm_real = Max (norm, tiny)
  alike = Div (key_wide, norm_real)
  alike_a = Gather <axis: int = 1> (alike, even)
  alike_b = Gather <axis: int = 1> (alike, odd)
  alike_turned = Transpose <perm: ints = [0, 2, 1]> (alike_b)
  similarity = MatMul (alike_a, alike_turned)
  likeness = ReduceMax <keepdims: int = 0> (similarity, last_axis)
  tied = ArgMax <axis: int = 2, keepdims: int = 1> (similarity)
  place_a = Gather <axis: int = 1> (place, even)
  place_b = Gather <axis: int = 1> (place, odd)
  is_free = GreaterOrEqual (place_a, nought)
  rank = Where (is_free, likeness, never)
  low, stay_any = TopK <axis: int = 1, largest: int = 0, sorted: int = 1> (rank, stay_1)
  stay_wide = Cast <to: int = 1> (stay_any)
  stay_in_order, order = TopK <axis: int = 1, largest: int = 0, sorted: int = 1> (stay_wide, stay_1)
  stay = GatherElements <axis: int = 1> (stay_any, order)
  rank_shape = Shape (rank)
  all_leave = ConstantOfShape <value: tensor = float[1] {1.0}> (rank_shape)
  stay_shape = Shape (stay)
  stays = ConstantOfShape <value: tensor = float[1] {0.0}> (stay_shape)
  leaves = ScatterElements <axis: int = 1> (all_leave, stay, stays)
  b_of = Range (zero, odds, one)
  is_tied = Equal (tied, b_of)
  tied_wide = Cast <to: int = 1> (is_tied)
  leaves_column = Unsqueeze (leaves, last_axis)
  joins = Mul (tied_wide, leaves_column)
  joins_turned = Transpose <perm: ints = [0, 2, 1]> (joins)
  size_column = Unsqueeze (size, last_axis)
  x_wide = Cast <to: int = 1> (x)
  weighted = Mul (x_wide, size_column)
  weighted_a = Gather <axis: int = 1> (weighted, even)
  weighted_b = Gather <axis: int = 1> (weighted, odd)
  size_a = Gather <axis: int = 1> (size_column, even)
  size_b = Gather <axis: int = 1> (size_column, odd)
  joined_x = MatMul (joins_turned, weighted_a)
  joined_size = MatMul (joins_turned, size_a)
  sum_b = Add (weighted_b, joined_x)
  new_size_b = Add (size_b, joined_size)
  mean_b = Div (sum_b, new_size_b)
  new_b = CastLike (mean_b, x)
  x_a = Gather <axis: int = 1> (x, even)
  stay_column = Unsqueeze (stay, last_axis)
  kept_a = GatherND <batch_dims: int = 1> (x_a, stay_column)
  kept_size_a = GatherND <batch_dims: int = 1> (size_a, stay_column)
  kept_place_a = GatherElements <axis: int = 1> (place_a, stay)
  merged = Concat <axis: int = 1> (kept_a, new_b)
  merged_size_column = Concat <axis: int = 1> (kept_size_a, new_size_b)
  merged_size = Squeeze (merged_size_column, last_axis)
  merged_place = Concat <axis: int = 1> (kept_place_a, place_b)
}
"""


def define() -> Any:
    """Register ``saccade::merge_pairs(x, size, place, key, keep)``."""
    import torch

    @torch.library.custom_op("saccade::merge_pairs", mutates_args=())
    def merge_pairs(
        x: torch.Tensor, size: torch.Tensor, place: torch.Tensor, key: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image_B1 = torch.arange(x.shape[0], device=x.device)[:, None]
        alike_BSE = key.float() / key.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        likeness_Ba, tied_Ba = (alike_BSE[:, ::2] @ alike_BSE[:, 1::2].transpose(1, 2)).max(-1)
        rank_Ba = likeness_Ba.masked_fill(place[:, ::2] < 0, -torch.inf)
        b = x.shape[1] // 2
        stay = rank_Ba.sort(dim=1, stable=True).indices[:, : keep.shape[0] - b].sort(dim=1).values
        leaves_Ba = torch.ones_like(rank_Ba).scatter(1, stay, 0)
        joins_Bab = torch.nn.functional.one_hot(tied_Ba, b) * leaves_Ba[..., None]
        weighted_BSC = x.float() * size[..., None]
        new_size = size[:, 1::2] + (joins_Bab.transpose(1, 2) @ size[:, ::2, None])[..., 0]
        new_x = (weighted_BSC[:, 1::2] + joins_Bab.transpose(1, 2) @ weighted_BSC[:, ::2]) / new_size[..., None]
        return (
            torch.cat([x[:, ::2][image_B1, stay], new_x.to(x.dtype)], 1),
            torch.cat([size[:, ::2].gather(1, stay), new_size], 1),
            torch.cat([place[:, ::2].gather(1, stay), place[:, 1::2]], 1),
        )

    @merge_pairs.register_fake
    def _(
        x: torch.Tensor, size: torch.Tensor, place: torch.Tensor, key: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        b, n = x.shape[0], keep.shape[0]
        return x.new_empty(b, n, x.shape[2]), size.new_empty(b, n), place.new_empty(b, n)

    return merge_pairs


OP = Op("MergePairs", BODY, define, scores=(1,), carries=True)
