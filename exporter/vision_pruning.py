"""The prune point of the vision stage, inside vision.onnx.

Legend: N images or tiles, T tokens of each, P patches of each, V tokens of all images, D width, K tokens that stay,
M of them merged, m patches of a token.
Inputs besides the family's, those of ``graphs.layouts.budgets.vision_feeds``: shape carriers keep_vision and
merge_vision where all tiles have T tokens; where images are packed visual_image [V], and pick_vision [K] and
target_vision [M] for budgets per image.
Outputs: visual_embeds [K', D], deepstack features [K', D], and kept_vision int64 [K'], ascending indices into the V.
"""

from __future__ import annotations

from typing import Any

import torch

from exporter.family import Dims, Family, Tensors
from exporter.looking import Look
from exporter.towers import merging_tower
from graphs.layouts.budgets import reads_image, vision_feeds
from graphs.merging import merge_schedule
from graphs.ops import OPS
from graphs.plan import VisionPoint
from graphs.spec import VisualGrid


class VisionPruning:
    """A prune point, ready to be traced into a family's vision stage; ``check_tower`` has passed it."""

    def __init__(self, model: Any, family: Family, point: VisionPoint, grid: VisualGrid) -> None:
        self.model, self.family, self.point, self.grid = model, family, point, grid
        self.tokens = grid.tokens if grid.tokens_alike else 0

    @property
    def dims(self) -> Dims:
        """The inputs this point reads beside the family's."""
        if self.tokens:
            return {"keep_vision": ("K_v",), **({"merge_vision": ("M",)} if self.point.merge else {})}
        named: Dims = {"visual_image": ("V",)} if reads_image(self.point) else {}
        if not self.point.per_image:
            return named | {"keep_vision": ("K_v",)}
        return named | {"pick_vision": ("K_v",), **({"target_vision": ("M",)} if self.point.merge else {})}

    def example(self, images: int) -> Tensors:
        """Those inputs for an example of this many images: about half of the tokens stay."""
        if not self.tokens:
            feeds = vision_feeds(self.point, self.grid, self.family.counts(self.grid, images), 0.5)
            return {name: torch.from_numpy(feeds[name]) for name in self.dims}
        kept = max(1, self.tokens // 2 + 1) * (1 if self.point.per_image else images)
        lengths = {"keep_vision": kept, "merge_vision": max(1, self.tokens // 6)}
        return {name: torch.zeros(lengths[name], dtype=torch.int32) for name in self.dims}

    def run(self, feed: Tensors) -> Tensors:
        """The stage's outputs, pruned; every output of the family is cut by the same rows."""
        if self.point.score == "zip":
            return self.zipped(feed)
        if self.point.score == "tome":
            return self.merged(feed)
        if self.point.score == "cls":
            look = self.look(feed)
            out, score_NT = look.out, self.watched(look, feed)
        else:
            out = self.family.visual(self.model, feed)
            score_NT = self.received(out["visual_embeds"], feed)
        kept_K = self.of_all(self.best(score_NT, feed))
        return {**{name: value.index_select(0, kept_K) for name, value in out.items()}, "kept_vision": kept_K}

    def look(self, feed: Tensors) -> Look:
        """The family's vision stage, watched."""
        assert self.family.look
        return self.family.look(self.model, feed)

    def received(self, embeds_VD: torch.Tensor, feed: Tensors) -> torch.Tensor:
        """STAR, stage 1: attention received in softmax(HHᵀ/√d) over an image's embeddings; [N,T] or [1,V].

        Its sum, not its mean, so that tokens of images of different sizes compare: their average is 1 in each.
        """
        scale = embeds_VD.shape[1] ** -0.5
        if not self.tokens:
            one = embeds_VD[None, None]
            return OPS["ReceivedWithin"].torch_op(one, one, feed["visual_image"][None], scale)
        one_head = embeds_VD.unflatten(0, (-1, self.tokens))[:, None]
        return OPS["ReceivedFromAll"].torch_op(one_head, one_head, scale)

    def watched(self, look: Look, feed: Tensors) -> torch.Tensor:
        """What each visual token receives in the watched layer, over heads; mean of its patches; [N,T] or [1,V].

        From the class token, as AttentionReceived with one row, which is the last one of its chunk and so sees every
        key; in a tower without one from all patches of the image (VisionZip).
        """
        if look.classed:
            one = torch.zeros(1, dtype=torch.int32, device=look.query.device)
            score_NP = OPS["AttentionReceived"].torch_op(look.query[:, :, :1], look.key, one, look.scale)[:, 1:]
        elif look.parts:
            image_1P = feed["visual_image"][:, None].expand(-1, look.parts).reshape(1, -1)
            score_NP = OPS["ReceivedWithin"].torch_op(look.query, look.key, image_1P, look.scale)
        else:
            score_NP = OPS["ReceivedFromAll"].torch_op(look.query, look.key, look.scale)
        return look.tokens_of(score_NP[..., None])[..., 0]

    def best(self, score_NT: torch.Tensor, feed: Tensors) -> torch.Tensor:
        """Tokens of highest score, as indices into each row of the score (one row for all images, or one per tile)."""
        if self.point.per_image and not self.tokens:
            return OPS["KeepPerImage"].torch_op(score_NT, feed["visual_image"][None], feed["pick_vision"])
        rows = score_NT if self.point.per_image else score_NT.reshape(1, -1)
        return OPS["KeepTopK"].torch_op(rows, torch.ones_like(rows, dtype=torch.bool), feed["keep_vision"])

    def of_all(self, kept_NK: torch.Tensor) -> torch.Tensor:
        """Indices into each row's tokens as indices into all tokens: [K']."""
        if not (self.tokens and self.point.per_image):
            return kept_NK[0]
        first_N1 = torch.arange(kept_NK.shape[0], device=kept_NK.device)[:, None] * self.tokens
        return (kept_NK + first_N1).flatten()

    def zipped(self, feed: Tensors) -> Tensors:
        """VisionZip: dominant tokens by attention, the rest averaged into contextual ones.

        Before the projector where that takes token by token, else over the finished tokens and their deepstack.
        """
        look = self.look(feed)
        dominant = self.best(self.watched(look, feed), feed)
        features = look.features
        if features is None:
            together = torch.cat(list(look.out.values()), 1)
            features = together.unflatten(0, (-1, self.tokens)) if self.tokens else together[None]
        if self.point.merge:
            key_NTd = look.tokens_of(look.key.mean(1)[:, look.classed :])
            if self.tokens:
                features, kept = OPS["MergeContext"].torch_op(features, key_NTd, dominant, feed["merge_vision"])
            else:
                image_1V = feed["visual_image"][None]
                features, kept = OPS["MergeContextWithin"].torch_op(
                    features, key_NTd, image_1V, dominant, feed["target_vision"]
                )
        else:
            features, kept = OPS["CompactRows"].torch_op(features, dominant), dominant
        tokens = look.finish(features).flatten(0, 1)
        parts = tokens.split(look.out["visual_embeds"].shape[1], 1)
        return {**dict(zip(look.out, parts, strict=True)), "kept_vision": self.of_all(kept)}

    def merged(self, feed: Tensors) -> Tensors:
        """ToMe: between attention and MLP of each layer the most alike tokens become one; attention weighs by size.

        A token of several patches is merged as a whole, patch by patch; a class token beside such stays out of it.
        """
        tower = merging_tower(self.family, self.model)
        x, parts = tower.embedded(feed["pixel_values"]), tower.parts
        beside = int(tower.classed and parts > 1)
        first = int(tower.classed) - beside
        place = (torch.arange(self.tokens + first, device=x.device) - first).expand(x.shape[0], -1).contiguous()
        size = torch.ones_like(place, dtype=torch.float32)
        lefts = merge_schedule(self.tokens, feed["keep_vision"].shape[0], len(tower.layers))
        for block, left in zip(tower.layers, lefts, strict=True):
            units = size.shape[1]
            of_rows = torch.cat([torch.ones_like(size[:, :beside]), size.repeat_interleave(parts, 1)], 1)
            by_size = of_rows.log()[:, None, None].to(x.dtype).expand(-1, 1, x.shape[1], -1)
            x, key = tower.attend(block, x, by_size)
            key_units = key.mean(1)[:, beside:].reshape(x.shape[0], units, -1)
            x_units = x[:, beside:].reshape(x.shape[0], units, -1)
            carrier = torch.zeros(left + first, dtype=torch.int32, device=x.device)
            x_units, size, place = OPS["MergePairs"].torch_op(x_units, size, place, key_units, carrier)
            x = torch.cat([x[:, :beside], x_units.reshape(x.shape[0], size.shape[1] * parts, -1)], 1)
            x = tower.feed_forward(block, x)
        kept, order = place[:, first:].sort(dim=1)
        units_NTC = x[:, beside:].reshape(x.shape[0], size.shape[1], -1)[:, first:]
        features = OPS["CompactRows"].torch_op(units_NTC, order)
        return {"visual_embeds": tower.finished(features).flatten(0, 1), "kept_vision": self.of_all(kept)}
