"""The prune point of the vision stage, inside vision.onnx.

Legend: N images or tiles, T tokens of each, V = N·T, D width, K tokens that stay (of all images, or of each), M of
them merged.
Inputs besides the family's: the shape carriers keep_vision and, where tokens are merged into others, merge_vision.
Outputs: visual_embeds [K', D] and kept_vision int64 [K'], ascending indices into the V rows that would have been.
"""

from __future__ import annotations

from typing import Any

import torch

from exporter.family import Dims, Family, Tensors
from exporter.towers import ClipTower, tower_for
from graphs.errors import UsageError
from graphs.ops import OPS
from graphs.plan import VisionPoint, merge_schedule
from graphs.spec import VisualGrid

CARRIERS: Dims = {"keep_vision": ("K",), "merge_vision": ("M",)}


class VisionPruning:
    """A prune point, ready to be traced into a family's vision stage."""

    def __init__(self, model: Any, family: Family, point: VisionPoint, grid: VisualGrid) -> None:
        self.model, self.family, self.point = model, family, point
        self.tokens = grid.tokens if grid.kind in ("fixed", "tiles") else 0
        self.tower = tower_for(family.name, model, point)
        if point.per_image and not self.tokens:
            raise UsageError(
                f"an image of {family.name} has no fixed number of tokens, so a share of each image's is no one "
                "length; leave per_image out"
            )

    @property
    def dims(self) -> Dims:
        """The carriers this point reads."""
        names = ("keep_vision", "merge_vision") if self.point.merge else ("keep_vision",)
        return {name: CARRIERS[name] for name in names}

    def carriers(self, images: int) -> Tensors:
        """Carriers for an example of this many images: half of the tokens stay."""
        kept = max(1, (self.tokens or 8) // 2 + 1) * (1 if self.point.per_image else images)
        lengths = {"keep_vision": kept, "merge_vision": max(1, self.tokens // 6)}
        return {name: torch.zeros(lengths[name], dtype=torch.int32) for name in self.dims}

    def run(self, feed: Tensors) -> Tensors:
        """The stage's outputs, pruned; every output of the family is cut by the same rows."""
        if self.point.score == "zip":
            return self.zipped(feed)
        if self.point.score == "tome":
            return self.merged(feed)
        if self.tower:
            hidden = self.tower.hidden_states(feed["pixel_values"])
            out = {"visual_embeds": self.tower.projected(self.tower.features(hidden)).flatten(0, 1)}
            score_NT = self.class_attention(self.tower, hidden)
        else:
            out = self.family.visual(self.model, feed)
            score_NT = self.received(out["visual_embeds"])
        kept_K = self.best(score_NT, feed["keep_vision"])
        return {**{name: value.index_select(0, kept_K) for name, value in out.items()}, "kept_vision": kept_K}

    def received(self, embeds_VD: torch.Tensor) -> torch.Tensor:
        """STAR, stage 1: attention received in softmax(HHᵀ/√d) over an image's embeddings; [N,T]."""
        blocks = embeds_VD.unflatten(0, (-1, self.tokens)) if self.tokens else embeds_VD[None]
        one_head = blocks[:, None]
        return OPS["ReceivedFromAll"].torch_op(one_head, one_head, embeds_VD.shape[1] ** -0.5)

    def class_attention(self, tower: ClipTower, hidden: list[torch.Tensor]) -> torch.Tensor:
        """What each patch receives from the class token, summed over heads; [N,T].

        AttentionReceived with one row, which is the last one of its chunk and so sees every key.
        """
        q, k, scale = tower.queries_and_keys(tower.watched, hidden[tower.watched])
        one = torch.zeros(1, dtype=torch.int32, device=q.device)
        return OPS["AttentionReceived"].torch_op(q, k, one, scale)[:, 1:]

    def best(self, score_NT: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Rows of highest score, of all images or of each, as indices into all: [K']."""
        rows = score_NT if self.point.per_image else score_NT.reshape(1, -1)
        kept = OPS["KeepTopK"].torch_op(rows, torch.ones_like(rows, dtype=torch.bool), keep)
        return self.of_all(kept) if self.point.per_image else kept[0]

    def of_all(self, kept_NK: torch.Tensor) -> torch.Tensor:
        """Indices into each image's tokens as indices into all tokens."""
        first_N1 = torch.arange(kept_NK.shape[0], device=kept_NK.device)[:, None] * self.tokens
        return (kept_NK + first_N1).flatten()

    def zipped(self, feed: Tensors) -> Tensors:
        """VisionZip: dominant tokens by class attention, the rest averaged into contextual ones; then the projector."""
        tower = self._tower()
        hidden = tower.hidden_states(feed["pixel_values"])
        score_NT = self.class_attention(tower, hidden)
        everywhere = torch.ones_like(score_NT, dtype=torch.bool)
        dominant = OPS["KeepTopK"].torch_op(score_NT, everywhere, feed["keep_vision"])
        features, kept = tower.features(hidden), dominant
        if self.point.merge:
            normed = tower.layers[tower.watched].layer_norm1(hidden[tower.watched])
            key_NTd = tower.keys(tower.watched, normed)[:, :, 1:].mean(1)
            features, kept = OPS["MergeContext"].torch_op(features, key_NTd, dominant, feed["merge_vision"])
        else:
            features = OPS["CompactRows"].torch_op(features, kept)
        return {"visual_embeds": tower.projected(features).flatten(0, 1), "kept_vision": self.of_all(kept)}

    def merged(self, feed: Tensors) -> Tensors:
        """ToMe: between attention and MLP of each layer the most alike tokens become one; attention weighs by size."""
        tower = self._tower()
        x = tower.embedded(feed["pixel_values"])
        size = torch.ones_like(x[..., 0], dtype=torch.float32)
        place = (torch.arange(self.tokens + 1, device=x.device) - 1).expand(x.shape[0], -1).contiguous()
        layers = tower.layers[: max(tower.chosen)]
        for layer, left in zip(
            range(len(layers)), merge_schedule(self.tokens, feed["keep_vision"].shape[0], len(layers)), strict=True
        ):
            block = layers[layer]
            normed = block.layer_norm1(x)
            by_size = size.log()[:, None, None].to(x.dtype).expand(-1, 1, x.shape[1], -1)
            x = x + block.self_attn(normed, by_size)[0]
            key = tower.keys(layer, normed).mean(1)
            carrier = torch.zeros(left + 1, dtype=torch.int32, device=x.device)
            x, size, place = OPS["MergePairs"].torch_op(x, size, place, key, carrier)
            x = x + block.mlp(block.layer_norm2(x))
        kept, order = place[:, 1:].sort(dim=1)
        features = OPS["CompactRows"].torch_op(x[:, 1:], order)
        return {"visual_embeds": tower.projected(features).flatten(0, 1), "kept_vision": self.of_all(kept)}

    def _tower(self) -> ClipTower:
        assert self.tower
        return self.tower
