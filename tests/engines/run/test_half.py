"""An fp16 export runs with fp16 caches, and its scores are in float64 all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engines.bundles.build import build_bundle
from engines.bundles.golden import refuse_disagreement, replay
from engines.cascade import Cascade
from engines.sessions.session import open_session
from graphs.errors import BadArtefact
from graphs.spec import GOLDEN_FILE, spec_from_folder
from tests.conftest import Outcome
from tests.engines.bundle.test_open_bundle import flip
from tests.engines.openvino.conftest import needs_openvino
from tests.engines.run.conftest import NEW_TOKENS, TinyPair, picture_of, question_of
from tests.tiny import tiny_llava


@pytest.fixture(scope="module")
def half(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exporter.export import export_checkpoint

    out = tmp_path_factory.mktemp("half") / "small"
    export_checkpoint(tiny_pair.checkpoints["small"], out, policy="sgl", role="small", dtype="float16")
    return out


def test_an_fp16_export_answers_nearly_as_fp32(half: Path, tiny_pair: TinyPair) -> None:
    case = (picture_of(1), question_of(1))
    wide = Cascade.from_exports(tiny_pair.exports["small"], threads=1).look(*case, max_new_tokens=1)
    narrow = Cascade.from_exports(half, threads=1).look(*case, max_new_tokens=NEW_TOKENS)
    assert narrow.prompt.line.tolist() == wide.prompt.line.tolist()
    assert narrow.tokens[0] == wide.tokens[0]
    first = Cascade.from_exports(half, threads=1).look(*case, max_new_tokens=1)
    np.testing.assert_allclose(first.guidance, wide.guidance, rtol=0.05)
    assert first.confidence.confidence == pytest.approx(wide.confidence.confidence, abs=0.02)
    assert narrow.guidance.dtype == np.float32


@pytest.mark.parametrize(("options", "said"), [((), True), (("--precision", "fp32"), False)])
@pytest.mark.parametrize("target", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_a_build_says_what_every_opening_will_convert(
    half: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome], target: str, options: tuple[str, ...], said: bool
) -> None:
    built = saccade_cli("build", half, "-o", tmp_path / "b", "--target", target, *options)
    assert (built.code, "fp16 weights are converted to fp32 whenever" in built.stderr) == (0, said), built.stderr


def test_an_fp16_export_packed_in_fp32_agrees_with_its_own_golden_tensors(
    half: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome]
) -> None:
    build_bundle([half], tmp_path / "b", precision="fp32")
    told = saccade_cli("verify", tmp_path / "b")
    assert (told.code, told.stdout.count(" agrees "), told.stdout.count("of 2e-02")) == (0, 6, 6), told.stderr


@needs_openvino
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_openvino_reads_an_fp16_export_from_files_in_fp32(
    half: Path, tiny_pair: TinyPair, tmp_path: Path, precision: str, dtype: str
) -> None:
    """It would make such weights itself whenever it opens, and hold both."""
    entry = build_bundle([half], tmp_path / "b", target="openvino", precision=precision).members["alone"]
    told = entry.targets["openvino"]
    assert (told.precision, told.dtype, told.computed_in) == (precision, dtype, precision)
    files = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*.safetensors")}
    assert files == {"alone/golden.safetensors", "alone/openvino/weights.safetensors"}
    case = (picture_of(1), question_of(1))
    answered = Cascade.open(tmp_path / "b").look(*case, max_new_tokens=1)
    wide = Cascade.from_exports(tiny_pair.exports["small"], threads=1).look(*case, max_new_tokens=1)
    assert answered.tokens == wide.tokens
    np.testing.assert_allclose(answered.guidance, wide.guidance, rtol=0.05)


@pytest.mark.parametrize("target", ["cpu", pytest.param("openvino", marks=needs_openvino)])
@pytest.mark.parametrize(("policy", "seed"), [("star", 20), ("visionzip", 2), ("tome", 2)])
def test_a_cut_in_the_tower_of_256_tokens_verifies_in_fp16(tmp_path: Path, policy: str, seed: int, target: str) -> None:
    """Among so many scores two lie closer than fp16 can tell, so that another row is kept or merged."""
    from exporter.export import export_checkpoint

    checkpoint = tiny_llava(tmp_path / "checkpoint", seed=seed, num_hidden_layers=3, hidden_size=48, image_size=128)
    export_checkpoint(checkpoint, tmp_path / "export", policy=policy, role="alone", dtype="float16")
    spec = spec_from_folder(tmp_path / "export")
    refuse_disagreement(replay(tmp_path / "export", spec, partial(open_session, target=target)), "alone")


@needs_openvino
@pytest.mark.parametrize("which", ["small", "large"])
@pytest.mark.parametrize(("targets", "precision"), [(("openvino",), "bf16"), (("openvino", "cpu"), "fp32")])
def test_a_pair_of_an_fp16_and_an_fp32_export(
    tiny_pair: TinyPair,
    tmp_path: Path,
    saccade_cli: Callable[..., Outcome],
    which: str,
    targets: tuple[str, ...],
    precision: str,
) -> None:
    """One model has files of its own then, the other's lie where every target reads them."""
    from exporter.export import export_checkpoint

    exports = dict(tiny_pair.exports)
    exports[which] = tmp_path / which  # type: ignore[assignment, index]
    export_checkpoint(
        tiny_pair.checkpoints[which],  # type: ignore[index]
        exports[which],  # type: ignore[index]
        policy="sgl",
        role=which,
        dtype="float16",
    )
    build_bundle([exports["small"], exports["large"]], tmp_path / "b", target=targets, precision=precision)
    for target in targets:
        opened = Cascade.open(tmp_path / "b", target=target, preload=True)
        answer = opened.ask(picture_of(1), question_of(1), threshold=1, max_new_tokens=2)
        assert (answer.model, len(answer.kept)) == ("large", 1)
        told = saccade_cli("verify", tmp_path / "b", "--target", target)
        assert (told.code, told.stdout.count(" agrees ")) == (0, 12), told.stderr


