"""A process that has opened and closed sessions in OpenVINO still handles signals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.engines.openvino.conftest import needs_openvino
from tests.engines.run.conftest import TinyPair

SCRIPT = """
import gc, signal, sys
from pathlib import Path
from engines.sessions.openvino_session import OpenVinoSession

opened = [OpenVinoSession(Path(file)) for file in sys.argv[1:]]
while opened:
    del opened[0]
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@needs_openvino
def test_signals_are_handled_behind_sessions_that_are_closed(tiny_pair: TinyPair) -> None:
    files = [tiny_pair.exports["small"] / f"{stage}.onnx" for stage in ("vision", "embed")]
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *files], cwd=root, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "handled\n"), ran.stderr
