"""The traced programs: vision, embed and decoder, each a module from named tensors to named tensors.

Legend: B batch (1), S rows of the chunk, D width, V visual rows, N images or tiles, G guide rows, R logit rows,
P_j past rows of segment j.
"""

from typing import Any

import torch
from torch import nn

from exporter.attention import LayerRun
from exporter.family import Family, Tensors
from exporter.vision_pruning import VisionPruning
from graphs.ops import OPS
from graphs.plan import FROM_OUTSIDE, PruningPlan, VisionPoint
from graphs.spec import (
    LanguageModel,
    VisualGrid,
    budget_names,
    deepstack_names,
    past_names,
    present_names,
    visual_names,
)


class VisionProgram(nn.Module):
    """pixel_values fp32 and the family's other inputs → visual_embeds [V,D] and deepstack features, pruned or not."""

    def __init__(
        self,
        model: Any,
        family: Family,
        grid: VisualGrid,
        language: LanguageModel,
        point: VisionPoint | None = None,
    ) -> None:
        super().__init__()
        self.model, self.family, self.grid, self.dims = model, family, grid, family.dims(grid)
        self.outputs = visual_names(language)
        self.pruning = VisionPruning(model, family, point, grid) if point and not point.on_host else None
        if self.pruning:
            self.dims, self.outputs = self.dims | self.pruning.dims, (*self.outputs, "kept_vision")

    def example(self, images: int) -> Tensors:
        """Valid inputs for 1 or 2 images."""
        feed = self.family.example(self.grid, images)
        return feed | self.pruning.example(images) if self.pruning else feed

    def forward(self, feed: Tensors) -> Tensors:
        pixels = feed["pixel_values"].to(self.model.dtype)
        prepared = {**feed, "pixel_values": pixels}
        out = self.pruning.run(prepared) if self.pruning else self.family.visual(self.model, prepared)
        return {name: out[name] for name in self.outputs}


class EmbedProgram(nn.Module):
    """input_ids [1,S], visual_embeds [V,D] → inputs_embeds [1,S,D], is_visual [1,S].

    The i-th image placeholder takes visual row i. V is at least 1 (a text-only chunk brings a dummy row).
    Deepstack features [V,D] go the same way, to rows of zeros where there is text.
    """

    def __init__(self, model: Any, family: Family, image_token: int, language: LanguageModel) -> None:
        super().__init__()
        self.embed_tokens, self.image_token = family.language(model).embed_tokens, image_token
        self.deepstack = deepstack_names(language)
        self.outputs = ("inputs_embeds", "is_visual", *self.deepstack)

    def forward(self, feed: Tensors) -> Tensors:
        is_visual = feed["input_ids"] == self.image_token
        row = (is_visual.to(torch.int64).cumsum(1) - 1).clamp(min=0)
        visual = feed["visual_embeds"].index_select(0, row[0])[None]
        embeds = torch.where(is_visual[..., None], visual, self.embed_tokens(feed["input_ids"]))
        out = {"inputs_embeds": embeds, "is_visual": is_visual}
        for name in self.deepstack:
            deep = feed[f"visual_{name}"].index_select(0, row[0])[None]
            out[name] = torch.where(is_visual[..., None], deep, torch.zeros_like(deep))
        return out


