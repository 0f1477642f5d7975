"""MergeDropped: the rows that stay, and the best of the dropped summed up in a few rows, each at the place of one.

Legend: B batch, S rows, D width, K rows that go on, M of them merged, R recycled rows, k = M neighbours.

Rows rank as in KeepTopK. The first K − M stay as they are; the next R are recycled: clustered by density peaks into M.

    d_ij = ‖x_i − x_j‖ / √D;   ρ_i = exp(−mean of d² to the k nearest, itself included)
    δ_i = min d_ij over the denser j (of equals: the earlier), the largest distance of all for the densest
    centres: the M rows of largest ρ·δ;   every other recycled row joins the nearest centre

Equal densities are the rule, not the exception (M = 1: all; mutual nearest neighbours at M = 2), so d is made exactly
symmetric with a diagonal of zeros, and of equals the row of higher score comes first. ρ·δ ranks by its logarithm, for
ρ underflows where hidden states are wide.
A centre becomes the mean of its cluster and keeps its place. Source: SparseVLM (arXiv 2410.04417), token recycling;
authors' code Gumpest/SparseVLMs 26a5f48, which averages (the paper writes a sum), adds noise against equal densities
and puts the merged rows behind the kept ones. Shape rule: x [B,S,D], score fp32 [B,S], is_visual bool [B,S],
keep [K], merge [M], recycle [R] (carriers) → merged x's dtype [B,K,D], kept int64 [B,K] ascending;
1 ≤ M ≤ R ≤ S − K + M. With K = S and R = M = 1 it is the identity, so a chunk of text goes through unchanged.
"""

from typing import Any

from graphs.ops.op import Op

BODY = """
<domain: "saccade", opset_import: ["" : 23]>
MergeDropped (x, score, is_visual, keep, merge, recycle) => (merged, kept)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  one_1 = Constant <value_ints: ints = [1]> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  rows_and_columns = Constant <value_ints: ints = [1, 2]> ()
  first = Constant <value: tensor = float {inf}> ()
  last = Constant <value: tensor = float {-inf}> ()
  highest = Constant <value: tensor = float {3.4028234e38}> ()
  nought = Constant <value: tensor = float {0.0}> ()
  unit = Constant <value: tensor = float {1.0}> ()
  batch_row_2 = Shape <start: int = 0, end: int = 2> (x)
  row_1 = Shape <start: int = 1, end: int = 2> (x)
  width_1 = Shape <start: int = 2, end: int = 3> (x)
  keep_1 = Shape (keep)
  merge_1 = Shape (merge)
  recycle_1 = Shape (recycle)
  rows = Squeeze (row_1)
  merges = Squeeze (merge_1)
  recycles = Squeeze (recycle_1)
  plain_1 = Sub (keep_1, merge_1)
  plain = Squeeze (plain_1)
  is_nan = IsNaN (score)
  ranked = Where (is_nan, last, score)
  below_text = Min (ranked, highest)
  rank = Where (is_visual, below_text, first)
  best_score, order = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (rank, row_1)
  recycled_of = Range (zero, recycles, one)
  recycled_turn = Add (recycled_of, plain)
  pool = Gather <axis: int = 1> (order, recycled_turn)
  pool_column = Unsqueeze (pool, last_axis)
  x_wide = Cast <to: int = 1> (x)
  x_pool = GatherND <batch_dims: int = 1> (x_wide, pool_column)
  squares = Mul (x_pool, x_pool)
  square_row = ReduceSum <keepdims: int = 1> (squares, last_axis)
  square_column = Transpose <perm: ints = [0, 2, 1]> (square_row)
  x_turned = Transpose <perm: ints = [0, 2, 1]> (x_pool)
  product = MatMul (x_pool, x_turned)
  product_turned = Transpose <perm: ints = [0, 2, 1]> (product)
  product_twice = Add (product, product_turned)
  square_both = Add (square_row, square_column)
  apart_raw = Sub (square_both, product_twice)
  apart_real = Max (apart_raw, nought)
  recycled_column = Unsqueeze (recycled_of, one_1)
  is_self = Equal (recycled_of, recycled_column)
  apart = Where (is_self, nought, apart_real)
  width = Cast <to: int = 1> (width_1)
  apart_scaled = Div (apart, width)
  distance = Sqrt (apart_scaled)
  nearest, nearest_at = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (apart_scaled, merge_1)
  spread = ReduceMean <keepdims: int = 1> (nearest, last_axis)
  spread_other = Transpose <perm: ints = [0, 2, 1]> (spread)
  is_above = Less (spread_other, spread)
  is_equal = Equal (spread_other, spread)
  is_earlier = Less (recycled_of, recycled_column)
  is_equal_earlier = And (is_equal, is_earlier)
  is_denser = Or (is_above, is_equal_earlier)
  farthest = ReduceMax <keepdims: int = 1> (distance, rows_and_columns)
  to_denser = Where (is_denser, distance, farthest)
  gap = ReduceMin <keepdims: int = 1> (to_denser, last_axis)
  gap_log = Log (gap)
  peak = Sub (gap_log, spread)
  peak_flat = Squeeze (peak, last_axis)
  centre_score, centre = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (peak_flat, merge_1)
  centre_column = Unsqueeze (centre, last_axis)
  to_centre = GatherND <batch_dims: int = 1> (distance, centre_column)
  joined = ArgMin <axis: int = 1, keepdims: int = 1> (to_centre)
  merge_of = Range (zero, merges, one)
  merge_column = Unsqueeze (merge_of, one_1)
  joins = Equal (joined, merge_column)
  joins_wide = Cast <to: int = 1> (joins)
  is_centre_of = Equal (centre_column, recycled_of)
  is_centre_wide = Cast <to: int = 1> (is_centre_of)
  is_centre = ReduceMax <keepdims: int = 1> (is_centre_wide, one_1)
  is_other = Sub (unit, is_centre)
  joins_other = Mul (joins_wide, is_other)
  assigned = Add (joins_other, is_centre_wide)
  summed = MatMul (assigned, x_pool)
  count = ReduceSum <keepdims: int = 1> (assigned, last_axis)
  mean_wide = Div (summed, count)
  mean = CastLike (mean_wide, x)
  centre_row = GatherElements <axis: int = 1> (pool, centre)
  row_of = Range (zero, rows, one)
  own_row = Expand (row_of, batch_row_2)
  merged_row = Add (merge_of, rows)
  centre_shape = Shape (centre_row)
  merged_rows = Expand (merged_row, centre_shape)
  source = ScatterElements <axis: int = 1> (own_row, centre_row, merged_rows)
  is_gone = GreaterOrEqual (row_of, plain)
  late_turn = Cast <to: int = 7> (is_gone)
  late_turns = Expand (late_turn, batch_row_2)
  late_row = ScatterElements <axis: int = 1> (own_row, order, late_turns)
  not_late = ConstantOfShape <value: tensor = int64[1] {0}> (centre_shape)
  late = ScatterElements <axis: int = 1> (late_row, centre_row, not_late)
  behind_all = Mul (late, rows)
  turn = Add (behind_all, own_row)
  ascending, at = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (turn, keep_1)
  kept = Identity (ascending)
  from = GatherElements <axis: int = 1> (source, kept)
  from_column = Unsqueeze (from, last_axis)
  together = Concat <axis: int = 1> (x, mean)
  merged = GatherND <batch_dims: int = 1> (together, from_column)
}
"""


