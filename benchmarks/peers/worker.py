"""One runtime in a process of its own: ``python -m benchmarks.peers.worker``; a JSON line in, a JSON line out.

First line in: {"runtime", "folder", "threads", "options"}; out: {"open_ms"}. Then for each
{"height", "width", "seed", "question", "tokens"}, or {"image": a file, "question", "tokens"} for a whole answer, what
it took, "whole_ms" from the pixels on, and the peak memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.runtimes import RUNTIMES


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer

    def tell(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")

    wanted = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    runtime = RUNTIMES[wanted["runtime"]](Path(wanted["folder"]), wanted["threads"], **wanted["options"])
    tell({"open_ms": 1e3 * (time.perf_counter() - start)})
    for line in sys.stdin:
        asked = json.loads(line)
        image, whole = image_of(asked), "image" in asked
        start = time.perf_counter()
        found = runtime.ask(image, asked["question"], asked["tokens"], whole=whole)
        tell(found | {"whole_ms": 1e3 * (time.perf_counter() - start), "peak_bytes": peak_bytes()})


def image_of(asked: dict[str, Any]) -> np.ndarray:
    """uint8 [H, W, 3]: the named file, or a fresh one, for a runtime that keeps prefixes must not meet one again."""
    if "image" in asked:
        from PIL import Image

        return np.asarray(Image.open(asked["image"]).convert("RGB"))
    return np.random.default_rng(asked["seed"]).integers(0, 256, (asked["height"], asked["width"], 3), dtype=np.uint8)


def peak_bytes() -> int:
    """The most resident memory that this process had, mapped files included."""
    status = Path("/proc/self/status").read_text("ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
