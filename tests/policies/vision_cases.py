"""A family's vision stage under one score: traced alone into ONNX, and what Hugging Face's own tower attends to.

The reference watches every attention of the tower by a function of its own, with whole maps, and puts patches together
by their place in the image, or by transformers' own packing.

Legend: P patches, T tokens of a tile, m patches of a token.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import AutoImageProcessor, AutoModelForImageTextToText, vision_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engines.families import FAMILIES, Seen
from exporter.checkpoint import checkpoint_from_folder, language_of, skeleton_of
from exporter.program import VisionProgram
from exporter.towers import with_tower
from exporter.trace import finish, onnx_from_program
from graphs.layouts.budgets import vision_feeds
from graphs.plan import PruningPlan, VisionPoint
from tests.families.cases import CASES, pictures
from tests.families.conftest import Sample

# What makes the last linear map into the decoder, scaled down: else every token attends to itself only, and scores tie.
LAST = ("multi_modal_projector.linear_2", "connector.modality_projection.proj", "merger.mlp.2", "merger.linear_fc2")


def spying(seen: list[Any]) -> Any:
    """An attention with whole maps that notes its module, map [N,H,L,L] and keys [N,H,L,d]."""

    def spy(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, scaling: float, **_: Any) -> Any:
        logit = q @ k.transpose(2, 3) * scaling
        shares = (logit if attention_mask is None else logit + attention_mask).softmax(-1)
        seen.append((module, shares, k))
        return (shares @ v).transpose(1, 2).contiguous(), None

    return spy


class VisionCase:
    """One family's checkpoint."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, CASES[name].checkpoint(folder)
        shrunk = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        shrink(shrunk)
        shrunk.save_pretrained(self.folder)
        self.source = checkpoint_from_folder(self.folder)
        self.grid, self.language = self.source.family.grid(self.source.config), language_of(self.source)
        self.watched: list[Any] = []

    @cached_property
    def hf(self) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float64).eval()
        ALL_ATTENTION_FUNCTIONS.register(f"spy_{self.name}", spying(self.watched))
        self.tower_of(model).config._attn_implementation = f"spy_{self.name}"
        return model

    @cached_property
    def skeleton(self) -> Any:
        model = skeleton_of(self.source, torch.float32)
        model.load_state_dict({k: v.float() for k, v in self.hf.state_dict().items()})
        return model

    @cached_property
    def sample(self) -> Sample:
        processor = CASES[self.name].hf_processor(self.folder, self.hf.config)
        return Sample(CASES[self.name], self.folder, self.hf, processor, None)  # type: ignore[arg-type]

    def tower_of(self, model: Any) -> Any:
        inner = model.model
        return next(getattr(inner, n) for n in ("vision_tower", "vision_model", "visual") if hasattr(inner, n))

    def seen(self, shapes: list[tuple[int, int]]) -> Seen:
        processor = AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        family = FAMILIES[self.name]
        made = processor(images=[pictures(shapes)], return_tensors="np", **family.options)
        return family.seen(made, self.grid)

    def stage(self, point: VisionPoint) -> Stage:
        plan = with_tower(PruningPlan(name="x", vision=point), self.skeleton, self.source.family)
        program = VisionProgram(self.skeleton, self.source.family, self.grid, self.language, plan.vision)
        model = onnx_from_program(program, program.example(2), program.dims)
        RemoveUnusedNodesPass()(model)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        data = ir.to_proto(finish(model)).SerializeToString()
        return Stage(self, plan.vision, program.outputs, ort.InferenceSession(data, options))

    @torch.no_grad()
    def reference(self, shapes: list[tuple[int, int]]) -> Reference:
        inputs = self.sample.hf_inputs(shapes)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        self.watched.clear()
        given: list[torch.Tensor] = []
        projector = getattr(self.hf.model, "multi_modal_projector", None)
        handle = projector.register_forward_pre_hook(lambda _, a: given.append(a[0])) if projector else None
        parts = self.sample.hf_features(inputs)
        if handle:
            handle.remove()
        return Reference(self, inputs, parts, list(self.watched), given)


