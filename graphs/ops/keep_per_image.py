"""KeepPerImage: the rows that stay where each image keeps its own share; all text stays.

Legend: B batch, S rows, K kept rows.

Order the rows by image, inside an image by falling score (ties: the lower index; NaN as −∞); text rows, whose image is
−1, come first. kept[b] = the rows at the places ``pick`` of that order, ascending. The host knows how many rows each
image has and how many it keeps, so it knows the places: for image i the first k_i behind those of earlier images.
Source: DESIGN.md, "Budgets per image". Shape rule: score fp32 [B,S], image int64 [B,S], pick int64 [K] → int64 [B,K].
No data decides a shape; the second sort meets no tie.
"""

from typing import Any

from graphs.ops.op import Op

BODY = """
<domain: "saccade", opset_import: ["" : 23]>
KeepPerImage (score, image, pick) => (kept)
{
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  last = Constant <value: tensor = float {-inf}> ()
  row_1 = Shape <start: int = 1, end: int = 2> (score)
  count = Shape (pick)
  rows = Squeeze (row_1)
  is_nan = IsNaN (score)
  ranked = Where (is_nan, last, score)
  best_score, by_score = TopK <axis: int = -1, largest: int = 1, sorted: int = 1> (ranked, row_1)
  image_by_score = GatherElements <axis: int = 1> (image, by_score)
  before = Mul (image_by_score, rows)
  place = Range (zero, rows, one)
  turn = Add (before, place)
  in_turn, by_image = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (turn, row_1)
  ordered = GatherElements <axis: int = 1> (by_score, by_image)
  chosen = Gather <axis: int = 1> (ordered, pick)
  ascending, order = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (chosen, count)
  kept = Identity (ascending)
}
"""


def define() -> Any:
    """Register ``saccade::keep_per_image(score, image, pick)``: two stable sorts."""
    import torch

    @torch.library.custom_op("saccade::keep_per_image", mutates_args=())
    def keep_per_image(score: torch.Tensor, image: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        ranked_BS = score.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        by_score_BS = ranked_BS.sort(dim=-1, descending=True, stable=True).indices
        by_image_BS = image.gather(1, by_score_BS).sort(dim=-1, stable=True).indices
        return by_score_BS.gather(1, by_image_BS)[:, pick].sort(dim=-1).values

    @keep_per_image.register_fake
    def _(score: torch.Tensor, image: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        return image.new_empty(score.shape[0], pick.shape[0])

    return keep_per_image


OP = Op("KeepPerImage", BODY, define, scores=(0,), ranks=True)
