"""Bundles for full TensorRT, built by a stand-in: TensorRT-RTX's builder under the other's name (``as_full``)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.bundles.build import build_bundle
from engines.bundles.manifest import Compatibility, EngineEntry, manifest_of
from engines.trt import device, running
from engines.trt.bounds import Bounds
from engines.trt.engine import refuse_too_large, warnings_in
from engines.trt.flavour import FLAVOURS, FULL, RTX, Flavour
from engines.trt.full import TensorrtOptions, own_sm
from engines.trt.member import build_member
from engines.trt.options import EngineOptions
from engines.trt.running import reasons, tensorrt_reasons
from graphs.errors import BackendMissing, OperationFailed
from graphs.spec import spec_from_folder
from plugins.cubins import SMS
from tests.conftest import Outcome
from tests.engines.rtx import stand_in
from tests.engines.rtx.conftest import Exports

pytest.importorskip("tensorrt_rtx")
AS_FULL = Path(__file__).parent / "as_full"
BOUNDS = Bounds(max_prompt=64, max_length=96, max_tail=8, max_images=2)
Cli = Callable[..., Outcome]


@dataclass
class Machine:
    """One with full TensorRT and a GPU of SM 8.9, by stand-ins."""

    monkeypatch: pytest.MonkeyPatch
    written: Path

    def has(self, version: str = "10.16.1.11", sm: int = 89) -> None:
        sys.modules.pop("tensorrt", None)
        self.monkeypatch.setenv("STAND_IN_VERSION", version)
        self.monkeypatch.setattr(device, "cuda_runtime", lambda: stand_in.Cuda(sm=sm))

    def builds(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.written.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    paths = [str(AS_FULL), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(AS_FULL)
    monkeypatch.setenv("STAND_IN_BUILDS", str(tmp_path / "builds"))
    monkeypatch.setattr(running, "driver_reasons", lambda cuda: [])
    made = Machine(monkeypatch, tmp_path / "builds")
    made.has()
    yield made
    sys.modules.pop("tensorrt", None)


def test_ahead_of_time_kernels_are_in_the_engines(
    exports: Exports, machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], saccade_cli: Cli
) -> None:
    timings = tmp_path / "timings"
    full = TensorrtOptions(timings, 2, hardware_compatibility="ampere-plus", plugins="aot", workspace=1.5)
    options = EngineOptions((), "fp16", "plugin", BOUNDS, full)
    build_bundle([exports["small"], exports["large"]], tmp_path / "b", target="tensorrt", engines=options)
    manifest = manifest_of(tmp_path / "b")
    small, large = (manifest.members[role].targets["tensorrt"] for role in ("small", "large"))
    assert list(small.ops.values()) == ["kernel"], "received attention, in two plugins"
    assert large.ops == {"CompactRows": "kernel", "KeepTopK": "kernel"}
    kernels = {"small": (rb"\w+_row_sums", rb"\w+_shares"), "large": (rb"keep_topk", rb"compact_rows")}
    for role, member in (("small", small), ("large", large)):
        for stage, entry in member.engines.items():
            assert (entry.target, entry.tensorrt, entry.sms) == ("tensorrt", "10.16.1.11", (89,))
            assert entry.compatibility == Compatibility(hardware="ampere-plus")
            assert entry.plugins == ("aot" if stage == "decoder" else "none")
        engine = (tmp_path / "b" / role / member.engines["decoder"].file).read_bytes()
        assert all(re.search(rb"\.entry " + name + rb"\(", engine) for name in kernels[role])
        assert b".target sm_80" in engine
        assert b"saccade.cubins" not in engine
    asked = {"level": 2, "hardware": "AMPERE_PLUS", "flags": [], "typed": True, "workspace": 1_500_000_000}
    assert machine.builds() == [{**asked, "profiles": n} for n in (1, 1, 2) * 2]
    assert timings.read_text() == "timed\n" * 6
    said = capsys.readouterr().err
    assert "warning: small: TensorRT on " in said
    assert said.count("only at compile-time, but is not being removed") == len(
        {line for line in said.splitlines() if "only at compile-time" in line}
    )
    shown = saccade_cli("show", tmp_path / "b").stdout
    assert (
        "engines of 10.16.1.11 for SM 8.9 (hardware compatibility ampere-plus; kernels built in ahead of time)" in shown
    )


def test_written_out_for_an_older_one(exports: Exports, machine: Machine, tmp_path: Path, saccade_cli: Cli) -> None:
    machine.has("10.3.0")
    options = ("--parser", "10.3", "--version-compatible", "--precision", "fp16", "--hardware-compatibility", "same-cc")
    bounds = ("--max-prompt", 64, "--max-length", 96, "--max-tail", 8)
    outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--target", "tensorrt", *options, *bounds)
    assert outcome.code == 0, outcome.stderr
    assert "alone: each step copies its caches, " in outcome.stderr
    assert "because TensorRT 10.3 knows no layer that writes in place" in outcome.stderr
    assert "alone: chunks of up to 64 rows, caches of 96, 64 guide rows, logits of 8 rows, 8 images" in outcome.stderr
    alone = manifest_of(tmp_path / "b").members["alone"].targets["tensorrt"]
    assert alone.ops == {"AttentionReceived": "body"}
    decoder = alone.engines["decoder"]
    assert (decoder.parser, decoder.plugins, decoder.served) == ("10.3", "none", {})
    assert decoder.compatibility == Compatibility(hardware="same-cc", versions=True)
    asked = {"level": None, "hardware": "SAME_COMPUTE_CAPABILITY", "flags": ["VERSION_COMPATIBLE"], "typed": True}
    trt = pytest.importorskip("tensorrt_rtx")
    fresh = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    asked["workspace"] = fresh.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    assert machine.builds() == [{**asked, "profiles": n} for n in (1, 1, 2)]
    assert "AttentionReceived runs as standard ONNX (its body)" in outcome.stderr
    assert not list((tmp_path / "b").rglob("*.onnx"))


def test_a_timing_cache_of_another_machine_is_refused(exports: Exports, machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "timings").write_bytes(b"no cache")
    options = EngineOptions((), bounds=BOUNDS, tensorrt=TensorrtOptions(tmp_path / "timings"))
    with pytest.raises(OperationFailed, match="not a timing cache of this TensorRT and this GPU"):
        build_bundle([exports["small"]], tmp_path / "b", target="tensorrt", engines=options)
    assert (tmp_path / "timings").read_bytes() == b"no cache"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sm", 80], "--sm is 80, and full TensorRT builds for the GPU that is here, of SM 89"),
        (["--optimization-level", 6], "choose 0 to 5"),
        (["--workspace", 0.0009], "--workspace is 0.0009, but must lie in [0.001, 1024] GB"),
        (["--workspace", "nan"], "--workspace is nan, but must lie in [0.001, 1024] GB"),
        (["--hardware-compatibility", "all"], "choose from none, ampere-plus, same-cc"),
        (["--plugins", "aot"], "give --ops plugin too"),
        (["--ops", "plugin", "--plugins", "cpp"], "neither python nor aot"),
        (["--ops", "plugin", "--version-compatible"], "choose --ops body"),
        (["--parser", "10.3", "--ops", "plugin"], "TensorRT 10.3 takes no plugins of ours"),
        (["--parser", "9"], "'9' is not known"),
        (["--timing-cache", "."], "is a folder"),
    ],
)
def test_a_wrong_option_leaves_nothing(
    exports: Exports, machine: Machine, saccade_cli: Cli, tmp_path: Path, options: list[object], sentence: str
) -> None:
    outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--target", "tensorrt", *options)
    assert (outcome.code, sentence in outcome.stderr) == (2, True), outcome.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["rtx", "cpu"])
def test_its_options_are_refused_where_they_do_nothing(
    exports: Exports, saccade_cli: Cli, tmp_path: Path, target: str
) -> None:
    sm = ["--sm", 89] if target == "rtx" else []
    for option in (["--optimization-level", 3], ["--version-compatible"], ["--timing-cache", tmp_path / "t"]):
        outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--target", target, *sm, *option)
        assert (outcome.code, "have no effect" in outcome.stderr) == (2, True), outcome.stderr
    assert not any(tmp_path.iterdir())


def test_kernels_that_the_gpu_would_not_read_are_refused(exports: Exports, machine: Machine, saccade_cli: Cli) -> None:
    machine.has(sm=120)
    outcome = saccade_cli(
        "build", exports["small"], "-o", "b", "--target", "tensorrt", "--ops", "plugin", "--plugins", "aot"
    )
    assert (outcome.code, "up to SM 90, not 120" in outcome.stderr) == (2, True), outcome.stderr


def test_without_it_nothing_is_written(exports: Exports, saccade_cli: Cli, tmp_path: Path) -> None:
    outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--target", "tensorrt")
    assert outcome.code == 4
    assert "tensorrt is not installed (pip install 'saccade[tensorrt]')" in outcome.stderr
    assert "or for --target rtx, which needs no GPU and serves GeForce and RTX GPUs" in outcome.stderr
    assert not any(tmp_path.iterdir())


def test_an_older_one_builds_what_is_written_out_only(
    exports: Exports, machine: Machine, saccade_cli: Cli, tmp_path: Path
) -> None:
    machine.has("10.3.0")
    outcome = saccade_cli("build", exports["small"], "-o", tmp_path / "b", "--target", "tensorrt")
    assert outcome.code == 4
    assert (
        "tensorrt 10.3.0 is installed, and 10.16 or newer, but older than 12, is needed (this one takes --parser 10.3)"
    ) in outcome.stderr
    assert not any(tmp_path.iterdir())


def entry(**changes: object) -> EngineEntry:
    said = {"file": "x", "target": "tensorrt", "tensorrt": "10.16.1.11", "sms": (89,), "precision": "float32"}
    return EngineEntry(**{**said, "profiles": {}, "served": {}, "bytes": 1, "weight_bytes": 1, **changes})


NEWER, WIDE = Compatibility(versions=True), Compatibility(hardware="ampere-plus")


@pytest.mark.parametrize(
    ("version", "sm", "engine", "reason"),
    [
        ("10.16.1.11", 89, entry(), ""),
        ("10.16.1.11", 90, entry(), "the engines are for GPUs of SM 8.9, and this GPU is of SM 9.0"),
        ("10.16.1.11", 120, entry(compatibility=WIDE), ""),
        (
            "10.16.1.11",
            75,
            entry(compatibility=WIDE),
            "the engines are for GPUs of SM 8.0 and newer, and this GPU is of SM 7.5",
        ),
        ("11.4.0.106", 89, entry(), "the engines are of tensorrt 10.16.1.11, not 11.4.0.106"),
        ("11.4.0.106", 89, entry(compatibility=NEWER), ""),
        (
            "10.16.0.1",
            89,
            entry(compatibility=NEWER),
            "for tensorrt 10.16.1.11 and newer, older than 12, not 10.16.0.1",
        ),
        (
            "12.0.0",
            89,
            entry(compatibility=NEWER),
            "tensorrt 12.0.0 is installed, and 10.16 or newer, but older than 12",
        ),
        ("10.3.0", 87, entry(tensorrt="10.3.0", sms=(87,), parser="10.3"), ""),
        ("10.16.1.11", 89, entry(platform="Plan9 mips"), "the engines were built on Plan9 mips, and this is "),
        ("10.16.1.11", 89, entry(platform=running.here()), ""),
        ("10.3.0", 89, entry(tensorrt="10.3.0"), "10.16 or newer, but older than 12, is needed"),
    ],
)
def test_where_an_engine_runs_is_told_from_the_manifest(
    machine: Machine, version: str, sm: int, engine: EngineEntry, reason: str
) -> None:
    machine.has(version, sm)
    found = tensorrt_reasons([engine])
    assert (reason in found[0]) if reason else found == [], found


def test_another_parser_is_named_where_the_version_is_the_reason_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "driver_reasons", lambda cuda: ["no NVIDIA driver is loaded"])
    with pytest.raises(BackendMissing, match="no NVIDIA driver is loaded; build on a machine"):
        own_sm((), TensorrtOptions(), "body", alone=True)


def test_every_reason_is_told_at_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "driver_reasons", lambda cuda: ["no NVIDIA driver is loaded"])
    monkeypatch.setattr("engines.trt.flavour.find_spec", lambda name: None)
    assert tensorrt_reasons([entry()]) == [
        "no NVIDIA driver is loaded, and the engines are for GPUs of SM 8.9",
        "tensorrt is not installed (pip install 'saccade[tensorrt]')",
        "the engines are of tensorrt 10.16.1.11",
    ]
    assert reasons([entry(target="rtx", tensorrt="1")])[0].endswith("GPUs of SM 8.9")


def test_an_engine_of_rtx_runs_on_other_systems_and_on_its_own_gpus_only(machine: Machine) -> None:
    machine.has(sm=89)
    ours = entry(target="rtx", tensorrt=RTX.version(), platform="Plan9 mips")
    assert reasons([ours]) == []
    machine.has(sm=87)
    assert reasons() == [
        "TensorRT-RTX engines are built for GPUs of SM 8.0 and 8.6 and 8.9 and 12.0 and 12.1, and this GPU is of SM 8.7"
    ]


@pytest.mark.parametrize(
    ("flavour", "advice"), [(FULL, "where such a GPU has more"), (RTX, "on a larger machine, for the engine may run")]
)
def test_a_build_that_memory_is_too_short_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, flavour: Flavour, advice: str
) -> None:
    monkeypatch.setattr("engines.trt.engine.free_memory", lambda: 28_000_000_000)
    refuse_too_large(8_000_000_000, "decoder of the large model", flavour)
    with pytest.raises(OperationFailed, match=f"takes about 42.9 GB .* and 28.0 GB are free; .* {advice}"):
        refuse_too_large(14_100_000_000, "decoder of the large model", flavour)
    with pytest.raises(OperationFailed, match=r"takes about 28.6 GB .* \(7 × weights\)"):
        refuse_too_large(4_000_000_000, "decoder of the large model", flavour, 4)


def test_fp16_engines_want_onnxruntime_before_anything_is_lowered(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("graphs.versions.installed_version", lambda name: None)
    spec = spec_from_folder(exports["small"])
    with pytest.raises(BackendMissing, match=r"onnxruntime is not installed .* 'saccade\[cpu\]'"):
        build_member("small", exports["small"], spec, tmp_path / "out", EngineOptions((89,), "fp16"))
    assert not any(tmp_path.iterdir())


def test_a_flavour_is_a_line_of_the_targets() -> None:
    from engines.targets import TARGETS

    assert list(TARGETS)[:2] == list(FLAVOURS)
    assert FULL.version() is None


def test_beside_rtx_it_is_built_for_the_gpu_that_is_here(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    options = EngineOptions((120,)).checked(["tensorrt", "rtx"])
    assert "TensorRT builds for the GPU that is here, of SM 89; --sm is for the other target" in capsys.readouterr().err
    assert [options.sms_for(FLAVOURS[target]) for target in ("tensorrt", "rtx")] == [[89], [120]]


def test_kernels_go_as_far_as_their_engine() -> None:
    wide, narrow = TensorrtOptions(hardware_compatibility="ampere-plus"), TensorrtOptions()
    assert wide.settings(89, "plugin")["kernel_sms"] == list(SMS)
    assert narrow.settings(89, "plugin")["kernel_sms"] == [89]
    assert (wide.form("plugin"), wide.form("body")) == ("python", "none")


def test_warnings_that_differ_in_names_alone_are_one() -> None:
    said = [
        "[W] 'colored' module is not installed, will not use colors when logging.",
        "[W] Importer.hpp:501: A node named a_1 already exists",
        "[I] fine",
        "[W] Importer.hpp:501: A node named b_2 already exists",
        "[W] Tensor guide is unused",
        "[W] Tensor tail is unused",
    ]
    assert warnings_in(said) == [
        "Importer.hpp:501: A node named a_1 already exists (1 more like it)",
        "Tensor guide is unused",
        "Tensor tail is unused",
    ]