@needs_openvino
@pytest.mark.parametrize(("target", "precision"), [("openvino", "bf16"), ("cpu", "fp32"), ("cpu", None)])
def test_golden_tensors_that_preloading_runs_are_checked(
    half: Path, tmp_path: Path, target: str, precision: str | None
) -> None:
    build_bundle([half], tmp_path / "b", target=target, precision=precision)
    file = tmp_path / "b" / "alone" / GOLDEN_FILE
    flip(file)
    with pytest.raises(BadArtefact, match="digest does not match"):
        Cascade.open(tmp_path / "b")


@needs_openvino
def test_of_an_fp32_export_openvino_reads_the_graphs_themselves(tiny_pair: TinyPair, tmp_path: Path) -> None:
    build_bundle([tiny_pair.exports["small"]], tmp_path / "b", target="openvino", precision="bf16")
    assert not (tmp_path / "b" / "alone" / "openvino" / "weights.safetensors").exists()


@needs_openvino
@pytest.mark.parametrize(("precision", "tolerance"), [(None, "2e-02"), ("bf16", "1e-01"), ("int8", "")])
def test_an_fp16_export_verifies_and_runs_on_openvino(
    half: Path, tmp_path: Path, saccade_cli: Callable[..., Outcome], precision: str | None, tolerance: str
) -> None:
    """Its caches come to the host in fp32, the golden ones are in fp16."""
    bundle = tmp_path / "b"
    build_bundle([half], bundle, target="openvino", precision=precision)
    told = saccade_cli("verify", bundle, "--target", "openvino")
    assert (told.code, told.stdout.count(" agrees ")) == (0, 6), told.stderr
    assert told.stdout.count(f"of {tolerance}") >= 6
    ran = saccade_cli("run", bundle, "what is red ?", "--target", "openvino")
    assert (ran.code, bool(ran.stdout.strip())) == (0, True), ran.stderr
