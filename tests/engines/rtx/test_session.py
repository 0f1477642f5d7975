"""The TensorRT session through stand-ins for CUDA and TensorRT: a cascade's answers are those of the CPU target."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from engines.bundles.manifest import EngineEntry
from engines.cascade import Cascade
from engines.model import Model
from engines.trt import device, running
from engines.trt.bounds import Bounds, profiles_of
from engines.trt.flavour import RTX
from engines.trt.session import TrtSession
from graphs.errors import BadArtefact, OperationFailed
from tests.engines.rtx import stand_in
from tests.engines.rtx.conftest import Exports, Lower

BOUNDS = Bounds(64, 96, 32, 16, 2)
QUESTION = "what colour is the 3 ?"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Cuda]:
    made = stand_in.Cuda()
    monkeypatch.setattr(device, "cuda_runtime", lambda: made)
    monkeypatch.setattr("plugins.trt.load", lambda module: stand_in)
    monkeypatch.setattr("plugins.registry.register", lambda trt, sms=(): ())
    monkeypatch.setattr(running, "reasons", lambda engines=(): [])
    yield made
    gc.collect()


def engines_of(lower: Lower, exports: Exports, role: str, out: Path, precision: str = "float32") -> Model:
    """A model's folder as a bundle has it, with stand-in engines."""
    lowered = lower(role, precision)
    (out / "rtx").mkdir(parents=True)
    shutil.copytree(exports[role] / "processor", out / "processor")
    stages = {}
    for name, stage in lowered.spec.stages.items():
        file = str(lowered.file(name))
        stand_in.PROFILES[file] = profiles_of(name, lowered.spec, BOUNDS)
        (out / "rtx" / f"{name}.engine").write_text(file)
        stages[name] = stage.model_copy(update={"file": f"rtx/{name}.engine"})
    spec = lowered.spec.model_copy(update={"stages": stages})
    (out / "rtx" / "spec.json").write_text(spec.dumps())
    return Model(out, spec, "rtx")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


def test_a_cascade_on_engines_answers_as_on_the_cpu(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path
) -> None:
    models = {role: engines_of(lower, exports, role, tmp_path / role) for role in ("small", "large")}
    ours = Cascade(models["small"], models["large"])
    wanted = Cascade.from_exports(exports["small"], exports["large"], threads=1)
    for threshold in (1.0, 0.0):
        talks = [c.chat(threshold=threshold, keep=0.3, max_new_tokens=5) for c in (ours, wanted)]
        for question, shown in ((QUESTION, [picture(1)]), ("which digit ?", []), ("red ?", [picture(2)])):
            got, want = (talk.ask(question, shown) for talk in talks)
            assert got.tokens == want.tokens
            assert got.guidance is not None
            assert want.guidance is not None
            np.testing.assert_allclose(got.guidance, want.guidance, atol=1e-4)
            if want.kept is not None:
                assert got.kept is not None
                assert [k.tolist() for k in got.kept] == [k.tolist() for k in want.kept]
    assert cuda.streams == 2
    decoders = [model.session("decoder") for model in models.values()]
    assert {profile for decoder in decoders for profile in cast(TrtSession, decoder)._contexts} == {0, 1}


def test_only_what_is_asked_for_comes_to_the_host_and_what_is_dropped_is_freed(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path
) -> None:
    model = engines_of(lower, exports, "large", tmp_path / "large")
    cascade = Cascade(None, model)
    scores = np.random.default_rng(0).random(16, dtype=np.float32)
    cascade.ask(picture(1), QUESTION, guidance=scores, max_new_tokens=3)
    gc.collect()
    before, down = len(cuda.live), cuda.copied[1]
    answer = cascade.ask(picture(1), QUESTION, guidance=scores, max_new_tokens=3)
    gc.collect()
    assert len(cuda.live) == before
    vocab, rows = model.spec.language.vocab, answer.prompt_tokens
    kept = 8 * (rows - 16 + len(answer.kept[0]) + 2 * (len(answer.tokens) - 1)) if answer.kept else 0
    assert cuda.copied[1] - down <= 4 * vocab * len(answer.tokens) + kept


def test_half_precision_engines_take_pixels_as_they_come(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path
) -> None:
    small = engines_of(lower, exports, "small", tmp_path / "small", "float16")
    answer = Cascade(small, None).ask(picture(1), QUESTION, max_new_tokens=3)
    assert answer.guidance is not None
    wanted = Cascade.from_exports(exports["small"], threads=1).ask(picture(1), QUESTION, max_new_tokens=3)
    if answer.tokens == wanted.tokens:
        assert wanted.guidance is not None
        np.testing.assert_allclose(answer.guidance, wanted.guidance, atol=0.05 * float(wanted.guidance.max()))


def test_what_does_not_fit_is_one_sentence(lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path) -> None:
    model = engines_of(lower, exports, "small", tmp_path / "small")
    with pytest.raises(
        OperationFailed, match=r"takes input_ids from \[1, 1\] to \[1, 64\], and got \[1, 79\].*--max-prompt"
    ):
        Cascade(model, None).ask(picture(1), "red " * 60)
    decoder = model.session("decoder")
    with pytest.raises(OperationFailed, match="fed wrongly"):
        decoder.run({})
    cuda.room = 10
    with pytest.raises(OperationFailed, match="out of memory"):
        Cascade(model, None).ask(picture(1), QUESTION)
    (tmp_path / "small" / "rtx" / "decoder.engine").write_bytes(b"torn")
    with pytest.raises(BadArtefact, match="cannot open"):
        Model(tmp_path / "small", model.spec, "rtx").session("decoder")


def test_an_engine_of_another_sm_is_told_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cuda_runtime", lambda: stand_in.Cuda(sm=80))
    monkeypatch.setattr("engines.sessions.machine.driver_version", lambda: "580.1")
    version = RTX.version()
    engine = EngineEntry(
        file="x", target="rtx", tensorrt=version or "", sms=(89,), precision="float32", profiles={}, served={},
        bytes=1, weight_bytes=1,
    )  # fmt: skip
    assert running.reasons([engine]) == ["the engines are for GPUs of SM 8.9, and this one is 8.0"]
    monkeypatch.setattr(device, "cuda_runtime", lambda: stand_in.Cuda(sm=89))
    assert running.reasons([engine]) == []
