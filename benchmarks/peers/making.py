"""Making what a system runs from, once, and again where it was not finished or our source is another one.

Beside a folder NAME lie NAME.seconds.json, what its commands took, written when the last one is through, and
NAME.source, a digest of what it was made from; a peer's has none, so a change of ours leaves its models alone.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.figures import ROOT
from benchmarks.peers.systems import MADE, plans
from benchmarks.shapes import LAYERS, SHAPES

PAIR = ROOT / "glyphs" / "pair"
SOURCES = ("exporter", "graphs", "plugins", "engines", "saccade.py")
QUESTIONS = ("glyphs/data.py", "glyphs/scenes.py", "glyphs/scans.npz")  # what the pair is calibrated on
KEEP = 0.3217  # behind layer 1 of 24: (0.35 · 24 − 1) / 23


def made(name: str, folder: Path, shape: str, python: str, scratch: Path | None = None) -> str:
    """Make what a system runs from, where it is not there as it would be made now; what went wrong, or "".

    scratch: where exports lie while they are built from; None: beside the systems, where they stay for the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shape in SHAPES:
        if not (folder / "checkpoint").exists():
            shutil.rmtree(folder / "checkpoint.partial", ignore_errors=True)
            SHAPES[shape](folder / "checkpoint.partial")
            (folder / "checkpoint.partial").rename(folder / "checkpoint")
        for plan, text in plans(LAYERS[shape]).items():
            (folder / f"{plan}.toml").write_text(text)
    if MADE[name] and not stands(folder / name, source_of(MADE[name], folder)):
        with TemporaryDirectory(dir=scratch) if scratch else nullcontext(folder) as exports:
            if why := _run(name, folder, Path(exports), python):
                return why
    share_weights(folder / name, folder / "checkpoint")
    return ""


def stands(place: Path, source: str) -> bool:
    """Whether a folder is finished and of this source; else it is removed, and the reason told."""
    if not place.exists():
        return False
    marks = seconds_file(place), place.with_name(f"{place.name}.source")
    was = marks[1].read_text() if marks[1].exists() else ""
    if marks[0].exists() and was == source:
        return True
    why = "was made from another source" if marks[0].exists() else "was not finished"
    click.echo(f"{place.name} {why}; it is made again", err=True)
    for mark in marks:
        mark.unlink(missing_ok=True)
    shutil.rmtree(place)
    return False


def finished(place: Path, seconds: list[float], source: str) -> None:
    """Say that a folder is done; the seconds last, for they are what says so."""
    if source:
        place.with_name(f"{place.name}.source").write_text(source)
    seconds_file(place).write_text(json.dumps(seconds))


def seconds_file(place: Path) -> Path:
    """What each command took that made a folder."""
    return place.with_name(f"{place.name}.seconds.json")


def source_of(commands: tuple[str, ...], folder: Path) -> str:
    """A digest of our source, the commands and what they read beside a checkpoint; "" where nothing in them is ours."""
    text = "\n".join(commands)
    if "{saccade}" not in text and "{pair}" not in text:
        return ""
    read = [folder / f"{plan}.toml" for plan in ("fastv", "star") if f"{plan}.toml" in text]
    read += [path for path in sorted(PAIR.rglob("*.*")) if "{pair}" in text and path.suffix != ".md"]
    read += [ROOT / name for name in QUESTIONS if " calibrate " in text]
    digest = hashlib.sha256(f"{text}\n{KEEP}\n{of_code()}".encode())
    for path in read:
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path.exists() else b"")
    return digest.hexdigest()


@cache
def of_code() -> str:
    """A digest of ``SOURCES``' Python, names and bytes."""
    digest = hashlib.sha256()
    for path in (path for name in SOURCES for path in sorted([ROOT / name, *(ROOT / name).rglob("*.py")])):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _run(name: str, folder: Path, exports: Path, python: str) -> str:
    """Run the commands of a line of ``MADE``, but for exports that stand; what went wrong, or ""."""
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
    log, seconds = folder / f"{name}.log", list[float]()
    shutil.rmtree(folder / f"{name}.partial", ignore_errors=True)
    for command in MADE[name]:
        words = shlex.split(command.format(**places))
        out = Path(words[words.index("-o") + 1]) if "-o" in words else folder / name
        export, source = out != folder / name, source_of((command,), folder)
        if export and stands(out, source):
            seconds += json.loads(seconds_file(out).read_text())
            continue
        click.echo(" ".join(words), err=True)
        start = time.perf_counter()
        with log.open("a") as file:
            # A peer's command may be a module of ours; no results hold this machine's paths.
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            try:
                ended = subprocess.run(words, stdout=file, stderr=file, env=environment, check=False).returncode
            except OSError as e:
                return f"{Path(words[0]).name} cannot be run: {e.strerror}"
            if ended:
                last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
                return f"{Path(words[0]).name} failed: {last.replace(f'{folder}/', '')[:200]}"
        seconds.append(round(time.perf_counter() - start, 1))
        if export:
            finished(out, seconds[-1:], source)
    finished(folder / name, seconds, source_of(MADE[name], folder))
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
