"""``python -m benchmarks.build_memory EXPORT OUT``: what building TensorRT-RTX engines of an export takes of the host.

Runs ``saccade build EXPORT -o OUT --target rtx --sm 89 --precision fp16`` and reads, ten times a second, how much
memory the processes of the build hold together (VmRSS, pages of weight files that are mapped included); needs Linux
and no GPU. At most 3.5 times the export's weights is what is wanted. One JSON document goes to stdout and to
``benchmarks/results/build_memory.json``. An export of 1 B parameters in fp16:

    python -m benchmarks.shapes llava-1b checkpoint --dtype float16
    saccade export checkpoint --in-place --role alone --policy sgl
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from engines.bundles.manifest import manifest_of
from engines.trt.engine import memory_needed
from graphs.errors import OperationFailed, SaccadeError
from graphs.files import atomic_file
from graphs.versions import installed_version

RESULT = Path(__file__).parent / "results" / "build_memory.json"
BUILD = ("--target", "rtx", "--sm", "89", "--precision", "fp16")
PAUSE = 0.1  # seconds between two readings


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("export", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(export: Path, out: Path) -> None:
    """Build, print, write."""
    try:
        document = measure(export, out)
    except SaccadeError as e:
        click.echo(f"benchmarks.build_memory: {e}", err=True)
        sys.exit(e.exit_code)
    text = json.dumps(document, indent=2)
    with atomic_file(RESULT) as partial:
        partial.write_text(text + "\n", "utf-8")
    click.echo(text)


def measure(export: Path, out: Path) -> dict[str, Any]:
    """The document; OperationFailed where the build fails, with its own words on stderr."""
    command = [sys.executable, "-m", "saccade", "build", str(export), "-o", str(out), *BUILD]
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as build:
        while build.poll() is None:
            peak = max(peak, sum(held_by(pid) for pid in family_of(build.pid)))
            time.sleep(PAUSE)
    seconds = time.monotonic() - start
    if build.returncode:
        raise OperationFailed(f"the build ended with exit code {build.returncode}: see its messages above")
    [member] = manifest_of(out).members.values()
    engines = member.targets["rtx"].engines
    largest = max(engine.weight_bytes for engine in engines.values())
    weights = sum(engine.weight_bytes for engine in engines.values())
    return {
        "schema": "saccade.benchmark.build_memory/1",
        "conditions": {
            "command": f"saccade build EXPORT -o OUT {' '.join(BUILD)}",
            "cores": os.cpu_count(),
            "load_1min": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("saccade", "tensorrt-rtx", "polygraphy")},
            "date_utc": datetime.now(UTC).date().isoformat(),
        },
        "engines": {
            stage: {"bytes": engine.bytes, "weight_bytes": engine.weight_bytes} for stage, engine in engines.items()
        },
        "peak_bytes": peak,
        "peak_per_weight": round(peak / weights, 2),
        "peak_per_weight_of_the_largest_engine": round(peak / largest, 2),
        "estimated_bytes": memory_needed(largest),
        "seconds": round(seconds, 1),
    }


def family_of(pid: int) -> list[int]:
    """A process and all that it started and that still run."""
    found = [pid]
    for one in found:
        try:
            told = [(task / "children").read_text() for task in Path(f"/proc/{one}/task").iterdir()]
        except OSError:  # it has just ended
            continue
        found += [int(child) for children in told for child in children.split()]
    return found


def held_by(pid: int) -> int:
    """Bytes of a process in memory; 0 where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


if __name__ == "__main__":
    main()
