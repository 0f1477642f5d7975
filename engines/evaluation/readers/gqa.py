"""GQA: one object of questions by their ids.

Source: the GQA download page: {"201307251": {"imageId": "n161313", "question", "answer", "types": {"structural"}}}.
"""

from __future__ import annotations

from collections.abc import Iterator

from engines.evaluation.readers.files import Files, Item, Record, an_object, image_named, items, json_of, text_at
from graphs.errors import BadArtefact

REMEDY = "give testdev_balanced_questions.json or another file of questions"


def read(files: Files) -> Iterator[Item]:
    """Yield the questions; an answer is missing in the test split."""
    document = json_of(files.data, REMEDY)
    if not isinstance(document, dict):
        raise BadArtefact(f"{files.data} is not an object of questions by id, so it is not a file of GQA; {REMEDY}")
    found = ((f"{files.data}, question {number}", entry) for number, entry in document.items())
    yield from items(found, lambda entry: _record(files, an_object(entry)))


def _record(files: Files, entry: Record) -> Record:
    name = text_at(entry, "imageId")
    types = entry.get("types")
    kind = types.get("structural") if isinstance(types, dict) else None
    record = {
        "image": image_named(files.images, f"{name}.jpg", f"images/{name}.jpg"),
        "question": text_at(entry, "question"),
        "category": kind,
    }
    return {**record, "answer": text_at(entry, "answer")} if "answer" in entry else record
