"""Making what a system runs from, and the process it runs in."""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import click

from benchmarks.peers.systems import MADE, Python, System, plans
from benchmarks.shapes import LAYERS, QUESTION, SHAPES

ROOT = Path(__file__).parents[2]
PAIR = ROOT / "glyphs" / "pair"
PEER_PACKAGES: dict[Python, tuple[str, ...]] = {
    "peers": ("openvino", "openvino-genai", "optimum-intel"),
    "ort-genai": ("onnxruntime-genai", "mobius-onnx"),
}
VERSIONS = """import importlib.metadata as m, json, sys
found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in m.distributions()}
print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"""
KEEP = 0.3217  # behind layer 1 of 24: (0.35 · 24 − 1) / 23


def made(name: str, folder: Path, shape: str, python: str, scratch: Path | None = None) -> str:
    """Make what a system runs from, where it is not there; what went wrong, or "".

    scratch: where exports lie while they are built from; None: beside the systems, where they stay for the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shape in SHAPES:
        if not (folder / "checkpoint").exists():
            SHAPES[shape](folder / "checkpoint")
        for plan, text in plans(LAYERS[shape]).items():
            (folder / f"{plan}.toml").write_text(text)
    if not (folder / name).exists():
        with TemporaryDirectory(dir=scratch) if scratch else nullcontext(folder) as exports:
            if why := _run(name, folder, Path(exports), python):
                return why
    share_weights(folder / name, folder / "checkpoint")
    return ""


def _run(name: str, folder: Path, exports: Path, python: str) -> str:
    """Run the commands of a line of ``MADE``, but for exports that are there; what went wrong, or ""."""
    places = {
        "checkpoint": folder / "checkpoint",
        "work": folder,
        "exports": exports,
        "pair": PAIR,
        "keep": KEEP,
        "saccade": f"{sys.executable} -m saccade",
        "optimum": Path(python).parent / "optimum-cli",
        "mobius": Path(python).parent / "mobius",
        "python": python,
    }
    log, seconds = folder / f"{name}.log", []
    for command in MADE[name]:
        words = shlex.split(command.format(**places))
        if "-o" in words and Path(words[words.index("-o") + 1]).exists():
            continue
        click.echo(" ".join(words), err=True)
        start = time.perf_counter()
        with log.open("a") as file:
            # A peer's command may be a module of ours; no results hold this machine's paths.
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            if subprocess.run(words, stdout=file, stderr=file, env=environment, check=False).returncode:
                last = log.read_text(errors="replace").strip().splitlines()[-1]
                return f"{Path(words[0]).name} failed: {last.replace(f'{folder}/', '')[:200]}"
        seconds.append(round(time.perf_counter() - start, 1))
    (folder / f"{name}.seconds.json").write_text(json.dumps(seconds))
    return ""


def share_weights(folder: Path, checkpoint: Path) -> None:
    """Turn files below ``folder`` that repeat a weight file of the checkpoint into hard links to it."""
    if folder.resolve() == checkpoint.resolve():
        return
    for own in checkpoint.glob("*.safetensors"):
        for copy in folder.rglob(own.name):
            there = copy.stat().st_dev == own.stat().st_dev
            if there and not copy.samefile(own) and filecmp.cmp(own, copy, shallow=False):
                link = copy.with_suffix(".link")
                link.unlink(missing_ok=True)
                link.hardlink_to(own)
                link.replace(copy)


class Worker:
    """A system in a process of its own. open_ms: what opening took. peak_bytes: most resident memory so far."""

    def __init__(self, system: System, python: str, folder: Path, threads: int) -> None:
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

    def installed(self, which: Python, *packages: str) -> dict[str, str]:
        """The versions of packages that an interpreter has; none where it was not given."""
        if not (python := self.of(which)):
            return {}
        asked = [python, "-c", VERSIONS, *packages]
        versions: dict[str, str] = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        return versions
