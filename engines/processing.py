"""From images and a conversation to pixels and token ids, as the checkpoint's own processor does it, without torch.

Image processor, tokenizer and chat template are loaded each by itself (an AutoProcessor may want
torchvision), and the image processor always with Pillow, so that every machine sees the same pixels.
Legend: N images, H and W the processed size, S tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
from PIL import Image

from engines.families import FAMILIES, HostFamily, Seen, expanded, folded
from engines.names import read_once
from engines.talk.messages import Talk
from graphs.errors import BadArtefact, UnaskableQuestion, first_line
from graphs.spec import PROCESSOR_FOLDER, TEMPLATE_FILE, TEMPLATE_HOLDERS, ExportSpec
from graphs.versions import require_once

# In an environment without torch, transformers would say so on every start.
QUIET = ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# transformers puts another object in its own place while it is imported: two at once see the wrong one.
LOADING = Lock()


def load_ahead() -> None:
    """Begin to import what reads processors, beside the hashing of a bundle; what fails will fail where it is used."""

    def load() -> None:
        with suppress(Exception), LOADING:
            _transformers()

    Thread(target=load, daemon=True).start()


def _transformers() -> Any:
    """The library, with what reads processors imported; what of that fails will fail where it is used."""
    os.environ.setdefault(*QUIET)
    with read_once():
        import transformers

        with suppress(Exception):
            _ = transformers.AutoTokenizer, transformers.AutoImageProcessor
    return transformers


class Processor:
    """The ``processor/`` folder of an export, loaded part by part on first use."""

    def __init__(self, folder: Path, spec: ExportSpec) -> None:
        self.folder = Path(folder) / PROCESSOR_FOLDER
        self.spec = spec
        if not self.folder.is_dir():
            raise BadArtefact(f"{self.folder} is missing; export the checkpoint again")

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self._loaded("AutoTokenizer")

    @cached_property
    def image_processor(self) -> Any:
        """The checkpoint's image processor on Pillow and numpy."""
        return self._loaded("AutoImageProcessor", backend="pil")

    def load(self) -> None:
        """Load every part now."""
        _ = self.tokenizer, self.image_processor, self.chat_template

    @cached_property
    def chat_template(self) -> str:
        """The text of the chat template, from wherever this checkpoint keeps it."""
        return chat_template_of(self.folder)

    @cached_property
    def family(self) -> HostFamily:
        """The family's host half; BadArtefact for one that this version does not know."""
        if self.spec.family not in FAMILIES:
            raise BadArtefact(
                f"{self.folder} belongs to family {self.spec.family!r}; known are {', '.join(FAMILIES)}, "
                "so run it with the version that exported it"
            )
        return FAMILIES[self.spec.family]

    def look(self, *images: Image.Image) -> Seen:
        """Return one prompt's images as the vision graph takes them, with their numbers of visual tokens."""
        try:
            made = self.image_processor(images=[list(images)], return_tensors="np", **self.family.options)
            seen = self.family.seen(made, self.spec.grid)
        except (ValueError, TypeError, KeyError, IndexError, OSError, MemoryError) as e:
            raise BadArtefact(f"the image processor of {self.folder} refused the image ({e}); try another") from None
        wanted = {t.name: t.shape for t in self.spec.stages["vision"].inputs}
        for name, value in seen.feeds.items():
            fixed = wanted.get(name, ())
            same_rank = len(fixed) == value.ndim
            if not same_rank or any(isinstance(a, int) and a != b for a, b in zip(fixed, value.shape, strict=True)):
                raise BadArtefact(
                    f"{self.folder} makes {name} of shape {list(value.shape)}, but the vision graph takes "
                    f"{list(fixed)}; export the checkpoint again"
                )
        return seen

    def sees_like(self, other: Processor) -> bool:
        """Whether both make the same of an image, so that one may do it for both."""
        mine, its = (
            [p.spec.family, p.spec.grid, *(t for t in p.spec.stages["vision"].inputs if not t.carrier)]
            for p in (self, other)
        )
        if mine != its or type(self.image_processor) is not type(other.image_processor):
            return False
        return bool(self.image_processor.to_dict() == other.image_processor.to_dict())

    def view(self, seen: Seen, i: int = 0) -> Image.Image:
        """Return what the model sees of the i-th image, RGB [H, W]: cropped and resized, normalisation undone."""
        mean, std = (
            np.asarray(getattr(self.image_processor, name, None) or default, np.float32)
            for name, default in (("image_mean", [0.0] * 3), ("image_std", [1.0] * 3))
        )
        colour = seen.view(i).transpose(1, 2, 0) * std + mean
        return Image.fromarray((colour * 255).round().clip(0, 255).astype(np.uint8))

    def prompt(self, talk: Talk, visual: Sequence[Seen]) -> np.ndarray:
        """Return token ids, int64 [1, S], of a conversation up to where the answer begins.

        visual: the images of every message that has some, in order; each visual token is one placeholder.
        Raises UsageError for a prompt that leaves no position for an answer.
        """
        tokens = self.spec.tokens
        counts = [count for seen in visual for count in seen.tokens]
        text = self._rendered(talk)
        if text.count(tokens.image_text) != len(counts):
            raise BadArtefact(
                f"the chat template of {self.folder} writes {text.count(tokens.image_text)} placeholders "
                f"{tokens.image_text!r} for {len(counts)} image(s); use the template the model was trained with"
            )
        texts = [
            self.family.text(seen, i, tokens.image_text, self.tokenizer)
            for seen in visual
            for i in range(len(seen.tokens))
        ]
        # A placeholder is a token of its own, so a thousand of them need not be read to be as many tokens.
        text, runs = folded(expanded(text, tokens.image_text, texts), tokens.image_text)
        bos = self.tokenizer.bos_token
        try:
            ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise BadArtefact(
                f"the tokenizer of {self.folder} cannot read the question ({e}); correct the checkpoint's files and "
                "export it again"
            ) from None
        folded_ids = np.asarray(ids, dtype=np.int64)
        at = np.flatnonzero(folded_ids == tokens.image)
        repeats = np.ones(len(folded_ids), np.int64)
        if len(at) == len(runs):
            repeats[at] = runs
        input_ids = np.repeat(folded_ids, repeats)[None]
        if (found := int((input_ids == tokens.image).sum())) != sum(counts):
            raise BadArtefact(
                f"the tokenizer of {self.folder} makes {found} placeholder tokens of {sum(counts)} visual ones; "
                "tokenizer and spec.json disagree, export the checkpoint again"
            )
        limit = self.spec.language.max_positions
        if input_ids.shape[1] >= limit:
            raise UnaskableQuestion(
                f"the prompt is {input_ids.shape[1]} tokens long ({sum(counts)} of images), but the model has "
                f"{limit} positions and the answer needs one; shorten the question or begin a new conversation"
            )
        return input_ids

    def checked(self, talk: Talk) -> Talk:
        """Return the conversation, or UsageError where its text holds what stands for an image."""
        for message in talk:
            if self.spec.tokens.image_text in message.text:
                raise UnaskableQuestion(
                    f"the question holds {self.spec.tokens.image_text!r}, which stands for the image itself; "
                    "leave it out"
                )
        return talk

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, special tokens left out."""
        return self.written(ids).strip()

    def written(self, ids: Sequence[int]) -> str:
        """Return the text of an answer as it stands; a placeholder that a model wrote stands for no image and goes."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).replace(self.spec.tokens.image_text, "")

    @property
    def max_new_tokens(self) -> int | None:
        """The answer's length that the checkpoint's generation config asks for, if it does."""
        value = self._generation.get("max_new_tokens")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def repetition_penalty(self) -> float | None:
        """The penalty that the checkpoint's generation config asks for, in greedy decoding too, if it does."""
        value = self._generation.get("repetition_penalty")
        return float(value) if isinstance(value, int | float) and value > 0 else None

    @cached_property
    def _generation(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return _json_of(path) if path.is_file() else {}

    def _rendered(self, talk: Talk) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [message.document() for message in talk],
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError) as e:
            roles = ", ".join(message.role for message in talk)
            raise BadArtefact(
                f"the chat template of {self.folder} fails on messages of {roles} ({e}); "
                "leave out what it does not know, or use the template the model was trained with"
            ) from None

    def _loaded(self, auto_class: str, **options: Any) -> Any:
        with LOADING:
            require_once("transformers")
            transformers = _transformers()
            try:
                return getattr(transformers, auto_class).from_pretrained(
                    self.folder, local_files_only=True, trust_remote_code=False, **options
                )
            except Exception as e:  # what a broken file raises is not documented
                raise BadArtefact(
                    f"{auto_class} cannot read {self.folder} ({first_line(e)}); export the checkpoint again"
                ) from None


def chat_template_of(folder: Path) -> str:
    """Return a processor folder's chat template; BadArtefact where it has none."""
    plain = folder / TEMPLATE_FILE
    try:
        if plain.is_file():
            return plain.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadArtefact(f"{plain} cannot be read ({e}); export the checkpoint again") from None
    for name in TEMPLATE_HOLDERS:
        path = folder / name
        template = _json_of(path).get("chat_template") if path.is_file() else None
        if isinstance(template, str):
            return template
    raise BadArtefact(
        f"{folder} has no chat template, so a question cannot be put as the model expects it; "
        "add chat_template.jinja to the checkpoint and export it again"
    )


def _json_of(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadArtefact(f"{path} cannot be read ({e}); export the checkpoint again") from None
    return document if isinstance(document, dict) else {}
