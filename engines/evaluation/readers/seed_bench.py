"""SEED-Bench: multiple choice about pictures; its questions about videos are bad lines, for videos are not read here.

Source: AILab-CVC/SEED-Bench, SEED-Bench.json: {"questions": [{"question_id", "question", "choice_a" … "choice_d",
"answer": "A", "data_id", "data_type": "image", "question_type_id"}], "question_type": {"Scene Understanding": 1}}; a
picture's file is named as its data_id, without an ending.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engines.evaluation.readers.files import (
    Files,
    Item,
    Record,
    an_object,
    image_named,
    items,
    json_of,
    lettered,
    listed,
    numbered,
    text_at,
)
from graphs.errors import BadArtefact

REMEDY = "give SEED-Bench.json"


def read(files: Files) -> Iterator[Item]:
    """Yield the questions, each with its type's name as category."""
    document = json_of(files.data, REMEDY)
    named = document.get("question_type") if isinstance(document, dict) else None
    types = {str(number): name for name, number in named.items()} if isinstance(named, dict) else {}
    found = numbered(files.data, listed(files.data, document, "questions", REMEDY), "question_id")
    yield from items(found, lambda entry: _record(files, an_object(entry), types))


def _record(files: Files, entry: Record, types: Mapping[str, str]) -> Record:
    if (kind := entry.get("data_type", "image")) != "image":
        raise BadArtefact(f"this is about a {kind}, and only pictures are read; leave it out")
    options = {
        letter: text_at(entry, f"choice_{letter.lower()}") for letter in "ABCD" if f"choice_{letter.lower()}" in entry
    }
    question, answers = lettered(text_at(entry, "question"), options, text_at(entry, "answer"))
    name = text_at(entry, "data_id")
    image = image_named(files.images, name, f"{name}.jpg", f"{name}.png", f"SEED-Bench-image/{name}")
    number = entry.get("question_type_id")
    return {
        "image": image,
        "question": question,
        "answers": answers,
        "category": types.get(str(number), str(number or "")),
    }
