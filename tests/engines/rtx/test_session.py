"""The TensorRT session through stand-ins for CUDA and TensorRT: a cascade's answers are those of the CPU target."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image

from engines.bundles.manifest import EngineEntry, EngineFile
from engines.cache import InPlace, cut, empty_cache
from engines.cascade import Cascade
from engines.decoder import Chunk
from engines.generate import Generation
from engines.model import Model
from engines.sampling import Options
from engines.talk.memory import Memory
from engines.talk.messages import Talk, asked
from engines.trt import device, running
from engines.trt.bounds import Bounds, profiles_of
from engines.trt.flavour import RTX
from engines.trt.jit_cache import VARIABLE, JitCache
from engines.trt.replay import SWITCH, Step
from engines.trt.session import MOST_STEPS, TrtSession, checked_bytes
from graphs.errors import BadArtefact, OperationFailed
from graphs.files import sha256_of
from graphs.spec import spec_from_folder
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


def engines_of(
    lower: Lower, exports: Exports, role: str, out: Path, precision: str = "float32", capacity: int | None = 96
) -> Model:
    """A model's folder as a bundle has it, with stand-in engines; capacity None: caches are concatenated."""
    lowered = lower(role, precision, capacity=capacity)
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


def asked_about(image: Image.Image) -> Talk:
    return (asked(QUESTION, image),)


@pytest.mark.parametrize("capacity", [96, None])
def test_a_cascade_on_engines_answers_as_on_the_cpu(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path, capacity: int | None
) -> None:
    models = {role: engines_of(lower, exports, role, tmp_path / role, capacity=capacity) for role in ("small", "large")}
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
    assert (cuda.captures > 0) is (cuda.launches > 0) is (capacity is not None)


def test_only_what_is_asked_for_comes_to_the_host_and_what_is_dropped_is_freed(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path
) -> None:
    model = engines_of(lower, exports, "large", tmp_path / "large")
    cascade = Cascade(None, model)
    scores = np.random.default_rng(0).random(16, dtype=np.float32)
    steps = model.session("decoder")._steps  # type: ignore[attr-defined]

    def live() -> int:
        """Tensors, but for those of steps: how many of these are kept hangs on which addresses come again."""
        gc.collect()
        assert len(steps) <= MOST_STEPS
        return len(cuda.live) - sum(tensor.nbytes > 0 for step in steps.values() for tensor in step.tensors.values())

    for _ in range(MOST_STEPS + 1):
        cascade.ask(picture(1), QUESTION, guidance=scores, max_new_tokens=6)
    before, down = live(), cuda.copied[1]
    answer = cascade.ask(picture(1), QUESTION, guidance=scores, max_new_tokens=6)
    assert live() == before
    vocab, rows = model.spec.language.vocab, answer.prompt_tokens
    assert answer.kept
    kept = 8 * (rows - 16 + len(answer.kept[0]))
    assert cuda.copied[1] - down == 4 * vocab * len(answer.tokens) + kept


def test_guidance_comes_to_the_host_once(lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path) -> None:
    model = engines_of(lower, exports, "small", tmp_path / "small")
    prompt = Memory(model).prompt(asked_about(picture(1)))
    down = cuda.copied[1]
    run = model.generate(prompt, Options(max_new_tokens=6)).finish()
    assert cuda.copied[1] - down == 4 * model.spec.language.vocab * len(run.tokens)
    assert run.guidance is not None
    assert cuda.copied[1] - down == 4 * (model.spec.language.vocab * len(run.tokens) + 96)


def generated(model: Model, seed: int, tokens: int = 8) -> Generation:
    """A whole answer on a fresh cache; the stand-ins' models have no end token that they would choose early."""
    prompt = Memory(model).prompt(asked_about(picture(seed)))
    priority_S = np.random.default_rng(seed).random(len(prompt), dtype=np.float32)
    scores = priority_S if model.spec.plan.uses_priority else None
    return model.generate(prompt, Options(max_new_tokens=tokens), priority_S=scores).finish()


