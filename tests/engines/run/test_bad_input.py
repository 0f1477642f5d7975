"""Whatever a user can hand in wrongly ends in one sentence and its exit code, before any graph is run."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from engines.cascade import Cascade
from engines.generate import longest_answer
from engines.images import image_from
from engines.processing import Processor
from engines.sampling import Options
from engines.sessions import session
from engines.talk.memory import Memory
from engines.talk.messages import asked
from graphs.errors import BackendMissing, BadArtefact, OperationFailed, SaccadeError, UsageError
from graphs.spec import spec_from_folder
from tests.engines.run.conftest import TinyPair, picture_of

QUESTION = "what colour is the 3 ?"


def bad_image(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        picture_of(0).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "truncated-jpeg":
        path = folder / "cut.jpg"
        picture_of(0).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind in ("bomb", "small bomb"):
        # A PNG header that claims more pixels than it holds.
        side = 20_000 if kind == "bomb" else 10_000
        Image.new("1", (side, side)).save(path)
    elif kind == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "strip":
        Image.new("RGB", (4, 4000)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "no image at"),
        ("text", "not an image that Pillow can read"),
        ("empty", "not an image that Pillow can read"),
        ("folder", "is a folder"),
        ("truncated", "broken or cut short"),
        ("truncated-jpeg", "broken or cut short"),
        ("bomb", "decompression bomb"),
        ("small bomb", "decompression bomb"),
        ("1x1", "1×1"),
        ("strip", "200 times"),
    ],
)
def test_a_bad_image_is_refused(tmp_path: Path, kind: str, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadArtefact, match=words):
            image_from(bad_image(kind, tmp_path))


def test_a_bad_image_ends_run_with_code_3(
    saccade_cli: Callable[..., object], tiny_bundle: Path, tmp_path: Path
) -> None:
    told = saccade_cli("run", tiny_bundle, "--image", bad_image("text", tmp_path), QUESTION)
    assert (told.code, told.stdout) == (3, "")
    assert len(told.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "picture", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), 7, None]
)
def test_what_is_no_picture_is_refused(picture: object) -> None:
    with pytest.raises(UsageError):
        image_from(picture)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("i.tif" if mode == "CMYK" else "i.png")
    Image.new(mode, (5, 7)).save(path)
    for picture in (path, str(path), Image.new(mode, (5, 7))):
        image = image_from(picture)
        assert (image.mode, image.size) == ("RGB", (5, 7))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    grey = Image.new("RGBA", (4, 4), (40, 40, 40, 255))
    grey.putpixel((1, 2), (10, 10, 10, 0))
    seen = grey.quantize(4) if mode == "P" else grey.convert(mode)
    path = tmp_path / "i.png"
    seen.save(path)
    for picture in (seen, path):
        pixels = np.asarray(image_from(picture))
        assert pixels[2, 1].tolist() == [255, 255, 255]
        assert pixels[0, 0].tolist() == [40, 40, 40]


def test_a_turned_photo_is_turned_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    assert image_from(path).size == (4, 8)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turn_is_that_of_pillow_whatever_else_the_tags_say(tmp_path: Path, turn: int) -> None:
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[0x0112] = turn
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    Image.fromarray(grey).save(path, exif=exif, quality=100)
    wanted = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(np.asarray(image_from(path)), np.asarray(wanted))
    exif[0x010E] = "said"
    Image.fromarray(grey).save(path, exif=exif, quality=100)
    data = path.read_bytes()
    tag = data.index(b"Exif") + 17  # ImageDescription becomes XResolution, which Pillow cannot write as a text
    assert data[tag - 1 : tag + 1] == b"\x01\x0e"
    path.write_bytes(data[:tag] + b"\x1a" + data[tag + 1 :])
    assert np.array_equal(np.asarray(image_from(path)), np.asarray(wanted))


def test_sixteen_bits_of_grey_are_eight(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 300], [40_000, 65_535]], np.uint16)).save(path)
    for picture in (path, Image.open(path)):
        assert np.asarray(image_from(picture))[:, :, 0].tolist() == [[0, 1], [156, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused(mode: str) -> None:
    with pytest.raises(BadArtefact, match=f"mode {mode}"):
        image_from(Image.new(mode, (5, 7)))


@pytest.mark.parametrize(
    "picture", [np.zeros((5, 7), np.uint8), np.zeros((5, 7, 3), np.uint8), np.zeros((5, 7, 4), np.uint8)]
)
def test_arrays_are_pictures(picture: np.ndarray) -> None:
    assert image_from(picture).size == (7, 5)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("what is <image> ?", "stands for the image"),
        ("caf\udce9 ?", "not valid UTF-8 text"),
        ("red " * 300, r"3\d\d tokens long \(64 of images\).* 256 positions"),
    ],
)
def test_a_bad_question_is_refused_before_anything_runs(tiny_pair: TinyPair, question: str, words: str) -> None:
    pair = tiny_pair.cascade()
    with pytest.raises(UsageError, match=words):
        pair.ask(picture_of(0), question)
    assert pair.large
    assert pair.large.opened == frozenset()


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), float("inf"), (0.5, 0.2), ()])
def test_a_bad_keep_is_refused_before_the_small_model_runs(tiny_pair: TinyPair, keep: object) -> None:
    pair = tiny_pair.cascade()
    with pytest.raises(UsageError):
        pair.ask(picture_of(0), QUESTION, keep=keep)  # type: ignore[arg-type]
    assert pair.small
    assert pair.small.opened == frozenset()


def test_what_would_do_nothing_is_refused(tiny_pair: TinyPair) -> None:
    pair, alone = tiny_pair.cascade(), Cascade(None, tiny_pair.model("alone"))
    with pytest.raises(UsageError, match="a threshold has no effect"):
        alone.ask(picture_of(0), QUESTION, threshold=0.5)
    with pytest.raises(UsageError, match="prunes by no guidance"):
        alone.ask(picture_of(0), QUESTION, guidance=np.zeros(64, np.float32))
    with pytest.raises(UsageError, match="seed is -1"):
        pair.ask(picture_of(0), QUESTION, temperature=1.0, seed=-1)
    assert alone.large
    assert alone.large.opened == frozenset()


def test_a_numpy_share_is_a_share(cascade: Cascade) -> None:
    given, wanted = (
        cascade.ask(picture_of(0), QUESTION, keep=keep, threshold=1, max_new_tokens=1)
        for keep in (np.float32(0.5), 0.5)
    )
    assert given.keep == wanted.keep == (0.5,)


def test_an_answer_ends_where_an_engine_does(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of its caches, and of the pass that scores the answer."""
    model = tiny_pair.model("small")
    prompt = Memory(model).prompt((asked(QUESTION, picture_of(0)),))
    bounds = {"past_k_0": (1, 1, len(prompt) + 6, 8), "tail": (9,)}
    monkeypatch.setattr(type(model.session("decoder")), "largest", lambda _, name: bounds[name])
    assert longest_answer(model, prompt) == 7
    bounds["tail"] = (4,)
    assert longest_answer(model, prompt) == 4
    assert len(model.generate(prompt, Options(max_new_tokens=20)).finish().tokens) <= 4


