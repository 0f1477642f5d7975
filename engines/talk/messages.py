"""A conversation as a chat template takes it: messages with roles, each of text and images in order.

The documents are Hugging Face's: {"role": "user", "content": "text"} or a list of parts, {"type": "text",
"text": …} and {"type": "image", "image": …}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from engines.images import Picture, image_from
from graphs.errors import BadArtefact, UsageError

ROLES = ("system", "user", "assistant")
Content: TypeAlias = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Message:
    """Who says it, and what: pieces of text and images, in their order."""

    role: str
    parts: tuple[str | Image.Image, ...]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images in their order."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def text(self) -> str:
        """The text without the images."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    def document(self) -> dict[str, Any]:
        """The message as a template reads it."""
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in self.parts]
        return {"role": self.role, "content": content}


Talk: TypeAlias = tuple[Message, ...]


def asked(content: Content, images: Picture | Sequence[Picture] | None = None) -> Message:
    """A user's message: ``images`` first, one, several or none, then the content.

    Raises UsageError for content that says nothing or a part of a kind not known, BadArtefact for an image
    that cannot be read.
    """
    return message_from({"role": "user", "content": content}, _several(images))


def message_from(document: Mapping[str, Any], images: Sequence[Picture] = ()) -> Message:
    """Read one document; ``images`` go in front of its own parts."""
    role, content = document.get("role"), document.get("content")
    if role not in ROLES:
        raise UsageError(f"a message has the role {role!r}, but roles are {', '.join(ROLES)}; use one of them")
    if isinstance(content, str):
        parts: list[str | Image.Image] = [content.strip()]
    elif isinstance(content, Sequence):
        parts = [_part(part) for part in content]
    else:
        raise UsageError(
            f"a message's content is {type(content).__name__}, but it must be text or a list of parts; "
            'write {"type": "text", "text": …} and {"type": "image", "image": …}'
        )
    message = Message(role, (*(image_from(image) for image in images), *parts))
    if role != "user" and message.images:
        raise UsageError(f"a message of the {role} holds an image, but only the user shows images; move it to theirs")
    if not message.text.strip():
        raise UsageError("the question is empty; write what you want to know")
    try:
        message.text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"the question is not valid UTF-8 text ({e.reason}); write it in UTF-8") from None
    return message


def talk_from(documents: Sequence[Mapping[str, Any]]) -> Talk:
    """Read a list of documents; UsageError where a system message does not stand first."""
    if not isinstance(documents, Sequence) or not all(isinstance(d, Mapping) for d in documents):
        raise UsageError('messages must be a list of {"role": …, "content": …}; write them like that')
    talk = tuple(message_from(document) for document in documents)
    if any(message.role == "system" for message in talk[1:]):
        raise UsageError("a system message follows another message; give one system message, and put it first")
    return talk


def documents_from_file(path: Path) -> list[dict[str, Any]]:
    """Read a JSON file of messages; images are paths, relative ones from the file's folder. BadArtefact, UsageError."""
    try:
        documents = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadArtefact(f"{path} cannot be read as JSON ({e}); give a file of messages") from None
    if not isinstance(documents, list) or not all(isinstance(d, dict) for d in documents):
        raise UsageError(f'{path} must hold a list of {{"role": …, "content": …}}; correct it')
    for part in (part for d in documents if isinstance(d.get("content"), list) for part in d["content"]):
        for key in ("image", "path"):
            if isinstance(part, dict) and isinstance(part.get(key), str):
                part[key] = path.parent / part[key]
    return documents


def _part(part: Any) -> str | Image.Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "image":
        for key in ("image", "path"):
            if part.get(key) is not None:
                return image_from(part[key])
        raise UsageError("an image part has neither image nor path; give one of them (nothing is ever downloaded)")
    raise UsageError(f'a part of a message is of type {kind!r}, but parts are "text" and "image"; use these')


def _several(images: Picture | Sequence[Picture] | None) -> Sequence[Picture]:
    if images is None:
        return ()
    return images if isinstance(images, list | tuple) else (images,)
