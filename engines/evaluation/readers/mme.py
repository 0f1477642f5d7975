"""MME: two questions a picture, one to be answered with yes and one with no, in a text file beside the picture.

Source: MME_Benchmark_release_version (BradyFU/Awesome-Multimodal-Large-Language-Models): CATEGORY/NAME.txt, NAME.jpg,
or CATEGORY/questions_answers_YN/NAME.txt and CATEGORY/images/NAME.jpg; a line is the question, a tab, Yes or No. The
words "Please answer yes or no." make way for the prompt, as in lmms-eval.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from engines.evaluation.readers.files import Files, Item, Record, image_named, items, lines_of
from graphs.errors import BadArtefact

REMEDY = "give the folder of MME's categories"
ENDINGS = (".jpg", ".png", ".jpeg")
OWN_PROMPT = "Please answer yes or no."


def read(files: Files) -> Iterator[Item]:
    """Yield the questions, category by category; those of one picture are a group."""
    if not files.data.is_dir():
        raise BadArtefact(f"{files.data} is not a folder; {REMEDY}")
    for category in sorted(path for path in files.data.iterdir() if path.is_dir()):
        inner = category / "questions_answers_YN"
        pictures = category / "images" if inner.is_dir() else category
        for path in sorted((inner if inner.is_dir() else category).glob("*.txt")):
            yield from _questions(path, pictures, category.name)


def _questions(path: Path, pictures: Path, category: str) -> Iterator[Item]:
    image = image_named(pictures, *(f"{path.stem}{ending}" for ending in ENDINGS))
    shared = {"image": image, "category": category, "group": f"{category}/{path.stem}"}
    yield from items(lines_of(path, REMEDY), lambda line: {**shared, **_asked(line)})


def _asked(line: str) -> Record:
    question, tab, answer = line.strip().rpartition("\t")
    if not tab or answer.strip().rstrip(".").lower() not in ("yes", "no"):
        raise BadArtefact(f"the line is not a question, a tab, and Yes or No, but {line.strip()!r:.60}; correct it")
    return {"question": question.replace(OWN_PROMPT, "").strip(), "answer": answer.strip().rstrip(".")}
