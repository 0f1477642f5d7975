"""Another version of a pinned library, or a missing one, is one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.processing import Processor
from engines.sessions.ort_session import OrtSession
from graphs import versions
from graphs.errors import BackendMissing, OperationFailed
from graphs.rules import export_from_folder
from graphs.spec import PROCESSOR_FOLDER


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    table: dict[str, str] = {}
    monkeypatch.setattr(versions, "installed_version", table.get)
    return table


def pinned(name: str) -> str:
    [specifier] = versions.pins()[name][0].specifier
    assert specifier.operator == "==", f"{name} is not pinned"
    return specifier.version


@pytest.mark.parametrize(
    "name", ["torch", "onnxscript", "transformers", "onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx"]
)
def test_what_we_lean_on_from_inside_is_pinned(name: str) -> None:
    assert pinned(name)


def test_the_pinned_version_is_accepted_whatever_its_build(installed: dict[str, str]) -> None:
    installed["torch"] = pinned("torch") + "+cpu"
    versions.require("torch")


def test_another_version_is_refused_with_the_remedy(installed: dict[str, str]) -> None:
    installed["torch"] = "2.12.1"
    with pytest.raises(OperationFailed) as refused:
        versions.require("torch")
    wanted = f"torch=={pinned('torch')}"
    assert str(refused.value) == (
        f"torch 2.12.1 is installed, this release of saccade needs {wanted}: run pip install '{wanted}'"
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("torch", "run pip install 'saccade[export]'"),
        ("onnxruntime", "run pip install 'saccade[cpu]' or 'saccade[gpu]'"),
        ("transformers", "run pip install saccade"),
        ("tensorrt_rtx", "run pip install 'saccade[rtx]'"),
        ("sklearn.datasets", "run pip install 'saccade[train]'"),
        ("elsewhere", "run pip install elsewhere"),
    ],
)
def test_a_missing_library_names_the_extra(name: str, remedy: str) -> None:
    assert str(versions.missing(name)).endswith(f" is not installed in this Python: {remedy}")


def test_a_missing_library_is_refused(installed: dict[str, str]) -> None:
    with pytest.raises(BackendMissing, match=r"saccade\[export\]"):
        versions.require("torch")


def test_either_onnxruntime_serves(installed: dict[str, str]) -> None:
    installed["onnxruntime-gpu"] = pinned("onnxruntime-gpu")
    versions.require("onnxruntime")


def test_both_onnxruntimes_are_refused(installed: dict[str, str]) -> None:
    installed.update({"onnxruntime": pinned("onnxruntime"), "onnxruntime-gpu": pinned("onnxruntime-gpu")})
    with pytest.raises(OperationFailed, match="onnxruntime and onnxruntime-gpu are both installed") as refused:
        versions.require("onnxruntime")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in str(refused.value)


@pytest.fixture
def nothing_asked_yet() -> Iterator[None]:
    versions.require_once.cache_clear()
    yield
    versions.require_once.cache_clear()


@pytest.mark.usefixtures("nothing_asked_yet")
@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("onnxruntime", lambda folder: OrtSession(folder / "decoder.onnx")),
        ("transformers", lambda folder: Processor(folder, None).tokenizer),  # type: ignore[arg-type]
        ("onnx-ir", export_from_folder),
    ],
)
def test_what_is_used_at_run_time_is_refused_there(
    installed: dict[str, str], tmp_path: Path, name: str, opened: Callable[[Path], Any]
) -> None:
    (tmp_path / PROCESSOR_FOLDER).mkdir()
    installed.update({"onnx": pinned("onnx"), name: "0.0.1"})
    with pytest.raises(OperationFailed, match=f"{name} 0.0.1 is installed, this release of saccade needs"):
        opened(tmp_path)
