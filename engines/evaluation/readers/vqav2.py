"""VQAv2 (and VQA v1, which has the same files): questions and the ten people's answers lie in two files.

Source: visualqa.org, download page: {"data_subtype": "val2014", "questions": [{"image_id", "question", "question_id"}]}
and {"annotations": [{"question_id", "question_type", "answers": [{"answer"}]}]}; images are COCO's.
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
)
from graphs.errors import BadArtefact

REMEDY = "give v2_OpenEnded_…_questions.json, and v2_…_annotations.json with --annotations"


def read(files: Files) -> Iterator[Item]:
    """Yield the questions; without annotations nobody knows the answers (as of the test split)."""
    document = json_of(files.data, REMEDY)
    subset = str(document.get("data_subtype", "")) if isinstance(document, dict) else ""
    known = None if files.annotations is None else _annotated(files)
    found = numbered(files.data, listed(files.data, document, "questions", REMEDY), "question_id")
    yield from items(found, lambda entry: _record(files, subset, an_object(entry), known))


def _annotated(files: Files) -> dict[str, Record]:
    assert files.annotations
    document = json_of(files.annotations, REMEDY)
    found = listed(files.annotations, document, "annotations", REMEDY)
    return {str(a.get("question_id")): a for a in found if isinstance(a, dict)}


def _record(files: Files, subset: str, entry: Record, known: dict[str, Record] | None) -> Record:
    number = text_at(entry, "image_id")
    if not (number.isascii() and number.isdigit()):
        raise BadArtefact(f"image_id {number!r} is not a number; correct it")
    name = f"{int(number):012d}.jpg"
    pictures = subset.replace("test-dev", "test")  # a part of the test split, with its pictures
    image = image_named(files.images, f"COCO_{pictures}_{name}", f"{pictures}/COCO_{pictures}_{name}", name)
    record = {"image": image, "question": text_at(entry, "question")}
    if known is None:
        return record
    annotation = known.get(text_at(entry, "question_id"))
    if annotation is None:
        raise BadArtefact(f"{files.annotations} has no answers to this question; give the file of the same split")
    given = annotation.get("answers")
    answers = [a.get("answer") for a in given if isinstance(a, dict)] if isinstance(given, list) else []
    return {**record, "answers": answers, "category": str(annotation.get("question_type", ""))}
