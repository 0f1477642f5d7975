"""The wheel is whole, and the runtime it installs works in a Python that has no torch."""

from __future__ import annotations

import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

import saccade
from tests.house.imports import ROOT, shipped_files

RUNTIME_ROOMS = ("graphs", "plugins", "engines")


def run_in(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python`` away from the tree, so that only what is installed can be imported."""
    return subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, check=False, cwd=python.parent, timeout=120
    )


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    shipped = {path.relative_to(ROOT).as_posix() for path in shipped_files()}
    assert shipped - names_in(wheel) == set()


def test_the_wheel_holds_nothing_else_of_the_tree(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names_in(wheel)}
    [information] = {top for top in tops if top.endswith(".dist-info")}
    assert tops == {"saccade.py", "engines", "exporter", "glyphs", "graphs", "plugins", information}


@pytest.mark.parametrize("role", ["small", "large"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_the_wheel_holds_the_pair(wheel: Path, role: str, file: str) -> None:
    assert f"glyphs/pair/{role}/{file}" in names_in(wheel)


def test_the_wheel_holds_the_page_of_eval(wheel: Path) -> None:
    assert "engines/evaluation/report.html.jinja" in names_in(wheel)


def test_the_pair_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        size = sum(entry.file_size for entry in archive.infolist() if entry.filename.startswith("glyphs/"))
    assert size < 30 * 2**20


def test_the_makefile_installs_the_pinned_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [torch] = [need for need in project["optional-dependencies"]["export"] if need.startswith("torch")]
    assert f"pip install --quiet {torch}\n" in (ROOT / "Makefile").read_text()


def test_cpu_and_gpu_exclude_each_other_for_a_resolver_that_can_say_so() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["uv"]["conflicts"] == [[{"extra": "cpu"}, {"extra": "gpu"}]]


class TestWithoutTorch:
    """In an environment of exactly ``saccade[cpu]``."""

    def test_there_is_no_torch(self, torchless_python: Path) -> None:
        assert "No module named 'torch'" in run_in(torchless_python, "-c", "import torch").stderr

    def test_every_module_of_the_runtime_imports(self, torchless_python: Path) -> None:
        modules = [
            path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            for path in shipped_files()
            if path.relative_to(ROOT).parts[0] in RUNTIME_ROOMS
            and not path.stem.endswith("_torch")
            and path.parent != ROOT / "plugins" / "kernels"  # Triton's files, which only a build imports
            and not path.stem.startswith("openvino_")  # imported when a graph is opened there
        ]
        got = run_in(torchless_python, "-W", "error", "-c", f"import {', '.join(modules)}")
        assert got.returncode == 0, got.stderr

    @pytest.mark.parametrize("verb", saccade.VERBS)
    def test_every_verb_shows_its_help(self, torchless_python: Path, verb: str) -> None:
        got = run_in(torchless_python, "-m", "saccade", verb, "--help")
        assert (got.returncode, got.stderr) == (0, "")
        assert f"Usage: saccade {verb}" in got.stdout

    def test_the_console_script_is_installed(self, torchless_python: Path) -> None:
        got = subprocess.run([str(torchless_python.parent / "saccade"), "--version"], capture_output=True, check=True)
        assert got.stdout.startswith(b"saccade ")

    @pytest.mark.parametrize(
        "arguments",
        [("export", ".", "-o", "out"), ("demo",)],
        ids=["export", "demo"],
    )
    def test_a_verb_that_needs_torch_names_the_extra(self, torchless_python: Path, arguments: tuple[str, ...]) -> None:
        got = run_in(torchless_python, "-m", "saccade", *arguments)
        assert (got.returncode, got.stdout) == (4, "")
        assert got.stderr.splitlines()[-1].endswith(
            "torch is not installed in this Python: run pip install 'saccade[export]'"
        )
