"""DocVQA (and InfographicVQA, which has the same form): questions about pages, one or several answers each.

Source: the challenge's files (rrc.cvc.uab.es, task 1): {"data": [{"questionId", "question", "image": "documents/….png",
"answers": ["…"], "question_types": ["…"]}]}.
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

REMEDY = "give val_v1.0_withQT.json"


def read(files: Files) -> Iterator[Item]:
    """Yield the questions; the test split has no answers."""
    found = numbered(files.data, listed(files.data, json_of(files.data, REMEDY), "data", REMEDY), "questionId")
    yield from items(found, lambda entry: _record(files, an_object(entry)))


def _record(files: Files, entry: Record) -> Record:
    name = text_at(entry, "image" if "image" in entry else "image_local_name")
    record = {
        "image": image_named(files.images, name, name.rpartition("/")[2]),
        "question": text_at(entry, "question"),
    }
    return {**record, "answers": texts_at(entry, "answers")} if "answers" in entry else record
