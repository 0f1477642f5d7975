"""What docs/polygraphy.md says is run: its commands in their order, on the shipped small model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.imports import ROOT

PAGE = (ROOT / "docs" / "polygraphy.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree(ROOT / "glyphs" / "pair" / "small", tmp_path / "small")
    commands = re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"saccade", "polygraphy", "POLYGRAPHY_USE_TENSORRT_RTX=1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in commands:
        arguments = ["bash", "-c", command]
        done = subprocess.run(
            arguments,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        if "inspect capability" in command:
            assert "Graph is fully supported" in done.stdout + done.stderr
    assert (tmp_path / "embed.engine").stat().st_size > 0


def test_what_is_said_of_trtexec_is_what_was_run() -> None:
    """Its shapes are those of the Polygraphy command, its flags are documented (NVIDIA, trtexec --help of 10.x)."""
    documented = {
        "--onnx",
        "--stronglyTyped",
        "--noTF32",
        "--minShapes",
        "--optShapes",
        "--maxShapes",
        "--saveEngine",
        "--skipInference",
    }
    [trtexec] = re.findall(r"^trtexec (.*)$", PAGE, flags=re.MULTILINE)
    flags = dict(argument.partition("=")[::2] for argument in trtexec.split())
    assert set(flags) <= documented
    [convert] = re.findall(r"^\$ .*polygraphy convert (.*)$", PAGE, flags=re.MULTILINE)
    for which in ("min", "opt", "max"):
        [said] = re.findall(rf"--trt-{which}-shapes ((?:\w+:\[[\d,]+\] ?)+)", convert)
        wanted = ",".join(f"{n}:{dims.replace(',', 'x')}" for n, dims in re.findall(r"(\w+):\[([\d,]+)\]", said))
        assert flags[f"--{which}Shapes"] == wanted
    assert flags["--onnx"] == convert.split()[0]