class Stage:
    """A traced vision stage."""

    def __init__(self, case: VisionCase, point: VisionPoint, outputs: Any, session: Any) -> None:
        self.case, self.point, self.outputs, self.session = case, point, outputs, session

    def __call__(self, seen: Seen, keep: float) -> dict[str, np.ndarray]:
        feeds = seen.feeds | vision_feeds(self.point, self.case.grid, seen.tokens, keep)
        assert {i.name for i in self.session.get_inputs()} <= set(feeds)
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))


class Reference:
    """What the eager model made of some pictures. outputs: visual tokens [V,D], then deepstack features."""

    def __init__(self, case: VisionCase, inputs: Any, outputs: list[torch.Tensor], watched: Any, given: Any) -> None:
        self.case, self.inputs, self.outputs, self._watched, self._given = case, inputs, outputs, watched, given
        order = list(dict.fromkeys(id(module) for module, _, _ in watched))
        last = order[getattr(case.hf.config, "vision_feature_layer", -1) % (len(order) + 1) - 1]
        self.maps = [(m, k) for module, m, k in watched if id(module) == last]

    def features(self) -> torch.Tensor:
        """What enters the projector, a row per token: [V,C]."""
        return self._given[0].flatten(0, 1)

    def of_tokens(self, by_class: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Score [V] and key [V,d] of every visual token: means over its patches of what the tower gave."""
        scores, keys = [], []
        for shares, k in self.maps:
            rows = shares.sum(1)
            scores.append(rows[:, 0, 1:] if by_class else rows.sum(1))
            keys.append(k.mean(1)[:, 1:] if by_class else k.mean(1))
        return self._put_together([x[..., None] for x in scores])[:, 0], self._put_together(keys)

    def _put_together(self, values: list[torch.Tensor]) -> torch.Tensor:
        """Values of patches [N,P,C] as means of each token's, [V,C]."""
        grid = self.case.grid
        if grid.kind == "patches":
            tokens = torch.cat([v[0] for v in values]).unflatten(0, (-1, grid.merge**2)).mean(1)
            if not grid.window:
                return tokens
            thw = self.inputs["image_grid_thw"]
            order, _ = vision_utils.get_vision_window_index(thw, grid.merge, grid.window * grid.patch, grid.patch)
            return tokens[torch.argsort(order)]
        (whole,) = values
        if grid.kind == "anyres":
            return self._packed(whole)
        side = int(whole.shape[1] ** 0.5)
        times = side // grid.rows
        blocks = whole.unflatten(1, (grid.rows, times, grid.columns, times))
        return blocks.mean((2, 4)).flatten(0, 2)

    def _packed(self, whole: torch.Tensor) -> torch.Tensor:
        """By transformers' own packing, with newlines of zeros."""
        model, sizes = self.case.hf.model, self.inputs["image_sizes"]
        lone = "batch_num_images" in self.inputs and len(sizes) > 1
        counts = [1 if lone else tiles for tiles in self._tiles(sizes)]
        option = "vision_aspect_ratio" if self.case.grid.max_tiles else "vision_feature_select_strategy"
        more = {option: getattr(self.case.hf.config, option)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed, _ = model.pack_image_features(
                list(whole.split(counts)), sizes, image_newline=whole.new_zeros(whole.shape[2]), **more
            )
        return torch.cat(list(packed))

    def _tiles(self, sizes: Any) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        pins, side = self.case.hf.config.image_grid_pinpoints, self.case.grid.image_height
        return [image_size_to_num_patches(size, pins, side) for size in sizes]


def shrink(model: Any) -> None:
    """Scale the last map into the decoder down."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(LAST) and "deepstack" not in name:
                for parameter in module.parameters():
                    parameter.mul_(0.1)
