"""What a figure depends on, and where it is kept: every machine has a folder of its own below benchmarks/results.

What is measured about the product itself, whatever runs it (draft, build_memory, findings), lies beside these folders.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from graphs.files import atomic_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What decides which kernels run, the widest last: without these names two machines' figures do not compare.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def keep(name: str, document: dict[str, Any]) -> Path:
    """Write ``name``.json into this machine's folder, whole or not at all; the path."""
    path = RESULTS / machine() / f"{name}.json"
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return path


def machine() -> str:
    """This machine's folder: the processor's name, and amx where it multiplies tiles (amd-epyc, intel-xeon-amx)."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(\w+\)|processor|cpu|@.*", "", cpu().lower()))
    return "-".join(words + ["amx"] * ("amx_bf16" in instructions()))


def conditions(shape: str, rounds: int, asks: int, tokens: int, threads: int, note: str) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "shape": shape,
        "cpu": cpu(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
        "commit": commit(),
        "date_utc": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
        "asks_a_round": asks,
        "tokens": tokens,
        "statistic": "median, minimum, maximum",
        "load_before": round(os.getloadavg()[0], 2),
        "note": note,
    }


def commit() -> str:
    """The source tree's commit, with "+" where anything but results and pages differs from it; "" outside of git."""
    beside = (":!benchmarks/results", ":!docs", ":!README.md")
    told = [git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", ".", *beside)]
    return told[0] + ("+" if told[0] and told[1] else "")


def git(*words: str) -> str:
    """What git says of this source tree, "" where it fails or is not there."""
    try:
        return subprocess.run(
            [shutil.which("git") or "git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def spread(values: list[float]) -> list[float]:
    """[median, minimum, maximum]."""
    return [round(value, 3) for value in (median(values), min(values), max(values))]


def cpu() -> str:
    """The processor's name as it tells it itself; the platform's where /proc/cpuinfo does not."""
    return told("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Those of ``INSTRUCTIONS`` that the processor has."""
    flags = told("flags").split()
    return [name for name in INSTRUCTIONS if name in flags]


def told(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
