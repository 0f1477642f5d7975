"""MergeContextWithin: MergeContext for images packed in one row, where each image merges its own tokens only.

Legend: B batch, V tokens of all images, C feature width, E key width, A dominant, M contextual.

The rest (what is not dominant) in order; ``target`` says which of the rest are targets, by their place in it. Every
other joins the target of its own image with the most alike key (cosine; ties: the first), and a target becomes itself
plus the mean of those that joined it, at its own place. The host knows each image's tokens, dominant and contextual
ones, and so the targets: of image i every ⌊R_i/M_i⌋-th of its rest.

Source: VisionZip (arXiv 2412.04467), image by image. Shape rule: x [B,V,C], key [B,V,E], image int64 [B,V],
dominant int64 [B,A], target int64 [M] → tokens x's dtype [B,A+M,C], kept int64 [B,A+M]. Every image whose tokens
are not all dominant has a target.
"""

from typing import Any

from graphs.ops.merge_context import body_of, merged
from graphs.ops.op import Op

BODY = body_of("MergeContextWithin", within=True)


def define() -> Any:
    """Register ``saccade::merge_context_within(x, key, image, dominant, target)``."""
    import torch

    @torch.library.custom_op("saccade::merge_context_within", mutates_args=())
    def merge_context_within(
        x: torch.Tensor, key: torch.Tensor, image: torch.Tensor, dominant: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return merged(x, key, dominant, target, image)

    @merge_context_within.register_fake
    def _(
        x: torch.Tensor, key: torch.Tensor, image: torch.Tensor, dominant: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = dominant.shape[1] + target.shape[0]
        return x.new_empty(x.shape[0], kept, x.shape[2]), dominant.new_empty(x.shape[0], kept)

    return merge_context_within


OP = Op("MergeContextWithin", BODY, define, carries=True)