@pytest.mark.parametrize("guidance", [np.zeros(63, np.float32), np.zeros((8, 8), np.float32), np.full(64, np.nan)])
def test_a_guidance_that_does_not_fit_is_refused(cascade: Cascade, guidance: np.ndarray) -> None:
    looked = cascade.look(picture_of(0), QUESTION, max_new_tokens=1)
    with pytest.raises(UsageError, match="guidance"):
        cascade.answer_large(looked, guidance=guidance)


def test_an_answer_stops_at_the_last_position(cascade: Cascade) -> None:
    looked = cascade.look(picture_of(0), "red " * 180, max_new_tokens=10_000)
    assert len(looked.prompt) + len(looked.tokens) <= 256
    assert looked.stopped in ("length", "end")


def test_a_large_model_without_its_small_one_says_so(tiny_pair: TinyPair) -> None:
    with pytest.raises(UsageError, match="small model"):
        Cascade.from_exports(tiny_pair.exports["large"])
    alone = Cascade(None, tiny_pair.model("large"))
    with pytest.raises(UsageError, match="none was given"):
        alone.ask(picture_of(0), QUESTION, max_new_tokens=1)
    with pytest.raises(UsageError, match="no small model"):
        alone.look(picture_of(0), QUESTION)


def test_a_small_model_that_gives_no_guidance_is_refused(tiny_pair: TinyPair) -> None:
    with pytest.raises(UsageError, match="gives no guidance"):
        Cascade(tiny_pair.model("large"), None)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer.json", "{", "AutoTokenizer cannot read"),
        ("tokenizer_config.json", {"model_max_length": ""}, "tokenizer of .* cannot read the question"),
        ("preprocessor_config.json", "[]", "AutoImageProcessor cannot read"),
        ("chat_template.jinja", "{{ nothing.here }}", "chat template of .* fails"),
        ("chat_template.jinja", "{% if %}", "chat template of .* fails"),
        ("chat_template.jinja", "{{ raise_exception('no images') }}", "no images"),
        ("chat_template.jinja", "hello", "writes 0 placeholders"),
        ("chat_template.jinja", None, "no chat template"),
        ("preprocessor_config.json", {"crop_size": {"height": 32, "width": 32}}, r"\[1, 3, 32, 32\].*, 3, 64, 64\]"),
    ],
)
def test_a_broken_processor_folder_is_refused(
    tiny_pair: TinyPair, tmp_path: Path, file: str, text: object, words: str
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(tiny_pair.exports["small"] / "processor", folder / "processor")
    path = folder / "processor" / file
    if text is None:
        path.unlink()
    elif isinstance(text, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | text))
    else:
        path.write_text(str(text))
    processor = Processor(folder, spec_from_folder(tiny_pair.exports["small"]))
    with pytest.raises(BadArtefact, match=words):
        _ = processor.prompt((asked(QUESTION, picture_of(0)),), [processor.look(picture_of(0))])


