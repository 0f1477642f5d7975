"""Fixtures every room's tests may use: the front door in-process, and a Python without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from tests.house.closure import link_closure, wheel_from_tree

ROOT = Path(__file__).parent.parent

# How long one example takes says how busy the machine is, nothing of the code.
settings.register_profile("saccade", deadline=None)
settings.load_profile("saccade")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What opened bundles are remembered by lies in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Outcome:
    """What a verb left behind."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def saccade_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a verb in this process: ``saccade_cli("run", bundle, "--image", image, "question")``."""
    import saccade

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = saccade.run([str(a) for a in arguments])
        out = capsys.readouterr()
        return Outcome(code, out.out, out.err)

    return call


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without the network."""
    return wheel_from_tree(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def torchless_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that holds our wheel and exactly what ``saccade[cpu]`` asks for: no torch, no onnxscript."""
    home = tmp_path_factory.mktemp("torchless") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    link_closure(python, "saccade", extras={"cpu"})
    return python
