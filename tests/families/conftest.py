"""One tiny checkpoint and one export per family and session; every test of a family uses that export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphs.plan import PrunePoint, PruningPlan
from tests.families.cases import CASES, Case, conversation, pictures
from tests.families.onnx_loop import OnnxModel

PLAN = PruningPlan(
    name="both",
    points=(PrunePoint(layer=1, score="attention", keep=0.5), PrunePoint(layer=2, score="priority", keep=0.25)),
)


@dataclass
class Sample:
    """A family's checkpoint, its Hugging Face model and processor, and its export under a plan of two points."""

    case: Case
    folder: Path
    model: Any
    processor: Any
    onnx: OnnxModel

    def hf_inputs(self, shapes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What Hugging Face's own processor makes of a conversation about pictures of these shapes."""
        images = pictures(shapes)
        text = self.processor.apply_chat_template(conversation(images), tokenize=False, add_generation_prompt=True)
        made = self.processor(images=[images], text=[text], return_tensors="pt")
        return dict(made)

    def visual_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those that get_image_features takes."""
        wanted = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask")
        return {k: v for k, v in inputs.items() if k in wanted}

    @torch.no_grad()
    def hf_features(self, inputs: dict[str, torch.Tensor]) -> Any:
        """Visual tokens [V,D], deepstack features [V,D] each."""
        out = self.model.model.get_image_features(**self.visual_inputs(inputs), return_dict=True)
        parts = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        return [torch.cat([f.reshape(-1, f.shape[-1]) for f in part]) for part in parts]

    @property
    def language(self) -> Any:
        """The decoder's module."""
        return getattr(self.model.model, "language_model", None) or self.model.model.text_model

    def hf_positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Positions of the prompt as the model makes them, [1,S] or [3,1,S]."""
        if hasattr(self.model.model, "get_rope_index"):
            wanted = {k: inputs[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
            return self.model.model.get_rope_index(**wanted)[0]
        return torch.arange(inputs["input_ids"].shape[1])[None]


def sample_of(name: str, folder: Path, **changes: Any) -> Sample:
    """Make a checkpoint and export it."""
    from transformers import AutoModelForImageTextToText

    from exporter.export import export_checkpoint

    case = CASES[name]
    checkpoint = case.checkpoint(folder / "checkpoint", **changes)
    spec = export_checkpoint(checkpoint, folder / "export", plan=PLAN, role="alone")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return Sample(
        case, checkpoint, model, case.hf_processor(checkpoint, model.config), OnnxModel(folder / "export", spec)
    )


@pytest.fixture(scope="session", params=list(CASES))
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return sample_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(7)
