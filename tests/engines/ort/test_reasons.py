"""Why a GPU target cannot be had: each reason by a stand-in of the driver, the loader and the packages."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from engines.sessions import machine, ort_providers
from engines.sessions.nvidia import driver_reasons, library_reasons
from engines.sessions.ort_providers import CUDA, CUDA_LIBRARIES, PROVIDERS, RTX, TENSORRT, reasons
from engines.targets import TABLE, why_not
from graphs import versions as installed

ALL = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def driver(*, init: int = 0, version: int = 13000, count: int = 1, sm: int = 89) -> Any:
    """A libcuda.so.1 that answers so."""

    def gives(number: int) -> Any:
        def call(out: Any, *_: int) -> int:
            out._obj.value = number
            return 0

        return call

    def attribute(out: Any, which: int, device: int) -> int:
        out._obj.value = {75: sm // 10, 76: sm % 10}[which]
        return 0

    library = SimpleNamespace(
        cuInit=lambda flags: init,
        cuDriverGetVersion=gives(version),
        cuDeviceGetCount=gives(count),
        cuDeviceGet=gives(0),
        cuDeviceGetAttribute=attribute,
    )
    return lambda name: library


def nothing(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, []),
        ({"init": 100}, ["the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES may hide it)"]),
        ({"init": 999}, ["the NVIDIA driver does not start (cuInit gives 999)"]),
        ({"count": 0}, ["the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES may hide it)"]),
        (
            {"version": 12040},
            ["the NVIDIA driver serves CUDA 12.4, and CUDA 13 is needed (driver 580 or newer)"],
        ),
        ({"version": 13010, "sm": 121}, []),
        ({"sm": 70}, ["the GPU is of SM 7.0, and CUDA 13 begins with 7.5"]),
    ],
)
def test_what_the_driver_answers(answers, said):
    assert driver_reasons(13, driver(**answers)) == said


def test_no_driver():
    assert driver_reasons(13, nothing) == ["no NVIDIA driver is loaded (libcuda.so.1 is not found)"]


def test_libraries(tmp_path):
    def load(name: str) -> None:
        if name == "libc.so.2":
            raise OSError("libm.so.9: cannot open shared object file: No such file or directory")
        if name != "liba.so.1":
            nothing(name)

    wanted = {"liba.so.1": "pip install a", "libb.so.2": "pip install b", "libc.so.2": "pip install c"}
    found = library_reasons(wanted, tmp_path, load)
    assert found[0] == "libb.so.2 is not found (pip install b)"
    assert found[1].startswith("libc.so.2 cannot be loaded (libm.so.9: cannot open")
    (tmp_path / "libb.so.2").touch()
    loaded: list[str] = []
    assert library_reasons({"libb.so.2": "pip install b"}, tmp_path, loaded.append) == []
    assert loaded == [str(tmp_path / "libb.so.2")]


@pytest.fixture
def here(monkeypatch):
    """``here(versions, providers)``: a machine with a good GPU, these packages, and all libraries but some."""

    def install(versions: dict[str, str], providers: list[str] | None = None, missing: tuple[str, ...] = ()) -> None:
        def chatty() -> None:
            sys.stdout.write("Failed to load libcublasLt.so.13: cannot open shared object file")

        runtime = SimpleNamespace(preload_dlls=chatty, get_available_providers=lambda: providers or ALL)
        for module in (ort_providers, installed):
            monkeypatch.setattr(module, "installed_version", versions.get)
        monkeypatch.setattr(ort_providers, "driver_reasons", lambda major: [])
        monkeypatch.setattr(
            ort_providers,
            "library_reasons",
            lambda libraries, folder: [f"{name} is not found" for name in libraries if name in missing],
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        monkeypatch.setattr(ort_providers, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=None))

    return install


GPU = {"onnxruntime-gpu": "1.31.1"}


def test_a_machine_that_has_all(here, capsys):
    here(GPU)
    assert reasons(CUDA) == reasons(TENSORRT) == []
    assert capsys.readouterr().out == "", "what the runtime prints is no answer of ours"


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({}, r"^onnxruntime-gpu is not installed \(pip install 'saccade\[gpu\]'\)$"),
        ({"onnxruntime": "1.31.1"}, "not installed .*; onnxruntime, which is here, serves the CPU only"),
        ({"onnxruntime": "1.31.1", **GPU}, "both installed and overwrite each other .pip uninstall onnxruntime onnx"),
    ],
)
def test_packages(here, versions, says):
    here(versions)
    for provider in PROVIDERS.values():
        [why] = reasons(provider)
        assert re.search(says, why)


def test_a_build_without_the_provider(here):
    here(GPU)
    assert reasons(RTX) == [
        "onnxruntime-gpu 1.31.1 was built without NvTensorRTRTXExecutionProvider "
        "(it has TensorrtExecutionProvider, CUDAExecutionProvider, CPUExecutionProvider)"
    ]
    here(GPU, [*ALL, RTX.name])
    assert reasons(RTX) == []


def test_missing_libraries_all_at_once(here):
    here(GPU, missing=("libcudnn.so.9", "libcurand.so.10", "libnvinfer.so.10"))
    assert reasons(CUDA) == ["libcurand.so.10 is not found", "libcudnn.so.9 is not found"]
    assert "libnvinfer.so.10 is not found" in reasons(TENSORRT)


def test_every_gpu_target_has_a_session_and_its_reasons():
    assert {t.name for t in TABLE if (t.runs, t.memory) == ("graphs", "device")} == set(PROVIDERS)
    for target, provider in PROVIDERS.items():
        assert provider.target == target
        assert CUDA_LIBRARIES.items() <= provider.libraries.items()


@pytest.mark.skipif(not driver_reasons(13), reason="a GPU is here")
class TestWithoutGpu:
    @pytest.mark.parametrize("target", sorted(PROVIDERS))
    def test_a_bundle_is_built_and_refused_with_every_reason(self, exports, tmp_path, saccade_cli, target):
        bundle = tmp_path / "pair.bundle"
        built = saccade_cli("build", exports["small"], exports["large"], "-o", bundle, "--target", target)
        assert built.code == 0, built.stderr
        for verb in (("verify", bundle), ("run", bundle, "what is this?")):
            got = saccade_cli(*verb)
            assert (got.code, got.stdout) == (4, "")
            [said] = [line for line in got.stderr.splitlines() if "cannot be run here" in line]
            assert all(why in said for why in why_not(target))
            assert "--target cpu" in said

    def test_show_machine_names_every_target_and_why_not(self, saccade_cli):
        found = json.loads(saccade_cli("show", "machine", "--json").stdout)["runtimes"]
        assert [target.name for target in TABLE] == list(found)
        for target in PROVIDERS:
            assert found[target]["state"] == f"not here: {'; '.join(why_not(target))}"
            assert f"target {target}: not here" in saccade_cli("show", "machine").stdout

    def test_options_of_engines_are_not_for_a_target_of_graphs(self, exports, tmp_path, saccade_cli):
        out = tmp_path / "x.bundle"
        got = saccade_cli("build", exports["small"], exports["large"], "-o", out, "--target", "cuda", "--sm", 89)
        assert got.code == 2


def test_either_onnxruntime_serves_the_cpu(monkeypatch):
    monkeypatch.setattr(machine, "installed_version", GPU.get)
    assert machine._runtime("cpu")["state"] == "ready, onnxruntime-gpu 1.31.1"
