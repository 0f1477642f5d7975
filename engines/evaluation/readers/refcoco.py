"""RefCOCO, RefCOCO+ and RefCOCOg: where is what a sentence describes? Answers are boxes (``engines.evaluation.boxes``).

Source: the JSONL that Qwen-VL's and InternVL's evaluation reads, {"image", "sent", "bbox": [left, top, right, bottom],
"width", "height"} in pixels. The authors' own refs(unc).p is a pickle, which can run code when it is opened, so it is
not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from engines.evaluation.boxes import written
from engines.evaluation.readers.files import Files, Item, Record, an_object, image_named, items, lines_of, text_at
from graphs.errors import BadArtefact

REMEDY = "give a JSONL file as Qwen-VL's evaluation has it"


def read(files: Files) -> Iterator[Item]:
    """Yield the sentences."""
    if files.data.suffix in (".p", ".pkl", ".pickle"):
        raise BadArtefact(
            f"{files.data} is a pickle, which can run code when it is opened, so it is not read; {REMEDY}"
        )
    yield from items(lines_of(files.data, REMEDY), lambda line: _record(files, line))


def _record(files: Files, line: str) -> Record:
    try:
        entry = an_object(json.loads(line))
    except (ValueError, RecursionError) as e:
        raise BadArtefact(f"this is not JSON ({e}); write one object per line") from None
    name = text_at(entry, "image")
    return {
        "image": image_named(files.images, name, name.rpartition("/")[2]),
        "question": text_at(entry, "sent"),
        "answer": written(_shares(entry)),
    }


def _shares(entry: Record) -> tuple[float, ...]:
    """The box as shares of width and height."""
    width, height, box = (entry.get(key) for key in ("width", "height", "bbox"))
    numbers = [width, height, *(box if isinstance(box, list) else [])]
    if len(numbers) != 6 or not all(_is_pixels(n) for n in numbers):
        raise BadArtefact(f"bbox must be four numbers, with width and height, got {box!r:.60}; correct it")
    across, down, left, top, right, bottom = (float(n) for n in numbers)
    if not (across and down and 0 <= left < right <= across + 1 and 0 <= top < bottom <= down + 1):
        raise BadArtefact(f"the box {box} does not lie in an image of {width}×{height} pixels; correct it")
    sides = (across, down, across, down)
    return tuple(min(1.0, value / side) for value, side in zip((left, top, right, bottom), sides, strict=True))


def _is_pixels(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e9
