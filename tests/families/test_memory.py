"""The memory of Qwen2.5-VL's tower grows with the number of patches, not its square, in every layer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.families.conftest import Sample

PEAK_OF = """
import sys
from pathlib import Path
import numpy as np
from engines.sessions.session import open_session
from graphs.layouts.patches import patch_feeds
from graphs.spec import spec_from_folder
folder, side = Path(sys.argv[1]), int(sys.argv[2])
spec = spec_from_folder(folder)
session = open_session(folder / "vision.onnx", threads=1)
width = spec.stages["vision"].inputs[0].shape[1]
def run(side):
    pixels = np.zeros((side * side, width), np.float32)
    session.run({"pixel_values": pixels, **patch_feeds([(side, side)], spec.grid)}, host=("visual_embeds",))
    # ru_maxrss would start from the parent's; the high-water mark of this address space does not.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
before = run(8)
print(run(side) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sample", ["qwen2_5_vl"], indirect=True)
def test_peak_grows_in_proportion_to_the_patches(sample: Sample) -> None:
    peaks = {}
    for side in (64, 128):
        command = [sys.executable, "-c", PEAK_OF, str(sample.onnx.folder), str(side)]
        peaks[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # 4,096 and 16,384 patches: four times as many; a map or mask over all of them would take sixteen times as much.
    assert peaks[128] < 6 * peaks[64], f"MiB above a tiny image: {peaks}"
    assert peaks[128] < 16384**2 / 2**20, f"MiB above a tiny image: {peaks}; one byte per pair of patches would be 256"
