"""The peer to compare with: the same checkpoint in Hugging Face transformers, greedy, eager PyTorch."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from exporter.checkpoint import checkpoint_from_folder
from graphs.errors import UsageError
from graphs.versions import require


@dataclass(frozen=True)
class ReferenceAnswer:
    """tokens: ids of the answer, end token included. first_logits: float32 [vocab] for its first token."""

    tokens: tuple[int, ...]
    text: str
    first_logits: np.ndarray
    milliseconds: float


class Reference:
    """A checkpoint loaded by ``from_pretrained`` with sdpa attention, asked through its own processor."""

    def __init__(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Load model, tokenizer, image processor and chat template; BadArtefact as for an export."""
        require("torch", "transformers")
        from transformers import AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        checkpoint = checkpoint_from_folder(Path(folder))
        self.model: Any = checkpoint.family.model_class().from_pretrained(folder, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.image_token = self.tokenizer.convert_ids_to_tokens(checkpoint.config.image_token_id)
        grid = checkpoint.family.grid(checkpoint.config)
        if grid.kind != "fixed":
            raise UsageError(
                f"{folder} cuts images into a varying number of tokens, and the comparison knows fixed grids only; "
                "compare with a LLaVA-1.5 checkpoint"
            )
        self.tokens_per_image = grid.tokens

    def answer(self, image: Image.Image, question: str, max_new_tokens: int = 128) -> ReferenceAnswer:
        """Greedy ``generate`` on one image and question; the time includes preparing both."""
        started = time.perf_counter()
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        text = prompt.replace(self.image_token, self.image_token * self.tokens_per_image)
        # As transformers' processors do: the start token is added where the template has not written it.
        written = text.startswith(self.tokenizer.bos_token or "\0")
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=not written)
        pixels = self.images(images=image, return_tensors="pt")["pixel_values"].to(self.model.dtype)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        taken = (time.perf_counter() - started) * 1e3
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return ReferenceAnswer(tuple(tokens), answer, out.logits[0][0].float().numpy(), taken)
