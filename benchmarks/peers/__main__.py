"""``python -m benchmarks.peers``: every system asked the same in turn, round after round, each in its own process.

A round opens a system, asks once to warm it up, then measures; the next system follows, so that what else the machine
does meets all alike. Medians with minimum and maximum over all rounds:
benchmarks/results/MACHINE/peers-SHAPE.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import conditions, keep, spread
from benchmarks.peers.making import made, seconds_file
from benchmarks.peers.process import Pythons, Worker
from benchmarks.peers.systems import SYSTEMS, System
from benchmarks.peers.table import table_of
from benchmarks.shapes import IMAGE, SHAPES

SCHEMA = "saccade.benchmark.peers/1"
SIZES = {"llava": (336, 336)}  # height, width by the shape's first word; shape (a)'s else


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="qwen2_5_vl", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where checkpoint and exports are kept.")
@click.option("--runtime-python", type=click.Path(path_type=Path), help="One with saccade[cpu,openvino]. [this one]")
@click.option("--peers-python", type=click.Path(path_type=Path), help="One with openvino-genai and optimum.")
@click.option("--ort-genai-python", type=click.Path(path_type=Path), help="One with onnxruntime-genai and mobius.")
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where exports lie while bundles are built, as /dev/shm; they go afterwards. [--work, where they stay]",
)
@click.option("--only", help="Names of systems or words in them, split by ;")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--asks", type=click.IntRange(1), default=2, show_default=True, help="Measured questions a round.")
@click.option("--tokens", type=click.IntRange(2), default=16, show_default=True, help="Length of an answer.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--name", help="Of the results: peers-NAME.json. [the shape's]")
@click.option("--note", default="", help="What else the machine did, for the conditions.")
def main(
    shape: str,
    work: Path,
    runtime_python: Path | None,
    peers_python: Path | None,
    ort_genai_python: Path | None,
    scratch: Path | None,
    only: str | None,
    rounds: int,
    asks: int,
    tokens: int,
    threads: int,
    name: str | None,
    note: str,
) -> None:
    """Measure, print, write."""
    pythons = Pythons(runtime_python, peers_python, ort_genai_python)
    chosen, skipped = ready(only, pythons, work, shape, scratch)
    versions, runtimes = pythons.versions(), pythons.runtimes()
    out: dict[str, dict[str, Any]] = {
        s.name: {"system": s, "open_ms": [], "peak_bytes": 0, "asked": []} for s in chosen
    }
    size, folder = SIZES.get(shape.partition("-")[0], IMAGE), work / shape
    for round_ in range(rounds):
        for i, (title, found) in enumerate(list(out.items())):
            click.echo(f"round {round_ + 1}/{rounds}: {title}", err=True)
            system = SYSTEMS[title]
            try:
                if not round_:  # a peer may keep what it compiled, we keep what we hashed: the first opening apart
                    with Worker(system, str(pythons.of(system.python)), folder, threads) as worker:
                        found["first_open_ms"] = worker.open_ms
                with Worker(system, str(pythons.of(system.python)), folder, threads) as worker:
                    found["open_ms"].append(worker.open_ms)
                    rows = [worker.ask(size, tokens, seed=1000 * round_ + 17 * i + ask) for ask in range(asks + 1)]
                    found["asked"] += rows[1:]  # the first one warms up
                    found["peak_bytes"] = max(found["peak_bytes"], worker.peak_bytes)
            except (OSError, RuntimeError) as e:
                skipped[title] = str(e)
                del out[title]
    document = {
        "schema": SCHEMA,
        "conditions": conditions(shape, rounds, asks, tokens, threads, note) | {"runtime": runtimes, "peers": versions},
        "systems": [row_of(title, found, folder) for title, found in out.items()],
        "skipped": skipped,
    }
    keep(f"peers-{name or shape}", document)
    click.echo("\n".join(table_of(document)))


def ready(
    only: str | None, pythons: Pythons, work: Path, shape: str, scratch: Path | None = None
) -> tuple[list[System], dict[str, str]]:
    """The systems that can run, made where they were not (``made``); and for the others why not."""
    words = [word.strip() for word in only.split(";")] if only else [""]
    chosen, skipped = [], {}
    for system in SYSTEMS.values():
        if not any(word == system.name if word in SYSTEMS else word in system.name for word in words):
            continue
        python = pythons.of(system.python)
        if python is None:
            skipped[system.name] = f"no --{system.python}-python was given"
        elif why := made(system.made, work / shape, shape, python, scratch):
            skipped[system.name] = why
        else:
            chosen.append(system)
    return chosen, skipped


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
    made_in = seconds_file(folder / found["system"].made)
    return {
        "name": name,
        **{part: spread(values) for part, values in parts.items() if values},
        "first_open_ms": round(found["first_open_ms"], 3),
        "peak_bytes": found["peak_bytes"],
        "disk_bytes": sum(f.stat().st_size for f in (folder / found["system"].made).rglob("*") if f.is_file()),
        "made_in_s": json.loads(made_in.read_text()) if made_in.exists() else None,
    }


if __name__ == "__main__":
    main()
