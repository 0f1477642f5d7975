"""CompactRows: the kept rows of hidden states, positions or masks.

Legend: B batch, S rows, K kept rows, … any trailing axes.

out[b, i] = x[b, kept[b, i]]. Source: DESIGN.md, "The ops"; the body is one GatherND.
Shape rule: x [B,S,…], kept int64 [B,K] → x's dtype [B,K,…].
"""

from typing import Any

from graphs.ops.op import Op

BODY = """
<domain: "saccade", opset_import: ["" : 23]>
CompactRows (x, kept) => (compact)
{
  last_axis = Constant <value_ints: ints = [-1]> ()
  row = Unsqueeze (kept, last_axis)
  compact = GatherND <batch_dims: int = 1> (x, row)
}
"""


def define() -> Any:
    """Register ``saccade::compact_rows(x, kept)``."""
    import torch

    @torch.library.custom_op("saccade::compact_rows", mutates_args=())
    def compact_rows(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        batch_B1 = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[batch_B1, kept]

    @compact_rows.register_fake
    def _(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], kept.shape[1], *x.shape[2:])

    return compact_rows


OP = Op("CompactRows", BODY, define, carries=True)
