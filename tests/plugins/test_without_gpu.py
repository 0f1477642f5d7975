"""What needs a GPU says so in one sentence and an exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_the_benchmark_of_kernels():
    command = [sys.executable, "-m", "benchmarks.kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("benchmarks.kernels: torch sees no CUDA device here")
    assert len(done.stderr.splitlines()) == 1


def test_make_test_gpu():
    command = ["/usr/bin/env", "make", "test-gpu", f"PYTHON_GPU={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "sees no CUDA device here" in done.stderr