def test_a_missing_processor_folder_is_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(BadArtefact, match="processor is missing"):
        Processor(tmp_path, spec_from_folder(tiny_pair.exports["small"]))


def test_a_missing_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "engines.sessions.ort_session", raising=False)
    with pytest.raises(BackendMissing, match=r"saccade\[cpu\]"):
        session.open_session(tmp_path / "vision.onnx")


def test_an_unknown_target_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cpu"):
        session.open_session(tmp_path / "vision.onnx", target="abacus")


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArtefact, match="missing"):
        session.open_session(tmp_path / "vision.onnx")
    (tmp_path / "vision.onnx").write_text("no graph")
    with pytest.raises(BadArtefact, match="cannot open"):
        session.open_session(tmp_path / "vision.onnx")


def test_a_graph_fed_wrongly_says_what_is_missing(cascade: Cascade) -> None:
    assert cascade.small
    with pytest.raises(OperationFailed, match="pixel_values"):
        cascade.small.session("vision").run({"pixels": np.zeros(1, np.float32)}, host=("visual_embeds",))
    with pytest.raises(OperationFailed, match="ONNX Runtime failed in vision"):
        cascade.small.session("vision").run(
            {"pixel_values": np.zeros((1, 3, 5, 5), np.float32)}, host=("visual_embeds",)
        )


def test_nan_logits_are_an_error(cascade: Cascade) -> None:
    from engines.decoder import Chunk

    assert cascade.small
    width = cascade.small.spec.language.width
    chunk = Chunk(np.full((1, 3, width), np.nan, np.float32), np.zeros(3, bool))
    with pytest.raises(OperationFailed, match="not numbers"):
        cascade.small.decoder.run(chunk)


def test_every_error_is_one_sentence() -> None:
    assert str(SaccadeError("two\n  lines")) == "two lines"
