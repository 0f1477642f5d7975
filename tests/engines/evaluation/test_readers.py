"""Each benchmark's reader on files that were written by hand in its official layout."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engines.evaluation.asked import FORMAT_METRICS, Questions
from engines.evaluation.boxes import box_in
from engines.evaluation.data import Data
from engines.evaluation.metrics import METRICS
from engines.evaluation.readers import FORMATS, REFUSED
from graphs.errors import BadArtefact, UsageError

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(path: Path, size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, "PNG")


def encoded() -> str:
    held = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 30)).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def written(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document), "utf-8")
    return path


def read(name: str, data: Path, **more: Any) -> Data:
    return Questions(format=name, **more).read(str(data), {}, scored=False)


def vqav2(folder: Path) -> dict[str, Any]:
    for number in (42, 7):
        picture(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    questions = [{"image_id": n, "question": f"What is {n}?", "question_id": n * 10} for n in (42, 7)]
    people = [{"answer": "a cat" if i else "cat", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    annotations = [
        {"question_id": n * 10, "question_type": "what is", "image_id": n, "answers": people} for n in (42, 7)
    ]
    document = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "questions": questions}
    return {
        "data": written(folder / "questions.json", document),
        "annotations": written(folder / "annotations.json", {"annotations": annotations}),
        "images": folder / "val2014",
    }


def gqa(folder: Path) -> dict[str, Any]:
    picture(folder / "pictures" / "n161313.jpg")
    one = {"imageId": "n161313", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is."}
    two = {**one, "question": "What is it?", "answer": "square", "types": {"structural": "query"}}
    return {"data": written(folder / "q.json", {"201": one, "202": two}), "images": folder / "pictures"}


def textvqa(folder: Path) -> dict[str, Any]:
    picture(folder / "train_images" / "003a8ae2ef43b901.jpg")
    one = {
        "question_id": 34602,
        "question": "what brand is it?",
        "image_id": "003a8ae2ef43b901",
        "flickr_original_url": "https://farm2.example/1.jpg",
        "answers": ["dakota", "dakota digital"] * 5,
    }
    document = {"dataset_type": "val", "data": [one, {**one, "question_id": 34603}]}
    return {"data": written(folder / "TextVQA_0.5.1_val.json", document)}


def chartqa(folder: Path) -> dict[str, Any]:
    picture(folder / "png" / "41699051005347.png")
    one = {"imgname": "41699051005347.png", "query": "How many?", "label": "14"}
    return {"data": written(folder / "test_human.json", [one, {**one, "label": 3.5}]), "images": folder / "png"}


def docvqa(folder: Path) -> dict[str, Any]:
    picture(folder / "documents" / "ffbf0023_4.png")
    one = {
        "questionId": 49153,
        "question": "What is the date?",
        "question_types": ["table/list"],
        "image": "documents/ffbf0023_4.png",
        "docId": 14465,
        "answers": ["July 3", "july 3rd"],
        "data_split": "val",
    }
    return {"data": written(folder / "val_v1.0_withQT.json", {"data": [one, one]})}


def seed(folder: Path) -> dict[str, Any]:
    picture(folder / "SEED-Bench-image" / "1454426_2591111986")
    one = {
        "answer": "B",
        **{f"choice_{letter}": f"{letter} thing" for letter in "abcd"},
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "Which thing?",
        "question_id": "101669",
        "question_type_id": 5,
    }
    document = {"question_type": {"Instances Counting": 5}, "questions": [one, {**one, "question_id": "2"}]}
    return {"data": written(folder / "SEED-Bench.json", document), "images": folder / "SEED-Bench-image"}


def mmbench(folder: Path) -> dict[str, Any]:
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"
    rows = [
        head,
        f'241\t"Which ""one""?\nLook."\tA hint.\tcat\tdog\t\tnan\tB\tidentity\t{encoded()}\tx\ty\tnan\tdev',
        "1000241\tWhich one?\tnan\tdog\tcat\t\t\tA\tidentity\t241\tx\ty\tnan\tdev",
    ]
    return {"data": written(folder / "mmbench_dev_en.tsv", "\n".join(rows) + "\n")}


def mme(folder: Path) -> dict[str, Any]:
    picture(folder / "MME" / "OCR" / "0001.jpg")
    picture(folder / "MME" / "artwork" / "images" / "9.png")
    ask = "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
    written(folder / "MME" / "OCR" / "0001.txt", ask)
    written(folder / "MME" / "artwork" / "questions_answers_YN" / "9.txt", ask)
    return {"data": folder / "MME"}


def refcoco(folder: Path) -> dict[str, Any]:
    picture(folder / "train2014" / "COCO_train2014_000000380440.jpg", (200, 100))
    one = {
        "image": "data/refcoco/COCO_train2014_000000380440.jpg",
        "sent": "the left cup",
        "bbox": [20, 10, 100.0, 60],
        "height": 100,
        "width": 200,
    }
    lines = [json.dumps(one), "", json.dumps({**one, "sent": "the whole", "bbox": [0, 0, 200.4, 100]})]
    return {"data": written(folder / "refcoco_val.jsonl", "\n".join(lines)), "images": folder / "train2014"}


MADE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "vqav2": vqav2, "gqa": gqa, "textvqa": textvqa, "chartqa": chartqa, "docvqa": docvqa, "seed": seed,
    "mmbench": mmbench, "mme": mme, "refcoco": refcoco,
}  # fmt: skip
# The last question as it is asked, its answers, its category.
LAST: dict[str, tuple[str, tuple[str, ...], str]] = {
    "vqav2": (f"What is 7?{WORD}", ("cat", *["a cat"] * 9), "what is"),
    "gqa": (f"What is it?{WORD}", ("square",), "query"),
    "textvqa": (f"what brand is it?{WORD}", ("dakota", "dakota digital") * 5, ""),
    "chartqa": (f"How many?{WORD}", ("3.5",), ""),
    "docvqa": (f"What is the date?{WORD}", ("July 3", "july 3rd"), ""),
    "seed": (
        f"Which thing?\nA. a thing\nB. b thing\nC. c thing\nD. d thing{LETTER}", ("B", "b thing"), "Instances Counting",
    ),
    "mmbench": (f"Which one?\nA. dog\nB. cat{LETTER}", ("A", "dog"), "identity"),
    "mme": (f"Is it blue?{WORD}", ("No",), "artwork"),
    "refcoco": (
        "Please provide the bounding box coordinate of the region this sentence describes: the whole",
        ("[0.000000, 0.000000, 1.000000, 1.000000]",), "",
    ),
}  # fmt: skip


def test_the_tables_agree() -> None:
    assert set(MADE) == set(FORMATS) == set(LAST)
    assert {name: made.metric for name, made in FORMATS.items()} | dict.fromkeys(REFUSED, "") == FORMAT_METRICS
    assert all("arXiv" in made.source for made in FORMATS.values())


@pytest.mark.parametrize("name", MADE)
def test_questions_pictures_and_answers_are_read(tmp_path: Path, name: str) -> None:
    found = read(name, **MADE[name](tmp_path))
    assert len(found.examples) == (4 if name == "mme" else 2)
    last = found.examples[-1]
    assert (last.question, last.answers, last.category) == LAST[name]
    for example in found.examples:
        assert example.images[0].size == ((200, 100) if name == "refcoco" else (20, 10))
        assert METRICS[FORMATS[name].metric].value(example.answers[0], example.answers) == 1
    if name == "mmbench":
        assert found.examples[0].question.startswith('A hint.\nWhich "one"?\nLook.\nA. cat\nB. dog\nAnswer')
    if name == "mme":
        assert [e.group for e in found.examples] == ["OCR/0001"] * 2 + ["artwork/9"] * 2
    if name == "refcoco":
        assert box_in(found.examples[0].answers[0]) == pytest.approx((0.1, 0.1, 0.5, 0.6))


def changed(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text("utf-8")), "utf-8")


BAD: list[tuple[str, Callable[[str], str], str]] = [
    ("vqav2", lambda t: t.replace('"image_id": 7', '"image_id": 8'), "no image at"),
    ("vqav2", lambda t: t.replace('"question_id": 70', '"question_id": 71'), "has no answers to this question"),
    ("vqav2", lambda t: t.replace('"What is 7?"', '""'), "question is missing"),
    ("gqa", lambda t: t.replace('"square"', "[]"), "answer is missing or not text"),
    ("textvqa", lambda t: t[: t.rindex('"answers"')] + '"answers": "dakota"}]}', "must be a list of texts"),
    ("textvqa", lambda t: t[: t.rindex('"answers"')] + '"answers": ["a", "b"]}]}', "those of 4 people"),
    ("chartqa", lambda t: t.replace('{"imgname"', '3, {"imgname"', 1).replace("3, {", '{"q": 1}, {', 1), "imgname"),
    ("docvqa", lambda t: t[: t.rindex('"answers"')] + '"answers": []}]}', "answers must be texts"),
    (
        "seed",
        lambda t: t[: t.rindex('"answer": "B"')] + t[t.rindex('"answer": "B"') :].replace('"B"', '"E"'),
        "not among",
    ),
    ("seed", lambda t: t[::-1].replace('"egami"', '"oediv"', 1)[::-1], "is about a video"),
    ("mmbench", lambda t: t.replace("\t241\t", "\t999\t"), "nor the index of a row above"),
    ("mmbench", lambda t: t.replace("\t\t\tA\tid", "\t\t\tC\tid"), "'C' is not among the options A, B"),
    ("mmbench", lambda t: t.replace("\t\t\tA\tid", "\t\t\t\tid"), "there is no answer"),
    ("refcoco", lambda t: t.replace("[0, 0, 200.4, 100]", "[0, 0, 300, 100]"), "does not lie in an image"),
    ("refcoco", lambda t: t.replace("[0, 0, 200.4, 100]", "[0, 0]"), "four numbers"),
    ("refcoco", lambda t: t[:-3], "not JSON"),
    ("refcoco", lambda t: t.replace('"width": 200', '"width": 0', 1), "does not lie in an image"),
    ("refcoco", lambda t: t.replace('"width": 200', '"width": 1' + 400 * "0", 1), "four numbers"),
    ("vqav2", lambda t: t.replace('"image_id": 7', '"image_id": "²"'), "is not a number"),
    ("gqa", lambda t: t.replace('"imageId": "', '"imageId": "' + 300 * "a", 1), "cannot be a file's name"),
]


@pytest.mark.parametrize(("name", "change", "said"), BAD)
def test_a_bad_entry_is_named_and_can_be_left_out(
    tmp_path: Path, name: str, change: Callable[[str], str], said: str
) -> None:
    files = MADE[name](tmp_path)
    changed(files["data"], change)
    with pytest.raises(BadArtefact, match=r"(entry|line|row|question) \d+") as caught:
        read(name, **files)
    assert said in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    found = read(name, **files, skip_bad=True)
    assert len(found.bad) == 1
    assert said in found.bad[0]


def test_a_bad_line_of_mme_is_named(tmp_path: Path) -> None:
    files = mme(tmp_path)
    changed(tmp_path / "MME" / "OCR" / "0001.txt", lambda text: text.replace("\tNo", "\tMaybe"))
    with pytest.raises(BadArtefact, match="line 2: the line is not a question, a tab, and Yes or No"):
        read("mme", **files)
    assert len(read("mme", **files, skip_bad=True).examples) == 3


@pytest.mark.parametrize("name", [n for n in MADE if n != "mme"])
@pytest.mark.parametrize("content", ["", "[", "{}", "[]", '{"data": 3}'])
def test_a_file_of_another_form_is_refused(tmp_path: Path, name: str, content: str) -> None:
    files = MADE[name](tmp_path)
    files["data"].write_text(content)
    with pytest.raises(BadArtefact):
        read(name, **files, skip_bad=True)


def test_what_is_not_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="judge"):
        read("mmvet", tmp_path)
    with pytest.raises(BadArtefact, match="pickle"):
        read("refcoco", tmp_path / "refs(unc).p")
    with pytest.raises(BadArtefact, match="not a folder"):
        read("mme", tmp_path / "nothing")
    with pytest.raises(BadArtefact, match="is missing"):
        read("gqa", tmp_path / "nothing.json")
    files = gqa(tmp_path)
    with pytest.raises(UsageError, match="--annotations has no effect with --format gqa"):
        read("gqa", **files, annotations=tmp_path)
    with pytest.raises(UsageError, match="--images has no effect without --format"):
        Questions(images=tmp_path).read("glyphs", {}, scored=False)


def test_a_split_without_answers_and_another_prompt(tmp_path: Path) -> None:
    files = vqav2(tmp_path)
    found = read("vqav2", files["data"], images=files["images"], prompt="Q: {question} A:")
    assert not found.answered
    assert found.examples[0].question == "Q: What is 42? A:"
    with pytest.raises(UsageError, match="no place for the question"):
        read("vqav2", files["data"], images=files["images"], prompt="Q:")
    assert len(read("vqav2", **files, questions=1).examples) == 1
    assert Questions(format="docvqa").worth == "anls"
    assert Questions(format="docvqa", metric="contains").worth == "contains"
