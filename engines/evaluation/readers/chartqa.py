"""ChartQA: a list of questions about charts, one answer each.

Source: the authors' data (vis-nlp/ChartQA), test/test_human.json: [{"imgname", "query", "label"}], pictures in
test/png.
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

REMEDY = "give test_human.json or test_augmented.json"


def read(files: Files) -> Iterator[Item]:
    """Yield the questions."""
    found = numbered(files.data, listed(files.data, json_of(files.data, REMEDY), None, REMEDY), "imgname")
    yield from items(found, lambda entry: _record(files, an_object(entry)))


def _record(files: Files, entry: Record) -> Record:
    name = text_at(entry, "imgname")
    return {
        "image": image_named(files.images, name, f"png/{name}"),
        "question": text_at(entry, "query"),
        "answer": text_at(entry, "label"),
    }
