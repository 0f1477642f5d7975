"""What needs a GPU says so in one sentence and an exit code."""

from __future__ import annotations

import json
import os
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


SMALL = """
import json
from benchmarks import kernels
kernels.DEVICE = "cpu"
kernels.ATTENTION, kernels.CACHES = ((4, 2, 16, 40, 5),), ((4, 2, 16, 64, 40),)
kernels.SELECTION, kernels.HIDDEN = ((50, 20),), ((50, 20, 8),)
results, made = [], []
kernels.median_us = lambda call, launches=1: made.append(call()) or 1.0
kernels.row = lambda *told, row=kernels.row: results.append(made[:]) or made.clear() or row(*told)
kinds = ("attention", "cached", "selection", "compaction", "prune_point")
rows = [row for kind in kinds for row in getattr(kernels, f"{kind}_rows")(2.0)]
assert sorted(map(len, results)) == [2, 2, 2, 3, 3]
for every in results:
    peer = every[-1]  # a kernel may fill a buffer, and comes first
    assert all((one[:, :peer.shape[1]] - peer).abs().max() < 1e-3 for one in every), every
print(json.dumps(rows))
"""


def test_its_kernels_and_their_peers_are_the_same_function():
    """Every row of the benchmark, at small sizes, interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SMALL]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ops = [row["op"] for row in json.loads(done.stdout)]
    assert ops == ["AttentionReceived", "ReceivedInCache", "KeepTopK", "CompactRows", "KeepTopK, CompactRows"]
    assert json.loads(done.stdout)[3]["share_of_copy"] == (2 * 20 * 8 * 2 + 8 * 20) / 1e3 / 2


def test_make_test_gpu():
    command = ["/usr/bin/env", "make", "test-gpu", f"PYTHON_GPU={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "sees no CUDA device here" in done.stderr