def test_a_captured_step_is_the_step(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed steps, step by step launched ones and the CPU give the same; other buffers are captured anew."""
    monkeypatch.setenv(SWITCH, "0")
    plain = generated(engines_of(lower, exports, "large", tmp_path / "plain"), 1)
    assert cuda.captures == 0
    monkeypatch.setenv(SWITCH, "1")
    model = engines_of(lower, exports, "large", tmp_path / "large")
    runs = [generated(model, 1), generated(model, 1)]  # both caches live, so they are at two addresses
    steps = len(plain.tokens) - 1
    assert steps > 2
    assert cuda.captures == 2
    assert cuda.launches == 2 * (steps - 1)
    for run in runs:
        assert run.tokens == plain.tokens
        np.testing.assert_array_equal(run.log_prob, plain.log_prob)
    del runs
    gc.collect()
    held = cuda.graphs
    for seed in range(4):
        generated(model, seed)
    gc.collect()
    assert cuda.graphs <= max(held, MOST_STEPS), "captured steps of old conversations are given back"


def test_an_older_view_continued_beside_a_newer_one_keeps_its_rows(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path
) -> None:
    """Captured steps of two branches of one conversation, taken in turns."""
    model = engines_of(lower, exports, "small", tmp_path / "small")
    want = Model(exports["small"], spec_from_folder(exports["small"]))
    results = []
    for which in (model, want):
        first = which.decoder.run(Memory(which).prompt(asked_about(picture(1))).chunk)
        branches, logits = [first.cache, first.cache], []
        for step in range(3):
            for i, token in ((i, 5 + 15 * i + step) for i in (0, 0, 0, 1, 1)):
                done = which.decoder.run(Chunk(which.embed_text([token]), np.zeros(1, bool)), branches[i])
                branches[i] = done.cache
                logits.append(done.logits)
        shorter = cut(branches[0], which.spec, branches[0].next_position - 2, which.to_host)
        again = which.decoder.run(Chunk(which.embed_text([9]), np.zeros(1, bool)), shorter)
        logits += [again.logits, which.decoder.run(Chunk(which.embed_text([9]), np.zeros(1, bool)), branches[0]).logits]
        results.append(np.concatenate(logits))
    assert cuda.launches > 0
    np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_a_capture_that_cannot_be_is_said_and_the_steps_run(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wanted = generated(Model(exports["large"], spec_from_folder(exports["large"])), 1)
    run = stand_in.Context.execute_async_v3

    def waits(context: stand_in.Context, stream: int) -> bool:
        cuda.cudaStreamSynchronize(stream)
        return run(context, stream)

    for how, said in (("capturable", "cannot be captured"), ("wait", "cudaStreamEndCapture failed")):
        model = engines_of(lower, exports, "large", tmp_path / how)
        decoder = cast(TrtSession, model.session("decoder"))
        if how == "capturable":
            monkeypatch.setattr(decoder._engine, "capturable", False)
        else:  # an engine that waits for the device in the middle of its run
            monkeypatch.setattr(stand_in.Context, "execute_async_v3", waits)
        assert generated(model, 1).tokens == wanted.tokens
        assert capsys.readouterr().err.count(said) == 1
    assert cuda.launches == 0


def test_what_another_thread_drops_meanwhile_is_freed_behind_a_capture(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generated(Model(exports["large"], spec_from_folder(exports["large"])), 1)
    model = engines_of(lower, exports, "large", tmp_path / "large")
    of_model = cast(TrtSession, model.session("decoder"))._device
    tensors = [of_model.zeros((2,), np.dtype(np.float32)) for _ in range(3)]
    pointers = {tensor.pointer for tensor in tensors}
    answers = [*tensors, of_model.captured(lambda: True)]  # and a graph, as an older session of this folder has
    tensors.clear()
    run, dropped = stand_in.Context.execute_async_v3, 0

    def drops(context: stand_in.Context, stream: int) -> bool:
        nonlocal dropped
        if cuda.recorded is not None and answers:
            thread = Thread(target=answers.clear)
            thread.start()
            thread.join()
            dropped += 1
            assert pointers <= cuda.live.keys()
        return run(context, stream)

    monkeypatch.setattr(stand_in.Context, "execute_async_v3", drops)
    assert generated(model, 1).tokens == wanted.tokens
    assert (dropped, cuda.captures) == (1, 2)
    assert cuda.launches > 0
    assert not pointers & cuda.live.keys()


def test_a_stale_pointer_in_a_capture_would_be_found_out(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in tells a right capture from one whose inputs lie elsewhere at the next step."""
    monkeypatch.setattr(Step, "take", lambda self, inputs: None)
    wanted = generated(Model(exports["large"], spec_from_folder(exports["large"])), 1)
    with contextlib.suppress(OperationFailed):  # what was never written may be no number
        assert generated(engines_of(lower, exports, "large", tmp_path / "large"), 1).log_prob != wanted.log_prob


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
    cache = empty_cache(model.spec)
    with pytest.raises(OperationFailed, match=r"take 97 rows of a cache, and .* was built for 96.*--max-length"):
        InPlace(model.spec, decoder).prepare(cache, (97,), None)
    cuda.room = 10
    with pytest.raises(OperationFailed, match="out of memory"):
        Cascade(model, None).ask(picture(1), QUESTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in.Engine, "get_aliased_input_tensor", lambda self, name: None)
        with pytest.raises(BadArtefact, match="does not write present_k_0 where it reads the past"):
            Model(tmp_path / "small", model.spec, "rtx").session("decoder")
    (tmp_path / "small" / "rtx" / "decoder.engine").write_bytes(b"torn")
    with pytest.raises(BadArtefact, match="cannot open"):
        Model(tmp_path / "small", model.spec, "rtx").session("decoder")


def test_an_engine_of_another_sm_is_told_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cuda_runtime", lambda: stand_in.Cuda(sm=80))
    monkeypatch.setattr(running, "driver_reasons", lambda cuda: [])
    version = RTX.version()
    engine = EngineEntry(
        file="x", target="rtx", tensorrt=version or "", sms=(89,), precision="float32", profiles={}, served={},
        bytes=1, weight_bytes=1,
    )  # fmt: skip
    assert running.reasons([engine]) == ["the engines are for GPUs of SM 8.9, and this GPU is of SM 8.0"]
    monkeypatch.setattr(device, "cuda_runtime", lambda: stand_in.Cuda(sm=89))
    assert running.reasons([engine]) == []


@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_an_engine_that_was_swapped_after_the_bundle_was_opened_is_never_deserialised(
    lower: Lower, exports: Exports, cuda: stand_in.Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    registered: list[str] = []
    monkeypatch.setattr("plugins.trt.imported", lambda module: stand_in)
    monkeypatch.setattr("plugins.registry.register", lambda trt, sms=(): registered.append("python"))
    monkeypatch.setattr(running, "tensorrt_reasons", lambda engines=(): [])
    made = engines_of(lower, exports, "small", tmp_path / "small")
    said: dict[Path, EngineFile] = {}
    for stage, plugins, versions in (("vision", "none", True), ("embed", "aot", False), ("decoder", "python", False)):
        file = made.folder / made.spec.stages[stage].file
        said[file] = EngineFile(sha256_of(file), plugins, versions)  # type: ignore[arg-type]
    model = Model(made.folder, made.spec, target, engines=said)
    stand_in.DESERIALISED.clear()
    model.session("vision")
    model.session("embed")
    assert [allowed for _, allowed in stand_in.DESERIALISED] == [True, False]
    assert registered == [], "neither bodies nor kernels built in take a plugin of ours"
    decoder = made.folder / made.spec.stages["decoder"].file
    good = decoder.read_bytes()
    decoder.write_bytes(b"")
    with pytest.raises(BadArtefact, match="cannot be read"):
        model.session("decoder")
    decoder.write_bytes((made.folder / made.spec.stages["embed"].file).read_bytes())
    with pytest.raises(BadArtefact, match="changed after the bundle was opened"):
        model.session("decoder")
    assert len(stand_in.DESERIALISED) == 2
    decoder.write_bytes(good)
    model.session("decoder")
    assert registered[-1] == "python"
    other = {file: entry for file, entry in said.items() if file != decoder}
    with pytest.raises(BadArtefact, match="is not an engine of the bundle's manifest"):
        Model(made.folder, made.spec, target, engines=other).session("decoder")


def test_an_engine_that_changes_while_it_is_deserialised_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "decoder.engine"
    file.write_bytes(b"engine")
    said = EngineFile(sha256_of(file), "none", False)
    with checked_bytes(file, said) as data:
        assert bytes(data) == b"engine"
    with pytest.raises(BadArtefact, match="was changed after the bundle was opened"), checked_bytes(file, said):  # noqa: PT012
        time.sleep(0.02)  # the clock of the file's times is coarse
        file.write_bytes(b"another")
    with pytest.raises(ZeroDivisionError), checked_bytes(file, None):
        1 / 0  # noqa: B018


def test_what_is_compiled_at_the_first_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = EngineFile("ab" * 32, "none", False)
    file = tmp_path / "saccade" / "tensorrt-rtx" / f"{said.sha256}.cache"
    with_cache = SimpleNamespace(
        **vars(stand_in), IRuntimeCache=Cache, DynamicShapesKernelSpecializationStrategy=Kernels
    )
    first = JitCache(with_cache, Jit(), said)
    assert (first.how().strategy, first.how().cache.held) == ("on profile change", b"")
    steady = first.how(steady=True)
    assert (steady.strategy, steady.dynamic_shapes_kernel_specialization_strategy) == ("on profile change", "eager")
    assert first.how().dynamic_shapes_kernel_specialization_strategy == "lazy"
    assert steady.cache is first.how().cache
    del steady
    first.save()
    assert not file.exists(), "nothing was compiled"
    first.how().cache.held = b"for this GPU: one"
    first.save()
    assert file.read_bytes() == b"for this GPU: one"
    first.how().cache.held += b" and two"
    del first
    gc.collect()
    assert file.read_bytes() == b"for this GPU: one and two"
    assert JitCache(with_cache, Jit(), said).how().cache.held == b"for this GPU: one and two"
    file.write_bytes(b"for another GPU")
    other = JitCache(with_cache, Jit(), said)
    other.how().cache.held = b"for this GPU: three"
    other.save()
    assert file.read_bytes() == b"for this GPU: three"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_where_nothing_is_kept_the_engine_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = EngineFile("ab" * 32, "none", False)
    with_cache = SimpleNamespace(
        **vars(stand_in), IRuntimeCache=Cache, DynamicShapesKernelSpecializationStrategy=Kernels
    )
    monkeypatch.setenv(VARIABLE, "")
    unkept = JitCache(with_cache, Jit(), said)
    assert (unkept.how().strategy, unkept.how(steady=True).dynamic_shapes_kernel_specialization_strategy) == (
        "on profile change",
        "eager",
    )
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("no folder")
    assert JitCache(stand_in, Jit(), said).how(steady=True) == "on profile change", "full TensorRT has none"
    assert not hasattr(JitCache(with_cache, Jit(), None).how(), "cache"), "an engine of no bundle has no digest"
    kept = JitCache(with_cache, Jit(), said)
    kept.how().cache.held = b"for this GPU: one"
    kept.save()
    assert f"warning: what TensorRT-RTX compiled cannot be kept in {tmp_path}" in capsys.readouterr().err


class Cache:
    """A runtime cache; it takes what it wrote itself."""

    held = b""

    def deserialize(self, data: bytes) -> bool:
        if data.startswith(b"for this GPU"):
            self.held = data
        return bool(self.held)

    def serialize(self) -> bytes:
        return self.held


class Kernels:
    EAGER = "eager"


class Jit:
    """An engine, or a runtime configuration."""

    cache: Cache
    strategy = ""
    dynamic_shapes_kernel_specialization_strategy = "lazy"

    def create_runtime_config(self) -> Jit:
        return Jit()

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True
