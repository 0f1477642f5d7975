"""Target openvino: the cascade's answers, caches that are continued twice, refusals, bf16, the choice at open."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engines import targets
from engines.bundles.build import build_bundle
from engines.bundles.bundle import open_bundle
from engines.bundles.golden import replay
from engines.bundles.manifest import manifest_of
from engines.cache import cut
from engines.cascade import Cascade
from engines.decoder import Chunk
from engines.model import Model
from graphs.errors import BackendMissing, OperationFailed, UsageError
from graphs.spec import spec_from_folder
from tests.conftest import Outcome
from tests.engines.openvino.conftest import needs_openvino
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of, question_of

pytestmark = needs_openvino
Cli = Callable[..., Outcome]


def test_the_cascade_says_what_it_says_on_cpu(tiny_pair: TinyPair) -> None:
    said = []
    for target in ("cpu", "openvino"):
        cascade = tiny_pair.cascade(target=target)
        answer = cascade.ask(picture_of(3), question_of(3), keep=0.3, max_new_tokens=NEW_TOKENS)
        assert answer.confidence is not None
        assert answer.guidance is not None
        said.append((answer, cascade.ask(None, "what is red ?", max_new_tokens=NEW_TOKENS)))
    (one, alone), (other, other_alone) = said
    assert (other.tokens, other.model, other_alone.tokens) == (one.tokens, one.model, alone.tokens)
    assert [k.tolist() for k in other.kept or ()] == [k.tolist() for k in one.kept or ()]
    np.testing.assert_allclose(other.guidance, one.guidance, rtol=1e-4)
    assert other.confidence.score == pytest.approx(one.confidence.score, rel=1e-4)


@pytest.fixture(scope="module")
def small(tiny_pair: TinyPair) -> dict[str, Model]:
    """The small model on both runtimes; every layer of it guides."""
    return {target: tiny_pair.model("small", target) for target in ("cpu", "openvino")}


def text(model: Model, tokens: list[int]) -> Chunk:
    return Chunk(model.embed_text(tokens), np.zeros(len(tokens), bool))


def test_older_caches_are_continued_again(small: dict[str, Model]) -> None:
    """From one prefill three ways on, in turns; one of them cut and continued: always the same as on the CPU."""
    logits, received = {}, {}
    for target, model in small.items():
        run, of = model.decoder.run, partial(text, model)
        begun = run(of([5, 6, 7, 8, 9]))
        one = run(of([10]), begun.cache)
        other = run(of([11, 12]), begun.cache)
        two = run(of([13]), one.cache)
        third = run(of([14]), begun.cache, tail=1)
        short = cut(two.cache, model.spec, 4, model.to_host)
        assert short.lengths == (4,) * len(short.lengths)
        steps = [begun, one, other, two, third, run(of([15, 16, 17]), short), run(of([18]), other.cache)]
        logits[target] = [step.logits for step in steps]
        # A decoder that writes in place gives one number for each row of its buffers, [1, C].
        received[target] = [
            np.ravel(model.to_host(step.received))[: step.cache.lengths[0]]
            for step in steps
            if step.received is not None
        ]
        assert len(received[target]) == len(steps)
        assert set(steps[3].cache.lengths) == {7}
    for got, wanted in zip(logits["openvino"], logits["cpu"], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())
    for got, wanted in zip(received["openvino"], received["cpu"], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_newest_cache_is_continued_in_place(small: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.sessions import openvino_session

    model, copies = small["openvino"], []
    real = openvino_session.OpenVinoSession.to_host
    monkeypatch.setattr(
        openvino_session.OpenVinoSession, "to_host", lambda self, value: (copies.append(value), real(self, value))[1]
    )
    step = model.decoder.run(text(model, [5, 6, 7]))
    started = len(copies)
    rooms = set()
    for token in range(8, 14):
        step = model.decoder.run(text(model, [token]), step.cache)
        rooms |= {value.room for value in step.cache.values.values()}
    assert len(rooms) == 1
    assert len(copies) == started, "a step copied a cache"
    [room] = rooms
    pages = room.pages
    del rooms, room, step
    session = model.session("decoder")
    assert pages in session._idle, "its request waits for the next conversation"


def test_what_conversations_leave_is_bounded(small: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.sessions import openvino_session

    model = small["openvino"]
    session = model.session("decoder")
    wanted = model.decoder.run(text(model, [5, 6, 7, 8])).logits
    monkeypatch.setattr(openvino_session, "KEPT_BYTES", 1)
    at_once = [model.decoder.run(text(model, [5] * rows)) for rows in (*range(2, 20), 220)]
    large = max(value.room.pages.nbytes for step in at_once for value in step.cache.values.values())
    del at_once
    assert len(session._idle) == openvino_session.KEPT
    assert all(0 < pages.nbytes < large for pages in session._idle)
    np.testing.assert_array_equal(model.decoder.run(text(model, [5, 6, 7, 8])).logits, wanted)


def test_a_wrong_feed_and_a_failed_run(small: dict[str, Model]) -> None:
    model = small["openvino"]
    session = model.session("decoder")
    with pytest.raises(OperationFailed, match=r"fed wrongly: missing .*'tail'.*unknown \['tale'\]"):
        session.run({"tale": np.zeros(1)})
    step = model.decoder.run(text(model, [5, 6, 7]))
    again = model.decoder.run(text(model, [8]), step.cache)
    wide = Chunk(np.zeros((1, 2, 7), np.float32), np.zeros(2, bool))
    with pytest.raises(OperationFailed, match=r"OpenVINO failed in decoder.onnx .*saccade verify"):
        model.decoder.run(wide, again.cache)
    after = model.decoder.run(text(model, [9]), again.cache)
    steady = small["cpu"]
    plain = steady.decoder.run(text(steady, [5, 6, 7, 8, 9]))
    np.testing.assert_allclose(after.logits, plain.logits, atol=1e-4 * np.abs(plain.logits).max())


def test_without_blocks_as_on_a_gpu(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.sessions import openvino_session

    monkeypatch.setattr(openvino_session, "CPU", "the device with blocks")
    model = tiny_pair.model("alone", "openvino")
    assert all(r.agrees for r in replay(model.folder, model.spec, partial(openvino_session.OpenVinoSession, threads=1)))
    assert not model.session("decoder")._segments  # type: ignore[attr-defined]


def test_a_device_that_is_not_there(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli, monkeypatch) -> None:
    bundle = tmp_path / "b"
    build_bundle([tiny_pair.exports["alone"]], bundle, target=("cpu", "openvino"))
    monkeypatch.setenv("SACCADE_OPENVINO_DEVICE", "GPU.7")
    told = saccade_cli("verify", bundle, "--target", "openvino")
    assert told.code == 4
    assert "SACCADE_OPENVINO_DEVICE is 'GPU.7', and OpenVINO finds CPU on this machine; unset it" in told.stderr
    assert open_bundle(bundle).target == "cpu"
    monkeypatch.setenv("SACCADE_OPENVINO_DEVICE", "NPU")
    assert "set it to CPU or GPU" in saccade_cli("verify", bundle, "--target", "openvino").stderr


def test_chosen_where_it_is_installed(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli, monkeypatch) -> None:
    bundle = tmp_path / "b"
    build_bundle([tiny_pair.exports["alone"]], bundle, target=("cpu", "openvino"))
    manifest = manifest_of(bundle)
    assert manifest.targets == ("openvino", "cpu")
    assert "openvino" in manifest.tools
    assert not (bundle / "alone" / "openvino").exists(), "fp32 is the graphs' own"
    assert open_bundle(bundle).target == "openvino"
    told = saccade_cli("verify", bundle)
    assert (told.code, told.stdout.count(" agrees ")) == (0, 6)
    assert f"{bundle} runs on target openvino\n" in told.stderr
    monkeypatch.setattr("engines.sessions.openvino_device.find_spec", lambda name: None)
    assert targets.why_not("openvino") == ["openvino is not installed (pip install 'saccade[openvino]')"]
    assert open_bundle(bundle).target == "cpu"


def test_bf16_is_asked_for_at_the_build(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli) -> None:
    bundle, exports = tmp_path / "b", [tiny_pair.exports["small"], tiny_pair.exports["large"]]
    built = saccade_cli(
        "build", *exports, "-o", bundle, "--target", "openvino", "--target", "cpu", "--precision", "bf16"
    )
    assert built.code == 0, built.stderr
    dtypes = {n: {t: e.dtype for t, e in m.targets.items()} for n, m in manifest_of(bundle).members.items()}
    assert dtypes == {name: {"openvino": "bfloat16", "cpu": "float32"} for name in ("small", "large")}
    assert "on openvino: bfloat16" in saccade_cli("show", bundle).stdout
    told = saccade_cli("verify", bundle, "--target", "openvino")
    assert (told.code, told.stdout.count(" agrees ")) == (0, 12), told.stderr
    assert told.stdout.count("of 1e-01") == 12
    errors = [r.max_error for r in replay(*_member(bundle), partial(_session, dtype="bfloat16"))]
    assert max(errors) > 1e-4, "it computed in fp32"
    assert saccade_cli("verify", bundle, "--target", "cpu").code == 0


def test_weights_of_8_bits_beside_those_of_the_cpu(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli) -> None:
    bundle, exports = tmp_path / "b", [tiny_pair.exports["small"], tiny_pair.exports["large"]]
    targets = ("--target", "openvino", "--target", "cpu")
    built = saccade_cli("build", *exports, "-o", bundle, *targets, "--precision", "int8")
    assert built.code == 0, built.stderr
    assert "large in int8 on openvino, golden tensors: decoder: error at most" in built.stderr
    assert {path.name for path in (bundle / "small").iterdir()} == {
        "golden.safetensors",
        "processor",
        "openvino",
        "cpu",
    }
    for member in manifest_of(bundle).members.values():
        entry = member.targets["openvino"]
        assert (entry.precision, entry.dtype, entry.spec) == ("int8", "bfloat16", "openvino/spec.json")
        losses = {loss.tensor: loss.mean_error for loss in entry.losses}
        assert 1e-4 < losses["logits"] < 0.03
        assert entry.weight_bytes < 1.2 * member.targets["cpu"].weight_bytes
    assert "on openvino: int8 weights, bfloat16" in saccade_cli("show", bundle).stdout
    for target in ("openvino", "cpu"):
        told = saccade_cli("verify", bundle, "--target", target)
        assert told.code == 0, told.stderr
    answer = Cascade.open(bundle, target="openvino").ask(picture_of(3), question_of(3), max_new_tokens=NEW_TOKENS)
    assert answer.tokens


def test_narrow_files_are_measured_so_openvino_must_be_here(tiny_pair: TinyPair, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("engines.sessions.openvino_device.find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="target openvino cannot be run here: openvino is not installed"):
        build_bundle([tiny_pair.exports["alone"]], tmp_path / "b", target="openvino", precision="int4")
    assert not (tmp_path / "b").exists()


def _member(bundle: Path):
    member = open_bundle(bundle, target="openvino").members["large"]
    return member.folder, member.spec


def _session(file: Path, dtype: str):
    from engines.sessions.openvino_session import OpenVinoSession

    return OpenVinoSession(file, 1, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--target", "cpu", "--precision", "bf16"), "choose one of cpu: fp32, int8, int4"),
        (("--target", "openvino", "--precision", "int3"), "choose one of openvino: bf16, fp32, int8, int4"),
        (("--target", "openvino", "--precision", "bf16", "--sm", "89"), "has no engines to build"),
    ],
)
def test_options_that_nothing_reads(tiny_pair: TinyPair, tmp_path: Path, saccade_cli: Cli, options, why) -> None:
    told = saccade_cli("build", tiny_pair.exports["alone"], "-o", tmp_path / "b", *options)
    assert told.code == UsageError.exit_code
    assert why in told.stderr


def test_a_cpu_without_bf16_computes_in_fp32_and_says_so(tiny_pair: TinyPair, capsys, monkeypatch) -> None:
    import openvino as ov

    real = ov.Core.get_property
    monkeypatch.setattr(
        ov.Core,
        "get_property",
        lambda self, device, name: ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else real(self, device, name),
    )
    folder = tiny_pair.exports["alone"]
    [*runs] = replay(folder, spec_from_folder(folder), partial(_session, dtype="bfloat16"))
    assert all(run.agrees for run in runs)
    assert "has no bf16, so it computes in fp32" in capsys.readouterr().err
