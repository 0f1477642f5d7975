"""The names that published checkpoints give their image processors all lead to the one on Pillow, without extras."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.families import FAMILIES
from tests.families.cases import CASES

# Every family's own class, by the names of its releases: plain, and with the torchvision half that used to be "Fast".
PUBLISHED = {
    "llava": ["CLIPImageProcessor", "CLIPImageProcessorFast", "LlavaImageProcessor"],
    "llava_next": ["LlavaNextImageProcessor", "LlavaNextImageProcessorFast"],
    "llava_onevision": ["LlavaOnevisionImageProcessor", "LlavaOnevisionImageProcessorFast"],
    "internvl": ["GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast"],
    "qwen2_vl": ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"],
    "qwen2_5_vl": ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"],
    "qwen3_vl": ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"],
    "idefics3": ["Idefics3ImageProcessor", "Idefics3ImageProcessorFast"],
    "smolvlm": ["SmolVLMImageProcessor", "SmolVLMImageProcessorFast", "Idefics3ImageProcessor"],
}


def test_the_names_are_of_every_family() -> None:
    assert set(PUBLISHED) == set(CASES)


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_name_makes_the_same_pixels(family: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    CASES[family].checkpoint(tmp_path)
    path, image = tmp_path / "preprocessor_config.json", Image.radial_gradient("L").convert("RGB").resize((70, 50))
    settings, made = json.loads(path.read_text()), []
    for name in [settings["image_processor_type"], *PUBLISHED[family]]:
        path.write_text(json.dumps(settings | {"image_processor_type": name}))
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        assert type(loaded).__name__.endswith("Pil"), name
        made.append(loaded(images=[[image]], return_tensors="np", **FAMILIES[family].options)["pixel_values"])
    for pixels in made[1:]:
        np.testing.assert_array_equal(pixels, made[0])
