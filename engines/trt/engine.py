"""One lowered file → one engine, built in a process of its own whose death is an error and not ours.

TensorRT-RTX builds for a GPU that need not be here: parsing, building and reading back need no driver. Full TensorRT
times its kernels on the GPU that is here, and builds for that one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.bundles.manifest import Plugins
from engines.sessions.host_memory import free_memory
from engines.trt.bounds import Profile
from engines.trt.flavour import RTX, Flavour
from engines.trt.worker import Request
from graphs.console import Step, say, step
from graphs.errors import OperationFailed, UsageError
from graphs.files import atomic_file
from graphs.versions import missing, require

# Peak host memory of a build, in weights as they are stored, by their bits: measured 2.9 with one profile for 16. For 8
# and 4 bits an upper bound: the whole build's peak was 4.8 and 6.5 of its decoder (6 layers of width 4,096).
WEIGHTS_IN_MEMORY = {None: 3.0, 8: 5.0, 4: 7.0}
OVERHEAD_BYTES = 600 << 20  # the builder itself, without a weight
WORKER = ["-m", "engines.trt.worker"]
WARNING = "[W] "  # how Polygraphy writes what TensorRT warns of
ROOT = Path(__file__).parent.parent.parent


def checked_sms(sms: tuple[int, ...]) -> list[int]:
    """The wanted compute capabilities; UsageError for none, or for one that TensorRT-RTX does not build for."""
    known = ", ".join(map(str, RTX.sms))
    if not sms:
        raise UsageError(
            f"an engine is built for a GPU; give its compute capability, such as --sm 89 for 8.9 (known are {known})"
        )
    if wrong := [sm for sm in sms if sm not in RTX.sms]:
        raise UsageError(f"TensorRT-RTX engines are not built for SM {wrong[0]}; known are {known}")
    return sorted(set(sms))


def memory_needed(weight_bytes: int, bits: int | None = None) -> int:
    """Host memory that building an engine takes at its peak, in bytes: an estimate. bits: of quantised weights."""
    return int(WEIGHTS_IN_MEMORY[bits] * weight_bytes) + OVERHEAD_BYTES


def refuse_too_large(weight_bytes: int, what: str, flavour: Flavour, bits: int | None = None) -> None:
    """OperationFailed where a build needs more host memory than is free; said where that is not known."""
    needed, free = memory_needed(weight_bytes, bits), free_memory()
    if free is None:
        say(
            f"building {what} takes about {needed / 1e9:.1f} GB of memory, and how much is free cannot be determined "
            "on this machine"
        )
    elif needed > free:
        where = "on a larger machine, for the engine may run elsewhere" if flavour.sms else "where such a GPU has more"
        raise OperationFailed(
            f"building {what} takes about {needed / 1e9:.1f} GB of memory ({WEIGHTS_IN_MEMORY[bits]:g} × weights), and "
            f"{free / 1e9:.1f} GB are free; free some, choose --precision int8 or int4, or build it {where}"
        )


def engine_from_onnx(
    onnx: Path,
    engine: Path,
    *,
    sms: list[int],
    profiles: dict[str, Profile],
    ops: dict[str, str],
    plugins: Plugins = "none",
    parse_only: bool = False,
    flavour: Flavour = RTX,
    settings: dict[str, Any] | None = None,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Build ``engine`` from a lowered file and return the worker's answer: tensorrt, reading, bytes, warnings.

    ops: the file's nodes of our domain, name → op. plugins: what is registered to serve them. settings: as in
    ``engines.trt.worker.Request``. timing_cache: read where it exists, and replaced in one step by what the build made
    of it. Errors: BackendMissing where TensorRT or Polygraphy is not installed, OperationFailed with TensorRT's own
    last words where it refuses or dies.
    """
    refuse_missing(flavour)
    with tempfile.TemporaryDirectory(prefix="saccade-build-") as held, step(f"building {engine.name}") as shown:
        place = Path(held)
        request = Request(
            str(onnx),
            str(engine),
            str(place / "answer.json"),
            sms,
            profiles,
            ops,
            flavour.target,
            plugins,
            parse_only,
            settings or {},
            str(timing_cache.absolute()) if timing_cache else "",
            str(place / "timings") if timing_cache else "",
        )
        (place / "request.json").write_text(json.dumps(asdict(request)), "utf-8")
        said = place / "stderr"
        with said.open("wb") as stderr:
            code = _run([sys.executable, *WORKER, str(place / "request.json")], place, stderr, shown)
        answer = place / "answer.json"
        if code or not answer.is_file():
            raise OperationFailed(f"{flavour.title} {_how(code)} on {onnx.name}: {_last_words(said)}")
        if timing_cache and not parse_only:
            with atomic_file(timing_cache) as partial:
                partial.write_bytes((place / "timings").read_bytes())
        result: dict[str, Any] = json.loads(answer.read_text("utf-8"))
        return {**result, "warnings": warnings_in(said.read_text("utf-8", "replace").splitlines())}


def refuse_missing(flavour: Flavour) -> None:
    """BackendMissing where TensorRT or Polygraphy is not installed, OperationFailed for versions that are not ours."""
    if flavour is RTX:
        require(*flavour.distributions)
    elif flavour.version() is None:
        raise missing(flavour.module)
    require("polygraphy")


def warnings_in(lines: Iterable[str]) -> list[str]:
    """TensorRT's warnings among what the worker wrote, one line each; those that differ in names alone are one."""
    found: dict[str, tuple[str, int]] = {}
    for line in lines:
        # Polygraphy's own, about colours on a terminal, is none of TensorRT's.
        if line.startswith(WARNING) and "'colored' module" not in line:
            message = " ".join(line.removeprefix(WARNING).split())
            key = re.sub(r"\S*[_\d]\S*", "…", message)
            first, count = found.get(key, (message, 0))
            found[key] = first, count + 1
    return [f"{first} ({count - 1} more like it)" if count > 1 else first for first, count in found.values()]


def _run(command: list[str], place: Path, stderr: Any, shown: Step) -> int:
    """Run the worker to its end, its progress shown; killed where we are interrupted."""
    from plugins.trt import process_environment

    environment = process_environment(place)
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = ":".join(paths)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True) as worker:
        assert worker.stdout
        try:
            for line in worker.stdout:
                phase, counts = _event_in_words(line)
                shown.note(phase)
                if counts:
                    shown.advance()
            return worker.wait()
        except BaseException:
            worker.kill()
            raise


def _event_in_words(line: str) -> tuple[str, bool]:
    """What TensorRT is at, and whether one more of its steps is done."""
    try:
        event = json.loads(line)
    except ValueError:
        return "", False
    counts = "step" in event
    return f"{event.get('phase', '')}" + (f" {event['step']} of {event['steps']}" if counts else ""), counts


def _how(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"failed (exit code {code})"


def _last_words(said: Path) -> str:
    """The last errors that TensorRT or Python wrote, as one sentence."""
    lines = [line.strip() for line in said.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line or "Error" in line or "terminate" in line]
    return " / ".join(" ".join(line.split())[:300] for line in (errors or lines)[-2:]) or "it said nothing"
