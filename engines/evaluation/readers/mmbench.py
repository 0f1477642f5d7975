"""MMBench (and what else is a TSV of this form): multiple choice, each picture inside as base64.

Source: open-compass/MMBench, mmbench_dev_en_….tsv: index, question, hint, A, B, C, D, answer, category, image. In files
for circular evaluation the picture of a row may be the index of another row, as in VLMEvalKit. Each row counts by
itself here; MMBench's own CircularEval wants a question right under every order of its options.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from io import StringIO

from engines.evaluation.readers.files import Files, Item, Record, items, lettered, text_of
from graphs.errors import BadArtefact

REMEDY = "give mmbench_dev_….tsv"
NEEDED = ("index", "question", "A", "B", "image")
EMPTY = ("", "nan")  # what pandas writes for nothing
LONGEST_INDEX = 64  # letters of an image that is another row's index


def read(files: Files) -> Iterator[Item]:
    """Yield the rows; a row without an answer is of a test split."""
    csv.field_size_limit(sys.maxsize)
    table = csv.DictReader(StringIO(text_of(files.data, REMEDY), newline=""), delimiter="\t")
    if missing := [name for name in NEEDED if name not in (table.fieldnames or ())]:
        raise BadArtefact(f"{files.data} has no column {missing[0]!r}, so it is not a file of MMBench; {REMEDY}")
    pictures: dict[str, str] = {}
    published = "answer" in (table.fieldnames or ())
    rows = ((f"{files.data}, row {i} (index {row.get('index')})", row) for i, row in enumerate(table, 2))
    yield from items(rows, lambda row: _record(row, pictures, published))


def _record(row: Mapping[str, str | None], pictures: dict[str, str], published: bool) -> Record:
    def cell(name: str) -> str:
        value = (row.get(name) or "").strip()
        return "" if value.lower() in EMPTY else value

    image = cell("image")
    if len(image) <= LONGEST_INDEX:
        if image not in pictures:
            raise BadArtefact(
                f"the image is {image!r}, which is neither a picture nor the index of a row above; correct it"
            )
        image = pictures[image]
    pictures[cell("index")] = image
    options = {letter: cell(letter) for letter in "ABCDEFGH" if cell(letter)}
    if not cell("question"):
        raise BadArtefact("there is no question; correct it")
    asked = "\n".join(part for part in (cell("hint"), cell("question")) if part)
    question, answers = lettered(asked, options, cell("answer"))
    if published and not answers:
        raise BadArtefact("there is no answer, though the file has a column of them; correct it")
    record = {"image": f"data:image/jpeg;base64,{image}", "question": question, "category": cell("category")}
    return {**record, "answers": answers} if answers else record