def define() -> Any:
    """Register ``saccade::merge_dropped(x, score, is_visual, keep, merge, recycle)``, the formula in torch."""
    import torch

    @torch.library.custom_op("saccade::merge_dropped", mutates_args=())
    def merge_dropped(
        x: torch.Tensor,
        score: torch.Tensor,
        is_visual: torch.Tensor,
        keep: torch.Tensor,
        merge: torch.Tensor,
        recycle: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plain, m, r = keep.shape[0] - merge.shape[0], merge.shape[0], recycle.shape[0]
        highest = torch.finfo(torch.float32).max
        visual_BS = score.float().nan_to_num(nan=-torch.inf, posinf=highest, neginf=-torch.inf)
        order_BS = visual_BS.masked_fill(~is_visual, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        pool_BR = order_BS[:, plain : plain + r]
        batch_B1 = torch.arange(x.shape[0], device=x.device)[:, None]
        x_BRD = x[batch_B1, pool_BR].float()
        square_BR1 = (x_BRD**2).sum(-1, keepdim=True)
        product_BRR = x_BRD @ x_BRD.mT
        apart_BRR = (square_BR1 + square_BR1.mT - (product_BRR + product_BRR.mT)).clamp(min=0) / x.shape[2]
        apart_BRR = apart_BRR * (1 - torch.eye(r, device=x.device))
        distance_BRR = apart_BRR.sqrt()
        spread_BR1 = apart_BRR.sort(-1).values[..., :m].mean(-1, keepdim=True)
        earlier_RR = torch.ones(r, r, dtype=torch.bool, device=x.device).tril(-1)
        denser_BRR = (spread_BR1.mT < spread_BR1) | ((spread_BR1.mT == spread_BR1) & earlier_RR)
        farthest = distance_BRR.amax((1, 2), keepdim=True)
        gap_BR1 = torch.where(denser_BRR, distance_BRR, farthest).amin(-1, keepdim=True)
        centre_BM = (gap_BR1.log() - spread_BR1)[..., 0].sort(dim=-1, descending=True, stable=True).indices[:, :m]
        joined_BR = distance_BRR[batch_B1, centre_BM].argmin(1)
        joined_BR = joined_BR.scatter(1, centre_BM, torch.arange(m, device=x.device).expand_as(centre_BM))
        assigned_BMR = torch.nn.functional.one_hot(joined_BR, m).float().mT
        mean_BMD = assigned_BMR @ x_BRD / assigned_BMR.sum(-1, keepdim=True)
        centre_row_BM = pool_BR.gather(1, centre_BM)
        kept_BK = torch.cat([order_BS[:, :plain], centre_row_BM], 1).sort(-1).values
        with_means = x.clone()
        with_means[batch_B1, centre_row_BM] = mean_BMD.to(x.dtype)
        return with_means[batch_B1, kept_BK], kept_BK

    @merge_dropped.register_fake
    def _(
        x: torch.Tensor,
        score: torch.Tensor,
        is_visual: torch.Tensor,
        keep: torch.Tensor,
        merge: torch.Tensor,
        recycle: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, k = x.shape[0], keep.shape[0]
        return x.new_empty(b, k, x.shape[2]), x.new_empty(b, k, dtype=torch.int64)

    return merge_dropped


OP = Op("MergeDropped", BODY, define, scores=(1,), carries=True, ranks=True)
