"""TextRaters: which of the guide rows are about the image, as weights 1 and 0.

Legend: B batch, S rows, D width, G guide rows (the last G of S).

    r[b, g]      = Σ_{s visual} softmax_g(x[b, s] · x[b, S−G+g]ᵀ)
    weight[b, g] = 1 where r[b, g] ≥ mean_g r[b], else 0

Source: SparseVLM (arXiv 2410.04417) §3.2, on the embeddings that enter the decoder; a sum over the visual rows
ranks as the paper's mean. "≥" where the authors' code has ">", so that one guide row rates, and so that a chunk
without an image gives no NaN; a mean that rounds above every r is taken for the largest, so that one row rates.
Shape rule: x [B,S,D], is_visual bool [B,S], guide [G] → fp32 [B,G].
"""

from typing import Any

from graphs.ops.op import Op

BODY = """
<domain: "saccade", opset_import: ["" : 23]>
TextRaters (x, is_visual, guide) => (weight)
{
  one_1 = Constant <value_ints: ints = [1]> ()
  last_axis = Constant <value_ints: ints = [-1]> ()
  row_1 = Shape <start: int = 1, end: int = 2> (x)
  guide_1 = Shape (guide)
  first_1 = Sub (row_1, guide_1)
  wide = Cast <to: int = 1> (x)
  text = Slice (wide, first_1, row_1, one_1)
  text_turned = Transpose <perm: ints = [0, 2, 1]> (text)
  logit = MatMul (wide, text_turned)
  share = Softmax <axis: int = -1> (logit)
  visual = Cast <to: int = 1> (is_visual)
  visual_column = Unsqueeze (visual, last_axis)
  counted = Mul (share, visual_column)
  relevance = ReduceSum <keepdims: int = 0> (counted, one_1)
  mean = ReduceMean <keepdims: int = 1> (relevance, one_1)
  most = ReduceMax <keepdims: int = 1> (relevance, one_1)
  bar = Min (mean, most)
  is_rater = GreaterOrEqual (relevance, bar)
  weight = Cast <to: int = 1> (is_rater)
}
"""


def define() -> Any:
    """Register ``saccade::text_raters(x, is_visual, guide)``, the formula in torch."""
    import torch

    @torch.library.custom_op("saccade::text_raters", mutates_args=())
    def text_raters(x: torch.Tensor, is_visual: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        wide_BSD = x.float()
        text_BGD = wide_BSD[:, x.shape[1] - guide.shape[0] :]
        share_BSG = (wide_BSD @ text_BGD.transpose(1, 2)).softmax(-1)
        relevance_BG = (share_BSG * is_visual[..., None]).sum(1)
        bar_B1 = torch.minimum(relevance_BG.mean(1, keepdim=True), relevance_BG.amax(1, keepdim=True))
        return (relevance_BG >= bar_B1).float()

    @text_raters.register_fake
    def _(x: torch.Tensor, is_visual: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], guide.shape[0], dtype=torch.float32)

    return text_raters


OP = Op("TextRaters", BODY, define)
