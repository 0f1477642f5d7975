"""The peer to compare with: the same checkpoint in Hugging Face transformers, greedy, eager PyTorch.

The checkpoint's own Processor class prepares images and text, over the image processor on Pillow; an AutoProcessor
would want torchvision for videos, which are not asked about here.
"""

import inspect
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from exporter.checkpoint import Checkpoint, checkpoint_from_folder
from graphs.errors import UsageError
from graphs.versions import require


@dataclass(frozen=True)
class ReferenceAnswer:
    """tokens: ids of the answer, end token included. first_logits: float32 [vocab] for its first token.

    prompt: ids of the prompt, one placeholder per visual token.
    """

    tokens: tuple[int, ...]
    text: str
    first_logits: np.ndarray
    milliseconds: float
    prompt: tuple[int, ...]


class Reference:
    """A checkpoint of any family, loaded by ``from_pretrained`` with sdpa attention, asked through its processor."""

    def __init__(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Load model, tokenizer, image processor and chat template; BadArtefact as for an export."""
        require("torch", "transformers")
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        checkpoint = checkpoint_from_folder(Path(folder))
        self.model: Any = checkpoint.family.model_class().from_pretrained(folder, dtype=dtype).eval()
        self.processor = processor_of(checkpoint)
        self.tokenizer = self.processor.tokenizer

    def answer(
        self, image: Image.Image | Sequence[Image.Image] | None, question: str, max_new_tokens: int = 128
    ) -> ReferenceAnswer:
        """Greedy ``generate`` on no, one or several images, and the question behind them."""
        images = [] if image is None else [image] if isinstance(image, Image.Image) else list(image)
        content = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": question}]
        return self.reply([{"role": "user", "content": content}], max_new_tokens)

    def reply(self, messages: Sequence[dict[str, Any]], max_new_tokens: int = 128) -> ReferenceAnswer:
        """Greedy ``generate`` on a conversation; the time includes preparing text and images.

        messages: as transformers' chat templates take them, ``role`` and ``content``, each content a list of
        ``{"type": "text", "text": …}`` and ``{"type": "image", "image": …}`` (a PIL image), in any order and number.
        """
        from transformers import ProcessorMixin

        if not messages:
            raise UsageError("the conversation is empty; give at least one message with a question")
        started = time.perf_counter()
        # ProcessorMixin's, for SmolVLM's own reads the settings of a video processor first.
        inputs = ProcessorMixin.apply_chat_template(
            self.processor,
            list(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.dtype)
        with torch.no_grad():
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
        prompt = inputs["input_ids"][0].tolist()
        tokens = out.sequences[0, len(prompt) :].tolist()
        taken = (time.perf_counter() - started) * 1e3
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return ReferenceAnswer(tuple(tokens), answer, out.logits[0][0].float().numpy(), taken, tuple(prompt))


def processor_of(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own Processor class, without its video half; settings its files leave out are config.json's."""
    from transformers import AutoTokenizer, ProcessorMixin
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    folder = checkpoint.folder
    known = PROCESSOR_MAPPING[type(checkpoint.config)]
    # SmolVLM's refuses to be made without num2words, which writes the numbers of its video prompts only.
    module = sys.modules[known.__module__]
    if getattr(module, "num2words", "") is None:
        module.num2words = str  # type: ignore[attr-defined]
    # A missing video processor is otherwise looked up, and that lookup needs torchvision.
    videoless: Any = type(
        known.__name__, (known,), {"check_argument_for_proper_class": lambda self, name, argument: None}
    )
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil"),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }
    said, _ = ProcessorMixin.get_processor_dict(folder)
    said.setdefault("chat_template", parts["tokenizer"].chat_template)
    settings = {**settings_of(checkpoint.config, known), **said}
    return videoless.from_args_and_dict([parts.get(name) for name in known.get_attributes()], settings)


def settings_of(config: Any, processor_class: type) -> dict[str, Any]:
    """What a Processor class has to know of the model, from the configuration."""
    vision = config.vision_config
    named = {
        "patch_size": getattr(vision, "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        "num_additional_image_tokens": int("clip" in vision.model_type),
        "image_seq_length": getattr(config, "image_seq_length", None),
    }
    if isinstance(size := getattr(vision, "image_size", None), int):
        patches = (size // vision.patch_size) ** 2
        named |= {"num_image_tokens": patches, "image_seq_len": patches // getattr(config, "scale_factor", 1) ** 2}
    taken = inspect.signature(processor_class).parameters
    return {name: value for name, value in named.items() if name in taken and value is not None}
