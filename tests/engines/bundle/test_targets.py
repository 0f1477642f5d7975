"""Several targets in one bundle: what is shared, which is chosen, and what is said of the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.bundles import bundle as bundle_module
from engines.bundles.build import build_bundle
from engines.bundles.bundle import checked_manifest, open_bundle
from engines.bundles.manifest import manifest_of
from engines.targets import TABLE, TARGETS, checked_targets, cpu_reasons, why_not
from graphs.errors import BackendMissing, BadArtefact, UsageError
from graphs.spec import STAGES
from tests.conftest import Outcome
from tests.engines.bundle.conftest import edit_manifest
from tests.engines.bundle.other_targets import DREAM, SECOND
from tests.engines.bundle.test_open_bundle import flip, relist
from tests.hand_made import WEIGHTS, edit_model

Exports = dict[str, Path]
Cli = Callable[..., Outcome]


@pytest.fixture
def others() -> Iterator[None]:
    """dream, which nobody can run, before all; second, which runs here, behind it."""
    known = dict(TARGETS)
    TARGETS.clear()
    TARGETS.update({"dream": DREAM, "second": SECOND, **known})
    yield
    TARGETS.clear()
    TARGETS.update(known)


@pytest.fixture
def several(others: None, exports: Exports, tmp_path: Path) -> Path:
    build_bundle([exports["small"], exports["large"]], tmp_path / "b", target=("cpu", "dream", "second"))
    return tmp_path / "b"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed."""
    seen: list[str] = []
    real = bundle_module._digest
    monkeypatch.setattr(bundle_module, "_digest", lambda path, e, i=None: (seen.append(e.path), real(path, e, i))[1])
    return seen


def test_graphs_are_shared_and_the_order_is_the_tables(several: Path, pair: Path) -> None:
    manifest = checked_manifest(several)
    assert manifest.targets == ("dream", "second", "cpu")
    assert {f.path: f.sha256 for f in manifest.files} == {f.path: f.sha256 for f in manifest_of(pair).files}
    for member in manifest.members.values():
        assert len({json.dumps(entry.model_dump(exclude={"footprint"})) for entry in member.targets.values()}) == 1


