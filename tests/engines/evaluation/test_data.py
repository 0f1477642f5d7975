from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engines.evaluation.data import How, data_from_file, data_from_records
from engines.evaluation.metrics import METRICS
from graphs.errors import BadArtefact

GOOD = {"image": "red.png", "question": "what colour ?", "answers": ["red", "crimson"], "id": 7}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    (tmp_path / "sub").mkdir()
    return tmp_path


def written(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def uri(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def test_a_line_is_a_path_a_data_uri_several_images_or_none(folder: Path) -> None:
    png = (folder / "red.png").read_bytes()
    lines = [
        GOOD,
        {**GOOD, "image": str(folder / "red.png")},
        {**GOOD, "image": uri(png)},
        {**GOOD, "image": ["red.png", uri(png)]},
        {"question": " what is 2 ? ", "answer": "2"},
    ]
    read = data_from_file(written(folder, lines[0], "", *lines[1:]))
    assert [len(e.images) for e in read.examples] == [1, 1, 1, 2, 0]
    assert read.examples[0].images[0].getpixel((0, 0)) == (255, 0, 0)
    assert read.examples[0].answers == ("red", "crimson")
    assert (read.examples[4].question, read.examples[4].answers) == ("what is 2 ?", ("2",))
    assert read.examples[1].where.endswith("line 3")
    same = {e.digest for e in read.examples[:3]}
    assert len(same) == 1  # the same question, wherever its pixels lie
    assert len({e.digest for e in read.examples}) == 3
    assert (read.answered, read.bad) == (True, ())


def test_the_digest_is_of_content_and_order(folder: Path) -> None:
    def digest(*lines: dict[str, Any]) -> str:
        return data_from_file(written(folder, *lines)).digest

    other = {**GOOD, "question": "which ?"}
    whole = digest(GOOD, other)
    assert whole == digest({**GOOD, "id": 8}, other)
    changed = [digest(other, GOOD), digest(GOOD), digest({**GOOD, "answers": ["red"]}, other)]
    Image.new("RGB", (8, 6), (254, 0, 0)).save(folder / "red.png")
    assert whole not in (*changed, digest(GOOD, other))


def test_an_image_of_a_data_uri_is_turned_as_it_says(folder: Path) -> None:
    image, tag = Image.new("RGB", (8, 6)), Image.Exif()
    tag[0x0112] = 6  # a quarter turn
    encoded = io.BytesIO()
    image.save(encoded, "PNG", exif=tag)
    read = data_from_file(written(folder, {**GOOD, "image": uri(encoded.getvalue())}))
    assert read.examples[0].images[0].size == (6, 8)


BAD: list[tuple[object, str]] = [
    ("{", "not JSON"),
    ("[1]", "is list, not an object"),
    ({**GOOD, "image": "blue.png"}, "no image at"),
    ({**GOOD, "image": "torn.png"}, "torn.png is not an image"),
    ({**GOOD, "image": "sub"}, "is a folder"),
    ({**GOOD, "image": 3}, "got int"),
    ({**GOOD, "image": "https://a.b/c.png"}, "nothing is downloaded"),
    ({**GOOD, "image": "data:image/png;base64,??"}, "not base64"),
    ({**GOOD, "image": "data:image/png,abc"}, "not base64"),
    ({**GOOD, "image": uri(b"no image")}, "no image that Pillow can read"),
    ({**GOOD, "question": " "}, "no question"),
    ({"image": "red.png", "answers": ["red"]}, "no question"),
    ({**GOOD, "answers": []}, "answers must be texts"),
    ({**GOOD, "category": [3]}, "category must be a text or a number"),
    ({**GOOD, "answers": [3]}, "quote numbers"),
    ({**GOOD, "answer": "red"}, "both answer and answers"),
    ({"image": "red.png", "question": "what ?"}, "no answers, but"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_a_bad_line_is_named_and_can_be_left_out(folder: Path, line: object, said: str) -> None:
    path = written(folder, GOOD, line, GOOD)
    with pytest.raises(BadArtefact, match="line 2") as caught:
        data_from_file(path)
    assert said in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    read = data_from_file(path, How(skip_bad=True))
    assert [e.where.rpartition(" ")[2] for e in read.examples] == ["1", "3"]
    assert len(read.bad) == 1
    assert said in read.bad[0]


def test_an_answer_that_no_model_can_reach_is_bad(folder: Path) -> None:
    few = written(folder, {**GOOD, "answers": ["red"] * 3})
    with pytest.raises(BadArtefact, match="needs those of 4 people"):
        data_from_file(few, How(metric="vqa"))
    assert data_from_file(few, How(metric="exact")).answered
    assert data_from_file(written(folder, {**GOOD, "answers": ["red"] * 4}), How(metric="vqa")).answered


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(folder: Path, content: str) -> None:
    with pytest.raises(BadArtefact, match="no lines"):
        data_from_file(written(folder, content), How(skip_bad=True))


def test_a_file_of_bad_lines_a_missing_and_a_binary_one_are_refused(folder: Path) -> None:
    with pytest.raises(BadArtefact, match="all bad"):
        data_from_file(written(folder, "{", "{"), How(skip_bad=True))
    with pytest.raises(BadArtefact, match="is missing"):
        data_from_file(folder / "nothing.jsonl")
    (folder / "data.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadArtefact, match="UTF-8"):
        data_from_file(folder / "data.jsonl")


def test_only_the_first_questions_are_read(folder: Path) -> None:
    assert len(data_from_file(written(folder, GOOD, GOOD, "{"), How(limit=2)).examples) == 2


def test_the_built_in_questions_are_examples() -> None:
    from glyphs.data import held_out_records

    read = data_from_records(held_out_records(3), "glyphs", How("exact"))
    assert [len(e.images) for e in read.examples] == [1, 1, 1]
    assert read.examples[0].images[0].size == (96, 96)
    assert read.digest == data_from_records(held_out_records(3), "glyphs").digest


def test_a_line_may_hold_what_is_a_line_break_to_others(folder: Path) -> None:
    """JSON allows U+2028 and U+0085 inside strings; str.splitlines splits there."""
    lines = [{"image": "red.png", "question": f"which{mark}digit ?", "answers": ["1"]} for mark in "\u2028\u0085"]
    path = folder / "marks.jsonl"
    path.write_text("\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8", newline="")
    assert [example.question for example in data_from_file(path).examples] == [line["question"] for line in lines]


def test_a_mark_of_unicode_and_keys_of_ones_own_do_not_matter(folder: Path) -> None:
    plain = written(folder, {**GOOD, "category": "colour"})
    marked = folder / "marked.jsonl"
    marked.write_text("\ufeff" + json.dumps({**GOOD, "category": "colour", "group": "mine"}))
    [one], [other] = (data_from_file(path).examples for path in (plain, marked))
    assert (one.digest, one.category, one.group) == (other.digest, other.category, "")


def test_a_person_who_said_nothing_is_one_of_ten(folder: Path) -> None:
    path = written(folder, {**GOOD, "answers": ["yes"] * 9 + [""]})
    [example] = data_from_file(path, How("vqa")).examples
    assert example.answers == ("yes",) * 9 + ("",)
    assert METRICS["vqa"].value("yes", example.answers) == 1
    assert METRICS["vqa"].value("", example.answers) == pytest.approx(0.3), "as the official code counts"
    for how in (How("exact"), How()):
        with pytest.raises(BadArtefact, match="texts that are not empty"):
            data_from_file(path, how)
    with pytest.raises(BadArtefact, match="texts that are not empty"):
        data_from_file(written(folder, {**GOOD, "answers": [""] * 10}), How("vqa"))


def test_each_question_once_is_in_the_order_of_first_places(folder: Path) -> None:
    other = {**GOOD, "question": "which ?"}
    data = data_from_file(written(folder, GOOD, other, GOOD))
    assert [e.question for e in data.once().examples] == [GOOD["question"], "which ?"]
    assert data.once().digest == data_from_file(written(folder, GOOD, other)).digest
