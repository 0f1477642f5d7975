"""The families under test: their tiny checkpoints, Hugging Face's own processor, and pictures of several shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny_families import TINY

# (height, width) of the pictures of each prompt: several shapes, one to three pictures. (90, 62) alone fills so many
# tiles that LLaVA-OneVision shrinks its map.
PROMPTS = [[(40, 64)], [(96, 33)], [(50, 50), (30, 90)], [(64, 64), (24, 40), (100, 60)], [(90, 62)]]


@dataclass(frozen=True)
class Case:
    """One family. processor: the class of Hugging Face, as module:name, and settings it takes from its file."""

    name: str
    processor: str
    options: Callable[[Any], dict[str, Any]] = lambda config: {}

    def checkpoint(self, folder: Path, **changes: Any) -> Path:
        return TINY[self.name](folder, **changes)

    def hf_processor(self, folder: Path, config: Any) -> Any:
        """The Processor class itself, over image processor and tokenizer (no torchvision, so no video)."""
        from transformers import AutoImageProcessor, AutoTokenizer

        module, _, name = self.processor.partition(":")
        source = import_module(f"transformers.models.{module}")
        processor_class = getattr(source, name)
        if getattr(source, "num2words", "") is None:
            source.num2words = str  # asked for by SmolVLM's class, used in its video prompts only
        # A missing video processor is otherwise looked up, and that lookup needs torchvision.
        unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
        processor_class = type(name, (processor_class,), unchecked)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        parts = {"image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil"), "tokenizer": tokenizer}
        return processor_class(**parts, **self.options(config), chat_template=tokenizer.chat_template)


CASES = {
    case.name: case
    for case in [
        Case(
            "internvl",
            "internvl.processing_internvl:InternVLProcessor",
            lambda config: {"image_seq_length": 4},
        ),
        Case(
            "llava",
            "llava.processing_llava:LlavaProcessor",
            lambda config: {
                "patch_size": 8,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
        ),
        Case(
            "llava_next",
            "llava_next.processing_llava_next:LlavaNextProcessor",
            lambda config: {
                "patch_size": 8,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
        ),
        Case(
            "llava_onevision",
            "llava_onevision.processing_llava_onevision:LlavaOnevisionProcessor",
            lambda config: {
                "num_image_tokens": 16,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": config.vision_aspect_ratio,
            },
        ),
        Case("idefics3", "idefics3.processing_idefics3:Idefics3Processor", lambda config: {"image_seq_len": 4}),
        # SmolVLMProcessor reads two settings of a video processor even where there is no video.
        Case(
            "smolvlm",
            "smolvlm.processing_smolvlm:SmolVLMProcessor",
            lambda config: {"image_seq_len": 4, "video_processor": SimpleNamespace(num_frames=8, fps=1)},
        ),
        Case("qwen2_vl", "qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor"),
        Case("qwen2_5_vl", "qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor"),
        Case("qwen3_vl", "qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor"),
    ]
}


def pictures(shapes: list[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Seeded noise of these (height, width)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in shapes]


def conversation(images: list[Image.Image]) -> list[dict[str, Any]]:
    """Text between the images, a question behind the last."""
    content: list[dict[str, Any]] = []
    for i, image in enumerate(images):
        content += [{"type": "text", "text": " and "}] if i else []
        content += [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": " which digit is red ?"}]}]
