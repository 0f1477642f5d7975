"""TextVQA: questions about the text in a picture, ten people's answers each.

Source: textvqa.org, version 0.5.1: {"data": [{"question_id", "question", "image_id", "answers": ["…", …]}]}; the
addresses that stand there too are not used.
"""

from __future__ import annotations

from collections.abc import Iterator

from engines.evaluation.readers.files import (
    Files,
    Item,
    Record,
    an_object,
    image_named,
    items,
    json_of,
    listed,
    numbered,
    text_at,
    texts_at,
)

REMEDY = "give TextVQA_0.5.1_val.json"


def read(files: Files) -> Iterator[Item]:
    """Yield the questions; the test split has no answers."""
    found = numbered(files.data, listed(files.data, json_of(files.data, REMEDY), "data", REMEDY), "question_id")
    yield from items(found, lambda entry: _record(files, an_object(entry)))


def _record(files: Files, entry: Record) -> Record:
    name = f"{text_at(entry, 'image_id')}.jpg"
    image = image_named(files.images, name, f"train_images/{name}", f"test_images/{name}")
    record = {"image": image, "question": text_at(entry, "question")}
    return {**record, "answers": texts_at(entry, "answers")} if "answers" in entry else record
