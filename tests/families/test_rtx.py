"""Each family's decoder, lowered, equals its canonical one and becomes an engine without a GPU; kernels: test_pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from engines.bundles.golden import cases_of, fed, told
from engines.processing import Processor
from engines.sessions.session import open_session
from engines.trt.bounds import Bounds, Room, profiles_of
from engines.trt.engine import engine_from_onnx
from engines.trt.photos import MOST_ROWS, PHOTOS, TEXT_ROWS, Photo, misfits_in_words, photos_seen, room_for
from engines.trt.reading import reading_from
from graphs.compare import compare
from graphs.lowering import Lowering
from graphs.lowering.export import LoweredExport, lowered_export
from tests.families.conftest import Sample

pytest.importorskip("tensorrt_rtx")
BOUNDS = Bounds(max_prompt=256, max_length=256, max_tail=4, max_images=4)


def test_the_decoder_builds_with_its_masks_and_caches(sample: Sample, tmp_path: Path) -> None:
    lowered = lower(sample, tmp_path)
    answer = build(lowered, "decoder")
    reading = reading_from(answer["reading"])
    assert answer["bytes"] == lowered.file("decoder").with_suffix(".engine").stat().st_size > 0
    assert reading.served == dict.fromkeys(lowered.ops["decoder"], "body")
    assert set(lowered.ops["decoder"].values()) == {"ReceivedInCache", "KeepTopK", "CompactRows"}
    assert reading.unused == ()
    segments = lowered.spec.plan.segments(lowered.spec.language.layers)
    wanted = [(f"visible_{j}", f"past_k_{i}", "KV_CACHE_UPDATE") for j, layers in enumerate(segments) for i in layers]
    assert [(a.mask, a.cache, a.grown) for a in reading.attentions] == wanted


def test_every_stage_equals_the_canonical_one(sample: Sample, tmp_path: Path) -> None:
    lowered = lower(sample, tmp_path)
    for case in cases_of(sample.onnx.folder, sample.onnx.spec):
        file = sample.onnx.spec.stages[case.stage].file
        outputs = list(case.outputs)
        wanted = open_session(sample.onnx.folder / file, threads=1).run(case.inputs, host=outputs)
        got = open_session(lowered.folder / file, threads=1).run(fed(case, lowered.spec), host=outputs)
        got = told(case, got)
        for name, value in wanted.items():
            assert compare(name, got[name], value, 1e-6).agrees, (case.stage, case.name, name)


def test_every_stage_written_out_for_tensorrt_10_3_equals_the_canonical_one(sample: Sample, tmp_path: Path) -> None:
    old = lowered_export(sample.onnx.folder, sample.onnx.spec, tmp_path, Lowering("float32", parser="10.3"))
    for case in cases_of(sample.onnx.folder, sample.onnx.spec):
        got = open_session(old.file(case.stage), threads=1).run(fed(case, old.spec), host=list(case.outputs))
        got = told(case, got)
        for name, value in case.outputs.items():
            assert compare(name, got[name], value, 1e-4).agrees, (case.stage, case.name, name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vision", "embed"])
def test_the_other_stages_build(sample: Sample, tmp_path: Path, stage: str) -> None:
    lowered = lower(sample, tmp_path)
    reading = reading_from(build(lowered, stage)["reading"])
    assert reading.unused == ()
    assert set(lowered.ops[stage].values()) <= {"BlockAttention"}


def lower(sample: Sample, out: Path) -> LoweredExport:
    return lowered_export(sample.onnx.folder, sample.onnx.spec, out, Lowering("float32", capacity=BOUNDS.max_length))


def build(lowered: LoweredExport, stage: str) -> dict[str, object]:
    profiles = profiles_of(stage, lowered.spec, BOUNDS.fitted(lowered.spec, None))
    file = lowered.file(stage)
    return engine_from_onnx(file, file.with_suffix(".engine"), sms=[89], profiles=profiles, ops=lowered.ops[stage])


def test_photos_that_do_not_fit_are_told(sample: Sample) -> None:
    spec, folder = sample.onnx.spec, sample.onnx.folder
    wide = Bounds(256, 256, 16, 4, 100)
    seen = Processor(folder, spec).look(Image.new("RGB", PHOTOS[0]))
    tokens, fits = sum(seen.tokens), sum(seen.tokens) + TEXT_ROWS <= 256
    photos = photos_seen(folder, spec)
    lines = misfits_in_words(photos, spec, wide)
    assert any(f"640×480 makes {tokens} visual tokens" in line for line in lines) is not fits
    tiles = len(seen.feeds["pixel_values"])
    if spec.grid.kind in ("tiles", "anyres") and tiles > 1:
        few = misfits_in_words(photos, spec, replace(wide, max_images=tiles - 1))
        assert f"in {tiles} tiles" in few[0]
        assert "--max-images" in few[0]


def test_there_is_room_for_each_photo_that_fits_whichever_is_larger() -> None:
    """With LLaVA-NeXT's pinpoints the wider photo takes fewer rows, for its padding is cut off."""
    photos = [Photo(640, 480, 2340, 5, {}), Photo(1920, 1080, 1948, 3, {}), Photo(1, 1, 9000, 12, {})]
    assert room_for(photos) == Room(2340 + TEXT_ROWS, 5)
    assert room_for(photos[2:]) == Room()


def test_a_photo_fits_unasked(sample: Sample) -> None:
    spec, folder = sample.onnx.spec, sample.onnx.folder
    long = spec.model_copy(update={"language": spec.language.model_copy(update={"max_positions": 32768})})
    photos = photos_seen(folder, long)
    room = room_for(photos)
    bounds = Bounds().fitted(long, None, room)
    misfits = misfits_in_words(photos, long, bounds)
    fitting = [photo for photo in photos if photo.rows <= MOST_ROWS]
    assert fitting
    assert len(misfits) == len(photos) - len(fitting)
    assert (bounds.max_length or 0) >= (bounds.max_prompt or 0) + 1024
    short = Bounds().fitted(long, 1024, room)
    assert (short.max_prompt, short.max_length) == (1024, bounds.max_length), "caches have one length, whatever ranks"


def test_a_photo_that_fills_the_bounds_fits(sample: Sample) -> None:
    assert room_for([Photo(640, 480, MOST_ROWS - TEXT_ROWS, 0, {})]) == Room(MOST_ROWS, 0)
    assert room_for([Photo(640, 480, MOST_ROWS - TEXT_ROWS + 1, 0, {})]) == Room()
    photo, spec = Photo(640, 480, 100, 0, {}), sample.onnx.spec
    assert misfits_in_words([photo], spec, replace(BOUNDS, max_prompt=100 + TEXT_ROWS).fitted(spec, None)) == []
    told = misfits_in_words([photo], spec, replace(BOUNDS, max_prompt=99 + TEXT_ROWS).fitted(spec, None))
    assert "makes 100 visual tokens" in told[0]
