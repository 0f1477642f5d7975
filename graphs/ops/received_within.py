"""ReceivedWithin: what each row receives from every row of its own image, images packed behind each other.

Legend: B batch, H query heads, V key-value heads, S rows, D head width, P rows of a piece.

    received[b, t] = Σ_h Σ_{s in t's image} softmax_{keys of that image}(scale · q[b, h, s] · k[b, h // (H/V)]ᵀ)[t]

Source: ReceivedFromAll, image by image, where images have no common length (patches, joined tiles). Shape rule:
q [B,H,S,D], k [B,V,S,D], image int64 [B,S] → fp32 [B,S]. Rows are walked in pieces of at most 64, so no S×S map exists.
"""

from typing import Any

from graphs.ops.attention_received import EVERY_ROW, Mask, bodies_of, received_in_pieces
from graphs.ops.op import Op

OTHER_IMAGES = Mask(
    """image_piece = Gather <axis: int = 1> (image, guide_real)
      image_row = Unsqueeze (image_piece, head_and_width)
      image_key = Unsqueeze (image, head_and_row)
      visible = Equal (image_row, image_key)
      logit_seen = Where (visible, logit, none)""",
    """head_and_width = Constant <value_ints: ints = [1, 3]> ()
  none = Constant <value: tensor = float {-inf}> ()
  image_row = Unsqueeze (image, head_and_width)
  image_key = Unsqueeze (image, head_and_row)
  visible = Equal (image_row, image_key)
  logit_seen = Where (visible, logit, none)""",
)
BODY, FLAT_BODY = bodies_of("ReceivedWithin", "q, k, image", EVERY_ROW, OTHER_IMAGES)


def define() -> Any:
    """Register ``saccade::received_within(q, k, image, scale)``, the formula in torch."""
    import torch

    @torch.library.custom_op("saccade::received_within", mutates_args=())
    def received_within(q: torch.Tensor, k: torch.Tensor, image: torch.Tensor, scale: float) -> torch.Tensor:
        once_BS = torch.ones(q.shape[0], q.shape[2], dtype=torch.float32, device=q.device)
        image_B11S = image[:, None, None]
        return received_in_pieces(q, k, once_BS, scale, lambda row_P: image_B11S[..., row_P].mT != image_B11S)

    @received_within.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, image: torch.Tensor, scale: float) -> torch.Tensor:
        return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)

    return received_within


OP = Op("ReceivedWithin", BODY, define, FLAT_BODY)
