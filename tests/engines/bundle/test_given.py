"""A bundle in the place of exports: built again for other targets, on a machine that has never seen the exports."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.bundles.build import build_bundle
from engines.bundles.bundle import open_bundle
from engines.bundles.manifest import manifest_of
from graphs.errors import BadArtefact, UsageError
from tests.conftest import Outcome
from tests.engines.bundle.conftest import edit_manifest

Cli = Callable[..., Outcome]


def test_a_bundle_is_built_again_as_its_exports_were(exports: dict[str, Path], bundle: Path, tmp_path: Path) -> None:
    wanted = build_bundle([exports["small"], exports["large"]], tmp_path / "a", target=("cpu", "openvino"))
    got = build_bundle([bundle], tmp_path / "b", target=("cpu", "openvino"))
    assert got.files == wanted.files
    assert {name: m.targets for name, m in got.members.items()} == {n: m.targets for n, m in wanted.members.items()}
    assert open_bundle(tmp_path / "b", target="cpu").threshold == wanted.threshold


def test_it_brings_its_threshold_and_not_what_is_tied_to_its_target(
    exports: dict[str, Path], tmp_path: Path, saccade_cli: Cli
) -> None:
    build_bundle([exports["small"], exports["large"]], tmp_path / "a", threshold=0.25)
    told = saccade_cli("build", tmp_path / "a", "-o", tmp_path / "b", "--precision", "int8")
    assert told.code == 0
    assert f"the threshold of {tmp_path / 'a'}, 0.25, is kept" in told.stderr
    assert (manifest_of(tmp_path / "b").threshold, manifest_of(tmp_path / "b").calibrations) == (0.25, ())
    told = saccade_cli("build", tmp_path / "a", "-o", tmp_path / "c", "--threshold", "0.5")
    assert (manifest_of(tmp_path / "c").threshold, "the threshold of" in told.stderr) == (0.5, False)


def test_one_model_alone(exports: dict[str, Path], tmp_path: Path, saccade_cli: Cli) -> None:
    build_bundle([exports["alone"]], tmp_path / "a", target="cpu")
    told = saccade_cli("build", tmp_path / "a", "-o", tmp_path / "b")
    assert set(manifest_of(tmp_path / "b").members) == {"alone"}
    assert f"building from the models of {tmp_path / 'a'}\n" in told.stderr
    assert "are tied to its targets" not in told.stderr
    with pytest.raises(UsageError, match="no early exit"):
        build_bundle([tmp_path / "a"], tmp_path / "c", threshold=0.5)


def test_a_bundle_of_packed_files_is_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    build_bundle([exports["small"], exports["large"]], tmp_path / "a", precision="int8")
    with pytest.raises(
        UsageError,
        match=r"no canonical graphs of small and large, only what was made for cpu; build from",
    ):
        build_bundle([tmp_path / "a"], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_bundle_stands_alone_and_whole(exports: dict[str, Path], bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a bundle and was given beside another folder"):
        build_bundle([bundle, exports["large"]], tmp_path / "b")
    with pytest.raises(UsageError, match=r"lies in the bundle .*, which is read"):
        build_bundle([bundle], bundle / "b")
    with pytest.raises(UsageError, match=r"holds the bundle .* itself, which would be replaced"):
        build_bundle([bundle], bundle, overwrite=True)
    weights = next((bundle / "large").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(BadArtefact, match="large/"):
        build_bundle([bundle], tmp_path / "b")
    shutil.rmtree(bundle / "small")
    with pytest.raises(BadArtefact, match="small/"):
        build_bundle([bundle], tmp_path / "b")
    assert not (tmp_path / "b").exists()


FOUND = {
    "threshold": 0.5,
    "max_loss": 0.02,
    "confidence": 0.95,
    "metric": "exact",
    "baseline": "pruned",
    "target": "cpu",
    "precision": {"small": "", "large": ""},
    "keep": [0.5],
    "max_new_tokens": 4,
    "test": "binomial",
    "data_sha256": "0" * 64,
    "questions": 10,
    "losses": 0,
    "p_value": 0.01,
    "exit_rate": 0.5,
}


def test_that_calibrations_stay_behind_is_said(bundle: Path, tmp_path: Path, saccade_cli: Cli) -> None:
    """They are tied to a target and its precision, and their risk was measured there."""
    edit_manifest(bundle, lambda document: document.update(calibrations=[FOUND]))
    told = saccade_cli("build", bundle, "-o", tmp_path / "b")
    assert (told.code, f"the calibrations of {bundle} are tied to its targets" in told.stderr) == (0, True)
    assert manifest_of(tmp_path / "b").calibrations == ()
