"""``python -m benchmarks.peers``: every system asked the same in turn, round after round, each in its own process.

A round opens a system, asks once to warm it up, then measures; the next system follows, so that what else the machine
does meets all alike. Medians with minimum and maximum over all rounds go to benchmarks/results/peers-SHAPE.json.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.systems import MADE, PLANS, SYSTEMS, Python, System
from benchmarks.shapes import IMAGE, QUESTION, SHAPES

RESULTS = Path(__file__).parents[1] / "results"
SCHEMA = "saccade.benchmark.peers/1"
SIZES = {"llava": (336, 336)}  # height, width by the shape's first word; shape (a)'s else


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="qwen2_5_vl", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where checkpoint and exports are kept.")
@click.option("--peers-python", type=click.Path(path_type=Path), help="The Python with openvino-genai and optimum.")
@click.option("--only", help="Systems whose names contain one of these words, separated by commas.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--asks", type=click.IntRange(1), default=2, show_default=True, help="Measured questions a round.")
@click.option("--tokens", type=click.IntRange(2), default=16, show_default=True, help="Length of an answer.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--note", default="", help="What else the machine did, for the conditions.")
def main(
    shape: str,
    work: Path,
    peers_python: Path | None,
    only: str | None,
    rounds: int,
    asks: int,
    tokens: int,
    threads: int,
    note: str,
) -> None:
    """Measure, print, write."""
    pythons: dict[Python, str | None] = {"ours": sys.executable, "peers": str(peers_python) if peers_python else None}
    words = [word.strip() for word in only.split(",")] if only else [""]
    chosen = [s for s in SYSTEMS.values() if any(word in s.name for word in words)]
    folder, out = work / shape, {}
    skipped: dict[str, str] = {}
    for system in chosen:
        python = pythons[system.python]
        if python is None:
            skipped[system.name] = "no --peers-python was given"
        elif why := made(system.made, folder, shape, python):
            skipped[system.name] = why
        else:
            out[system.name] = {"system": system, "open_ms": [], "peak_bytes": 0, "asked": []}
    for round_ in range(rounds):
        for i, (name, found) in enumerate(list(out.items())):
            click.echo(f"round {round_ + 1}/{rounds}: {name}", err=True)
            python = pythons[found["system"].python]
            try:
                measure(found, str(python), folder, shape, (asks, tokens, threads), seed=1000 * round_ + 17 * i)
            except (OSError, RuntimeError) as e:
                skipped[name] = str(e)
                del out[name]
    document = {
        "schema": SCHEMA,
        "conditions": conditions(shape, rounds, asks, tokens, threads, note),
        "systems": [row_of(name, found, folder) for name, found in out.items()],
        "skipped": skipped,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"peers-{shape}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    from benchmarks.peers.table import table_of

    click.echo("\n".join(table_of(document)))


def made(name: str, folder: Path, shape: str, python: str) -> str:
    """Make what a system runs from, where it is not there; what went wrong, or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "checkpoint").exists():
        SHAPES[shape](folder / "checkpoint")
    for plan, text in PLANS.items():
        (folder / f"{plan}.toml").write_text(text)
    if (folder / name).exists():
        return ""
    places = {
        "checkpoint": folder / "checkpoint",
        "work": folder,
        "saccade": f"{sys.executable} -m saccade",
        "optimum": Path(python).parent / "optimum-cli",
    }
    log, seconds = folder / f"{name}.log", []
    for command in MADE[name]:
        words = shlex.split(command.format(**places))
        if "-o" in words and Path(words[words.index("-o") + 1]).exists():
            continue
        click.echo(" ".join(words), err=True)
        start = time.perf_counter()
        with log.open("a") as file:
            if subprocess.run(words, stdout=file, stderr=file, check=False).returncode:
                return f"{words[0]} failed: {log.read_text(errors='replace').strip().splitlines()[-1][:200]}"
        seconds.append(round(time.perf_counter() - start, 1))
    (folder / f"{name}.seconds.json").write_text(json.dumps(seconds))
    return ""


def measure(
    found: dict[str, Any], python: str, folder: Path, shape: str, amount: tuple[int, int, int], seed: int
) -> None:
    """One round of one system; RuntimeError where its process ended."""
    system: System = found["system"]
    asks, tokens, threads = amount
    height, width = SIZES.get(shape.partition("-")[0], IMAGE)
    root = str(Path(__file__).parents[2])
    log = (folder / f"{system.made}.worker.log").open("a")
    # A peer's own Python must find its own packages first, and of ours nothing but this one.
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}
    command = [python, "-m", "benchmarks.peers.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    ) as worker:

        def told(line: dict[str, Any]) -> dict[str, Any]:
            assert worker.stdin and worker.stdout
            worker.stdin.write(json.dumps(line) + "\n")
            worker.stdin.flush()
            return heard()

        def heard() -> dict[str, Any]:
            assert worker.stdout
            answer = worker.stdout.readline()
            if not answer:
                last = Path(log.name).read_text(errors="replace").strip().splitlines()[-1:]
                raise RuntimeError(f"its process ended: {' '.join(last)[:300]}")
            result: dict[str, Any] = json.loads(answer)
            return result

        place = str(folder / system.made)
        start = {"runtime": system.runtime, "folder": place, "threads": threads, "options": system.options}
        found["open_ms"].append(told(start)["open_ms"])
        for ask in range(asks + 1):
            row = told({"height": height, "width": width, "seed": seed + ask, "question": QUESTION, "tokens": tokens})
            found["peak_bytes"] = max(found["peak_bytes"], heard()["peak_bytes"])
            if ask:  # the first one warms up
                found["asked"].append(row)


def row_of(name: str, found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A system's figures: [median, minimum, maximum] of each part."""
    asked = found["asked"]
    parts = {
        "vision_ms": [a["vision_ms"] for a in asked],
        "prefill_ms": [a["prefill_ms"] for a in asked],
        "first_token_ms": [a["vision_ms"] + a["prefill_ms"] for a in asked],
        "decode_ms_per_token": [a["decode_ms"] / (a["tokens"] - 1) for a in asked if a["tokens"] > 1],
        "open_ms": found["open_ms"],
    }
    made_in = folder / f"{found['system'].made}.seconds.json"
    return {
        "name": name,
        **{part: spread(values) for part, values in parts.items() if values},
        "peak_bytes": found["peak_bytes"],
        "disk_bytes": sum(f.stat().st_size for f in (folder / found["system"].made).rglob("*") if f.is_file()),
        "made_in_s": json.loads(made_in.read_text()) if made_in.exists() else None,
    }


def spread(values: list[float]) -> list[float]:
    """[median, minimum, maximum]."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return [round(v, 3) for v in (median, ordered[0], ordered[-1])]


def conditions(shape: str, rounds: int, asks: int, tokens: int, threads: int, note: str) -> dict[str, Any]:
    """What the figures depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "shape": shape,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
        "date_utc": datetime.now(UTC).date().isoformat(),
        "rounds": rounds,
        "asks_a_round": asks,
        "tokens": tokens,
        "statistic": "median, minimum, maximum",
        "load_before": round(os.getloadavg()[0], 2),
        "note": note,
    }


if __name__ == "__main__":
    main()
