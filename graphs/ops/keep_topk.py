"""KeepTopK: the rows that stay, text first, then the visual rows of highest score.

Legend: B batch, S rows, K kept rows.

kept[b] = the K rows of highest score, ascending; text rows (is_visual false) rank above every visual
one, so that all of them stay whatever K ≥ their number; ties go to the lower index; NaN ranks below
every number. Source: DESIGN.md, "The ops"; ONNX TopK-11 breaks ties by the lower index.
Shape rule: score fp32 [B,S], is_visual bool [B,S], keep [K] → int64 [B,K].
"""

from typing import Any

from graphs.ops.op import Op

BODY = """
<domain: "saccade", opset_import: ["" : 23]>
KeepTopK (score, is_visual, keep) => (kept)
{
  first = Constant <value: tensor = float {inf}> ()
  last = Constant <value: tensor = float {-inf}> ()
  highest = Constant <value: tensor = float {3.4028234e38}> ()
  count = Shape (keep)
  is_nan = IsNaN (score)
  ranked = Where (is_nan, last, score)
  below_text = Min (ranked, highest)
  rank = Where (is_visual, below_text, first)
  best_score, best = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (rank, count)
  ascending, order = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (best, count)
  kept = Identity (ascending)
}
"""


def define() -> Any:
    """Register ``saccade::keep_topk(score, is_visual, keep)``: a stable descending sort, cut and put in order."""
    import torch

    @torch.library.custom_op("saccade::keep_topk", mutates_args=())
    def keep_topk(score: torch.Tensor, is_visual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        highest = torch.finfo(torch.float32).max
        visual_BS = score.float().nan_to_num(nan=-torch.inf, posinf=highest, neginf=-torch.inf)
        rank_BS = visual_BS.masked_fill(~is_visual, torch.inf)
        order_BS = rank_BS.sort(dim=-1, descending=True, stable=True).indices
        return order_BS[:, : keep.shape[0]].sort(dim=-1).values

    @keep_topk.register_fake
    def _(score: torch.Tensor, is_visual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return score.new_empty(score.shape[0], keep.shape[0], dtype=torch.int64)

    return keep_topk


OP = Op("KeepTopK", BODY, define, scores=(0,), ranks=True)