class DecoderProgram(nn.Module):
    """All decoder layers over one chunk on top of a cache, pruned where the plan says.

    Inputs, each only where the plan or the family reads it (``inputs`` names them, in order):
        inputs_embeds [1,S,D]       text embeddings with the visual ones merged in
        position_ids  int64 [1,S]   original positions, or [3,1,S]; kept after pruning, never renumbered
        is_visual     bool [1,S]    which rows of this chunk are visual tokens
        image_index   int64 [1,S]   which image each row is of, −1 for text; where a point counts per image
        guide         int32 [G]     carrier: the last G rows of the chunk guide the pruning
        keep_i        int32 [S_i+1] carrier: rows that go on behind prune point i
        merge_i, recycle_i int32    carriers: of those the clusters, and the dropped rows they are made of
        pick_i        int64 [S_i+1] in keep_i's place where the point counts per image: places by image and score
        tail          int32 [R]     carrier: logits are computed for the last R rows
        priority      fp32 [1,S]    guidance from outside
        deepstack_i   [1,S,D]       features added behind layer i (Qwen3-VL)
        past_k_l, past_v_l [1,Hkv,P_j,d]  the cache of layer l, in segment j
    Outputs (``outputs``): logits fp32 [1,R,vocab]; attention_received fp32 [1,P_0+S] where the plan gives
    guidance; kept_i int64 [1,S_i+1], indices into the rows of the segment before it; present_k_l, present_v_l.
    """

    def __init__(self, model: Any, family: Family, plan: PruningPlan, sizes: LanguageModel) -> None:
        super().__init__()
        language = family.language(model)
        self.layers, self.norm, self.rotary_emb = language.layers, language.norm, language.rotary_emb
        self.lm_head, self.plan = model.lm_head, plan
        self.multiplier = getattr(language, "embedding_multiplier", 1.0)  # granite's
        self.deepstack = deepstack_names(sizes)
        self.segments = plan.segments(len(self.layers))

    @property
    def inputs(self) -> list[str]:
        """Input names in the file's order."""
        plan = self.plan
        names = ["inputs_embeds", "position_ids"]
        names += ["is_visual"] if plan.uses_visual else []
        names += ["image_index"] if plan.uses_image else []
        names += ["guide"] if plan.uses_guide else []
        names += [name for i, p in enumerate(plan.points) for name in budget_names(p, i)]
        names += ["tail"]
        names += ["priority"] if plan.uses_priority else []
        names += self.deepstack
        return names + [n for i in range(len(self.layers)) for n in past_names(i)]

    @property
    def outputs(self) -> list[str]:
        """Output names in the file's order."""
        plan = self.plan
        names = ["logits", *(["attention_received"] if plan.guidance else [])]
        names += [f"kept_{i}" for i in range(len(plan.points))]
        return names + [n for i in range(len(self.layers)) for n in present_names(i)]

    def forward(self, feed: Tensors) -> Tensors:
        hidden, position = feed["inputs_embeds"], feed["position_ids"]
        hidden = hidden if self.multiplier == 1 else hidden * self.multiplier
        is_visual, priority, image = feed.get("is_visual"), feed.get("priority"), feed.get("image_index")
        deepstack = [feed[name] for name in self.deepstack]
        out: Tensors = {}
        summed: torch.Tensor | None = None
        received: torch.Tensor
        rotary = self.rotary_emb(hidden, position)
        guide = feed.get("guide")
        if self.plan.attention_rows == "raters":
            guide = OPS["TextRaters"].torch_op(hidden, is_visual, guide)
        for j, segment in enumerate(self.segments):
            if j:
                point = self.plan.points[j - 1]
                score = priority
                if point.score not in FROM_OUTSIDE:
                    scored = point.layer - (point.score == "attention")
                    if point.score == "preview":
                        received = self.preview(scored, hidden, rotary, feed, guide)
                    score = received[:, feed[past_names(scored)[0]].shape[2] :]
                hidden, kept = self.cut(j - 1, hidden, score, image if point.per_image else is_visual, feed)
                compact = OPS["CompactRows"].torch_op
                out[f"kept_{j - 1}"] = kept
                position = compacted_positions(position, kept)
                # Features of layers behind the point are pruned with the same rows, those of earlier ones are used up.
                deepstack = [compact(x, kept) if i >= point.layer else x for i, x in enumerate(deepstack)]
                if j < len(self.plan.points):
                    is_visual = compact(is_visual, kept) if is_visual is not None else None
                    image = compact(image, kept) if image is not None else None
                    priority = compact(priority, kept) if priority is not None else None
                rotary = self.rotary_emb(hidden, position)
            for i in segment:
                past_k, past_v = (feed[name] for name in past_names(i))
                run = LayerRun(past_k, past_v, guide if self.listens(i) else None)
                hidden = self.layers[i](
                    hidden,
                    attention_mask=None,
                    position_ids=position,
                    position_embeddings=rotary,
                    use_cache=False,
                    saccade_run=run,
                )
                if i < len(deepstack):
                    hidden = hidden + deepstack[i]
                if run.received is not None:
                    received = run.received
                if self.plan.guidance and run.received is not None:
                    summed = received if summed is None else summed + received
                out |= dict(zip(present_names(i), (run.present_k, run.present_v), strict=True))
        if summed is not None:
            out["attention_received"] = summed
        rows, wanted = hidden.shape[1], feed["tail"].shape[0]
        last = torch.arange(wanted, device=hidden.device) + (rows - wanted)
        out["logits"] = self.lm_head(self.norm(hidden.index_select(1, last))).float()
        return {name: out[name] for name in self.outputs}

    def cut(
        self, i: int, hidden: torch.Tensor, score: torch.Tensor | None, of_rows: torch.Tensor | None, feed: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states behind prune point i, and which rows they are. of_rows: image_index or is_visual, by the op."""
        point = self.plan.points[i]
        budget = [feed[name] for name in budget_names(point, i)]
        if point.merge:
            return OPS["MergeDropped"].torch_op(hidden, score, of_rows, *budget)
        kept = OPS["KeepPerImage" if point.per_image else "KeepTopK"].torch_op(score, of_rows, *budget)
        return OPS["CompactRows"].torch_op(hidden, kept), kept

    def preview(
        self, layer: int, hidden: torch.Tensor, rotary: Any, feed: Tensors, guide: torch.Tensor | None
    ) -> torch.Tensor:
        """What the keys of a layer would receive if it ran on these rows; its own q and k, nothing more of it."""
        past_k, past_v = (feed[name] for name in past_names(layer))
        run = LayerRun(past_k, past_v, guide, preview=True)
        block = self.layers[layer]
        block.self_attn(
            hidden_states=block.input_layernorm(hidden),
            position_embeddings=rotary,
            attention_mask=None,
            saccade_run=run,
        )
        assert run.received is not None
        return run.received

    def listens(self, layer: int) -> bool:
        """Whether the plan reads what the keys of this layer receive."""
        if self.plan.guidance:
            return layer in self.plan.guidance.layers
        return any(p.score == "attention" and p.layer == layer + 1 for p in self.plan.points)


def compacted_positions(position: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The kept rows of positions [1,S] or [3,1,S]."""
    compact = OPS["CompactRows"].torch_op
    if position.dim() == 2:
        return compact(position, kept)
    return compact(position.permute(1, 2, 0).contiguous(), kept).permute(2, 0, 1)


Program = VisionProgram | EmbedProgram | DecoderProgram
