"""The process that a system runs in, and the Pythons there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.figures import ROOT
from benchmarks.peers.systems import Python, System
from benchmarks.shapes import QUESTION

PEER_PACKAGES: dict[Python, tuple[str, ...]] = {
    "peers": ("openvino", "openvino-genai", "optimum-intel"),
    "ort-genai": ("onnxruntime-genai", "mobius-onnx"),
}
VERSIONS = """import importlib.metadata as m, json, sys
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"""
RUN_BY = ("onnxruntime", "openvino")  # what a bundle runs on


class Worker:
    """A system in a process of its own. open_ms: what opening took. peak_bytes: most resident memory so far."""

    def __init__(self, system: System, python: str, folder: Path, threads: int) -> None:
        threads = system.threads or threads
        self._log = folder / f"{system.made}.worker.log"
        # A peer's own Python must find its own packages first, and of ours nothing but this one.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        place = str(folder / system.made)
        start = {"runtime": system.runtime, "folder": place, "threads": threads, "options": system.options}
        self.peak_bytes = 0
        self.open_ms: float = self._told(start)["open_ms"]

    def ask(self, size: tuple[int, int], tokens: int, seed: int) -> dict[str, Any]:
        """One question about a fresh image of (height, width); RuntimeError where the process ended."""
        height, width = size
        return self._told({"height": height, "width": width, "seed": seed, "question": QUESTION, "tokens": tokens})

    def ask_about(self, image: Path, question: str, tokens: int) -> dict[str, Any]:
        """A whole answer to a question about a file; RuntimeError where the process ended."""
        return self._told({"image": str(image), "question": question, "tokens": tokens})

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _told(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"its process ended: {' '.join(last)[:300]}")
        result: dict[str, Any] = json.loads(answer)
        self.peak_bytes = result.get("peak_bytes", 0)
        return result


@dataclass(frozen=True)
class Pythons:
    """The interpreters: what runs bundles (``saccade[cpu,openvino]``, without torch), and what runs the peers."""

    runtime: Path | None = None
    peers: Path | None = None
    ort_genai: Path | None = None

    def of(self, which: Python) -> str | None:
        """The interpreter of a system, None where it was not given; this one has torch."""
        given = {
            "runtime": self.runtime or sys.executable,
            "torch": sys.executable,
            "peers": self.peers,
            "ort-genai": self.ort_genai,
        }[which]
        return str(given) if given else None

    def versions(self) -> dict[str, str]:
        """Of the peers' packages, each in the interpreter that was given for it; those that it has."""
        found: dict[str, str] = {}
        for which, packages in PEER_PACKAGES.items():
            found |= self.installed(which, *packages)
        return found

    def runtimes(self) -> dict[str, str]:
        """Of what bundles run on, in the interpreter that runs them."""
        return self.installed("runtime", *RUN_BY)

    def installed(self, which: Python, *packages: str) -> dict[str, str]:
        """The versions of packages that an interpreter has; none where it was not given."""
        if not (python := self.of(which)):
            return {}
        asked = [python, "-c", VERSIONS, *packages]
        versions: dict[str, str] = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        return versions