def test_the_best_that_runs_is_chosen_and_named(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_bundle(several)
    assert opened.target == "second"
    said = capsys.readouterr().err
    assert said == (
        f"{several} runs on target second (not dream: no NVIDIA driver is loaded; dreams 3 is installed, the engines "
        "are of dreams 4)\n"
    )
    assert open_bundle(several, target="cpu").target == "cpu"
    assert capsys.readouterr().err == "", "what was asked for needs no telling"


def test_an_explicit_target_that_cannot_be_had_reads_no_file(several: Path, hashed: list[str]) -> None:
    with pytest.raises(BackendMissing, match=r"dream cannot be run here: no NVIDIA.*dreams 4; open it with --target"):
        open_bundle(several, target="dream")
    assert hashed == []


def test_a_target_that_is_not_held(several: Path, saccade_cli: Cli, hashed: list[str]) -> None:
    told = saccade_cli("verify", several, "--target", "rtx")
    assert told.code == 2
    assert "built for target dream and second and cpu, not rtx; build it again" in told.stderr
    assert hashed == []


def test_nothing_that_runs_here(others: None, exports: Exports, tmp_path: Path, saccade_cli: Cli) -> None:
    build_bundle([exports["alone"]], tmp_path / "b", target="dream")
    told = saccade_cli("verify", tmp_path / "b")
    assert told.code == 4
    assert "target dream cannot be run here: no NVIDIA driver" in told.stderr
    assert "--target cpu too" in told.stderr
    assert saccade_cli("show", tmp_path / "b").code == 0, "what a bundle holds can be told anywhere"


def test_a_target_of_another_release(pair: Path, bundle: Path) -> None:
    def rename(document: dict) -> None:
        document["targets"] = ["npu"]
        for member in document["members"].values():
            member["targets"] = {"npu": member["targets"]["cpu"]}

    edit_manifest(bundle, rename)
    with pytest.raises(BackendMissing, match="npu cannot be run here: this release does not know it"):
        open_bundle(bundle)


def test_members_have_the_bundles_targets(bundle: Path) -> None:
    edit_manifest(bundle, lambda d: d.update(targets=["cpu", "rtx"]))
    with pytest.raises(BadArtefact, match="model small does not have the bundle's targets"):
        open_bundle(bundle)


def test_a_spec_outside_the_bundle(bundle: Path) -> None:
    edit_manifest(bundle, lambda d: d["members"]["small"]["targets"]["cpu"].update(spec="../../spec.json"))
    with pytest.raises(BadArtefact, match="outside the bundle"):
        open_bundle(bundle)


def test_what_the_target_does_not_use_is_not_hashed(bundle: Path, hashed: list[str]) -> None:
    """An engine of another target is checked by presence and size, and by digest where all is."""
    (bundle / "small" / "rtx").mkdir()
    (bundle / "small" / "rtx" / "decoder.engine").write_bytes(b"engine")

    def add(document: dict) -> None:
        document["targets"] = ["rtx", "cpu"]
        for member in document["members"].values():
            member["targets"]["rtx"] = member["targets"]["cpu"]
        document["files"].append({"path": "small/rtx/decoder.engine", "bytes": 6, "sha256": "0" * 64})

    edit_manifest(bundle, add)
    assert open_bundle(bundle, target="cpu", check="used").target == "cpu"
    assert f"small/{WEIGHTS}" in hashed
    assert "small/rtx/decoder.engine" not in hashed
    with pytest.raises(BadArtefact, match=r"decoder\.engine was changed"):
        open_bundle(bundle, target="cpu")
    flip(bundle / "small" / WEIGHTS)
    with pytest.raises(BadArtefact, match=WEIGHTS):
        open_bundle(bundle, target="cpu", check="used")


def test_a_graph_that_reads_the_folder_of_another_target(bundle: Path) -> None:
    """Such a file would be opened without its digest."""
    (bundle / "small" / "rtx").mkdir()
    (bundle / "small" / WEIGHTS).rename(bundle / "small" / "rtx" / WEIGHTS)
    at = f"small/rtx/{WEIGHTS}"
    for stage in STAGES:
        edit_model(bundle / "small", stage, lambda m: [set_location(t) for t in m.graph.initializer])
        relist(bundle, f"small/{stage}.onnx")

    def move(document: dict) -> None:
        document["targets"] = ["rtx", "cpu"]
        for member in document["members"].values():
            member["targets"]["rtx"] = member["targets"]["cpu"]
        next(f for f in document["files"] if f["path"] == f"small/{WEIGHTS}")["path"] = at

    edit_manifest(bundle, move)
    assert open_bundle(bundle, target="cpu").target == "cpu", "where every file is hashed it is one as any other"
    flip(bundle / at)
    with pytest.raises(BadArtefact, match=r"reads 'rtx/model\.safetensors', not a file of the bundle"):
        open_bundle(bundle, target="cpu", check="used")


def set_location(tensor: Any) -> None:
    next(e for e in tensor.external_data if e.key == "location").value = f"rtx/{WEIGHTS}"


@pytest.mark.parametrize("asked", ["abacus", ("cpu", "abacus"), ()])
def test_targets_that_cannot_be_asked_for(asked: str | tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"(known are|choose one or more of) .*cpu"):
        checked_targets(asked)


def test_a_target_asked_for_twice_is_one() -> None:
    assert checked_targets(("cpu", "cpu")) == ("cpu",)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_the_table_says_why_not(target: str) -> None:
    assert all(isinstance(reason, str) and reason for reason in why_not(target))
    assert TABLE[-1].name == "cpu", "what runs everywhere comes last"


def test_a_cpu_without_its_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_reasons() == []
    monkeypatch.setattr("engines.targets.find_spec", lambda name: None)
    assert "onnxruntime is not installed" in cpu_reasons()[0]
    monkeypatch.setattr("graphs.versions.installed_version", lambda name: "1.31.1")
    assert cpu_reasons() == [
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other (pip uninstall onnxruntime "
        "onnxruntime-gpu, then pip install one of 'saccade[cpu]' or 'saccade[gpu]')"
    ]
