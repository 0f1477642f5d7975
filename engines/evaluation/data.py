"""Questions from a JSONL file, a benchmark's files or a built-in set, each checked before any is asked.

A line is {"image": …, "question": "…", "answers": ["…", …]}. image: a file's path, relative ones from the file's
folder, a data URI (data:image/png;base64,…), or a list of these; left out for text alone. answers: texts that are
right, or "answer" for one; left out where nobody knows. category, a text: results are told for each category too.
Other keys are the user's own. Several answers by metric ``vqa`` are of as many people, one of whom may have said
nothing. Nothing is ever downloaded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from engines.evaluation.metrics import METRICS
from engines.images import image_from
from graphs.console import warn
from graphs.errors import BadArtefact, SaccadeError, UsageError
from graphs.files import unreadable

DATA_URI = "data:image/"
PLACE = "{question}"
GO_ON = "(--skip-bad goes on without such lines)"
GIVE_JSONL = "give a JSONL file, one question per line, or name the benchmark with --format"


@dataclass(frozen=True, eq=False)
class Example:
    """A question that can be asked. where: its line, for messages. sources: paths, encoded images, Pillow images.

    digest: SHA-256 of the images' bytes, the question and the answers. answers: () where none are known. category and
    group: "" where there are none; questions of one group are about one image and count together (MME's accuracy+).
    """

    where: str
    sources: tuple[Path | bytes | Image.Image, ...]
    question: str
    answers: tuple[str, ...]
    digest: str
    category: str = ""
    group: str = ""

    @property
    def images(self) -> list[Image.Image]:
        """The images, decoded now."""
        return [image_from(image_of_bytes(s, self.where) if isinstance(s, bytes) else s) for s in self.sources]


@dataclass(frozen=True, eq=False)
class Data:
    """What was read: the examples in their order, and for each bad line what is wrong with it.

    skip_bad: whether what a model cannot be asked is left out too, instead of an error.
    """

    examples: tuple[Example, ...]
    bad: tuple[str, ...]
    skip_bad: bool = False

    @property
    def answered(self) -> bool:
        """Whether right answers are known."""
        return bool(self.examples[0].answers)

    def left_out(self, example: Example, why: SaccadeError) -> str:
        """What is wrong with an example that a model cannot be asked; BadArtefact where such ones end it all."""
        said = f"{example.where}: {why}"
        if not self.skip_bad:
            raise BadArtefact(f"{said} {GO_ON}") from None
        warn(f"left out: {said}")
        return said

    def without(self, bad: Mapping[int, str]) -> Data:
        """The same without the examples at these places; BadArtefact where none is left."""
        left = tuple(example for i, example in enumerate(self.examples) if i not in bad)
        if not left:
            first = (*self.bad, *bad.values())[0]
            raise BadArtefact(f"no question can be asked, the first because: {first:.300}")
        return replace(self, examples=left, bad=(*self.bad, *bad.values()))

    def once(self) -> Data:
        """The same with each distinct example once, at its first place."""
        first: dict[str, Example] = {}
        for example in self.examples:
            first.setdefault(example.digest, example)
        return replace(self, examples=tuple(first.values()))

    @property
    def digest(self) -> str:
        """SHA-256 over the examples in their order; where the files lie does not matter."""
        return hashlib.sha256("".join(example.digest for example in self.examples).encode()).hexdigest()


@dataclass(frozen=True)
class How:
    """How questions are read.

    metric: answers must allow a full mark under this one. limit: only the first. skip_bad: leave bad lines out and list
    them, instead of BadArtefact, which names the line. prompt: what is asked, with {question} where the question goes.
    """

    metric: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    prompt: str = PLACE

    def checked(self) -> How:
        """The same, or UsageError for a prompt without a place for the question."""
        if PLACE not in self.prompt:
            raise UsageError(f"the prompt {self.prompt!r} has no place for the question; write {PLACE} where it goes")
        return self


def data_from_file(path: Path, how: How = How()) -> Data:
    """Read a JSONL file; a file without a good line is always refused."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # JSON may hold what else str.splitlines() splits at
    except UnicodeDecodeError:
        raise BadArtefact(f"{path} is not UTF-8 text; {GIVE_JSONL}") from None
    except OSError as e:
        raise unreadable(path, e, GIVE_JSONL) from None
    numbered = ((f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip())
    return data_from_items(numbered, path.parent, str(path), how)


def data_from_records(records: Iterable[Mapping[str, Any]], name: str, how: How = How()) -> Data:
    """The same from mappings with the keys of a line, whose images may be Pillow's too."""
    return data_from_items(((f"{name}, question {i}", r) for i, r in enumerate(records, 1)), Path(), name, how)


def data_from_items(
    items: Iterable[tuple[str, str | Mapping[str, Any] | SaccadeError]], folder: Path, name: str, how: How
) -> Data:
    """Read (where, line) pairs: a JSON text, a mapping, or what was wrong with the line already."""
    how.checked()
    examples: list[Example] = []
    bad: list[str] = []
    pixels: dict[Path, bytes] = {}  # an image of several questions is decoded once
    for where, line in islice(items, None if how.limit is None else min(how.limit, sys.maxsize)):
        try:
            example = _example(where, line, folder, how, pixels)
            if examples and bool(example.answers) != bool(examples[0].answers):
                known, other = ("no answers", "has") if examples[0].answers else ("answers", "has none")
                raise BadArtefact(
                    f"{where}: there are {known}, but {examples[0].where} {other}; give answers in all lines or in none"
                )
            _refuse_unreachable(example, how.metric)
            examples.append(example)
        except SaccadeError as e:
            if not how.skip_bad:
                raise BadArtefact(f"{e} {GO_ON}") from None
            bad.append(str(e))
    if not examples:
        what = f"{len(bad)} lines, all bad, the first: {bad[0]}" if bad else "no lines"
        raise BadArtefact(f"{name} has {what}; give questions that can be asked")
    return Data(tuple(examples), tuple(bad), how.skip_bad)


def _example(
    where: str, line: str | Mapping[str, Any] | SaccadeError, folder: Path, how: How, pixels: dict[Path, bytes]
) -> Example:
    if isinstance(line, SaccadeError):
        raise BadArtefact(f"{where}: {line}")
    record = _record(where, line)
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise BadArtefact(f'{where}: there is no question; write "question": "…"')
    answers = _answers(where, record, silent=how.metric == "vqa")
    given = record.get("image")
    several = given if isinstance(given, list) else [] if given is None else [given]
    sources = tuple(_source(where, image, folder) for image in several)
    asked = how.prompt.replace(PLACE, question.strip())
    digest = hashlib.sha256(json.dumps([asked, answers]).encode())
    for source in sources:
        known = pixels.get(source) if isinstance(source, Path) else None
        checked = known or _pixels_checked(where, source)
        if isinstance(source, Path):
            pixels[source] = checked
        digest.update(checked)
    category = record.get("category") or ""
    if not isinstance(category, str | int):
        raise BadArtefact(f"{where}: category must be a text or a number, got {category!r:.60}; correct it")
    group = "" if isinstance(line, str) else str(record.get("group", ""))  # readers say it, a JSONL line's is its own
    return Example(where, sources, asked, answers, digest.hexdigest(), str(category), group)


def _record(where: str, line: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(line, Mapping):
        return line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise BadArtefact(f"{where}: this is not JSON ({e}); write one object per line") from None
    if not isinstance(record, dict):
        raise BadArtefact(f"{where}: this is {type(record).__name__}, not an object; write one object per line")
    return record


def _answers(where: str, record: Mapping[str, Any], silent: bool) -> tuple[str, ...]:
    """silent: whether some of several may be empty."""
    if "answer" in record and "answers" in record:
        raise BadArtefact(f"{where}: there are both answer and answers; keep one of them")
    given = record.get("answers", record.get("answer"))
    if given is None:
        return ()
    answers = given if isinstance(given, list) else [given]
    some = any if silent else all
    if not answers or not all(isinstance(a, str) for a in answers) or not some(a.strip() for a in answers):
        raise BadArtefact(f"{where}: answers must be texts that are not empty, got {given!r:.60}; quote numbers too")
    return tuple(a.strip() for a in answers)


def _refuse_unreachable(example: Example, metric: str | None) -> None:
    """A full mark must be possible."""
    if metric is None or not example.answers:
        return
    needs, wants = METRICS[metric].needs, METRICS[metric].wants
    if not METRICS[metric].possible(example.answers):
        raise BadArtefact(
            f"{example.where}: no answer can be right by metric {metric}, which wants {wants}, got "
            f"{list(example.answers)!r:.60}; correct it or choose another metric"
        )
    if len(example.answers) < needs:
        raise BadArtefact(
            f"{example.where}: metric {metric} cannot give a full mark with {len(example.answers)} answer(s), it needs "
            f"those of {needs} people; add them or choose another metric"
        )


def _source(where: str, image: Any, folder: Path) -> Path | bytes | Image.Image:
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str) or not image:
        raise BadArtefact(f"{where}: an image is a path or a data URI, got {type(image).__name__}; write one of them")
    if image.startswith(DATA_URI):
        kind, _, payload = image.partition(",")
        try:
            return base64.b64decode(payload if kind.endswith(";base64") else "?", validate=True)
        except binascii.Error:
            raise BadArtefact(f"{where}: the data URI is not base64; write data:image/png;base64,…") from None
    if "://" in image[:12]:
        raise BadArtefact(f"{where}: {image[:60]!r} is an address, and nothing is downloaded; give a file")
    return folder / image


def _pixels_checked(where: str, source: Path | bytes | Image.Image) -> bytes:
    """A digest of an image that can be read; BadArtefact where it cannot."""
    try:
        seen = image_from(image_of_bytes(source, where) if isinstance(source, bytes) else source)
    except SaccadeError as e:
        raise BadArtefact(str(e) if str(e).startswith(where) else f"{where}: {e}") from None
    return hashlib.sha256(repr(seen.size).encode() + seen.tobytes()).digest()


def image_of_bytes(encoded: bytes, where: str) -> Image.Image:
    """Decode the bytes of a data URI; BadArtefact where they are no image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(encoded))
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as e:  # Pillow's decoders raise what they like
        raise BadArtefact(
            f"{where}: the data URI holds no image that Pillow can read ({type(e).__name__}); give a PNG or a JPEG"
        ) from None
