"""``python -m benchmarks.peers.growth``: time to the first token over the number of visual tokens.

Shape (a); every system is opened once a round and asked for one token about images of growing size, after
one question to warm up; the peak is the process's so far, counts ascend.
Results: benchmarks/results/MACHINE/growth.json.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import conditions, keep, spread
from benchmarks.peers.__main__ import ready
from benchmarks.peers.process import Pythons, Worker
from benchmarks.peers.table import growth_of

SHAPE, PIXELS = "qwen2_5_vl", 28
GRIDS = {256: (16, 16), 512: (16, 32), 1024: (32, 32), 2048: (32, 64), 4096: (64, 64), 8192: (64, 128)}
LIMITS = {"transformers fp32": 4096, "saccade cpu fp32": 4096}  # a minute a question beyond
LIMITS |= {f"onnxruntime genai {p}": 2048 for p in ("fp32", "int4")}  # its tower's masks and scores: patches squared
SCHEMA = "saccade.benchmark.growth/1"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where checkpoint and exports are kept.")
@click.option("--runtime-python", type=click.Path(path_type=Path), help="One with saccade[cpu,openvino]. [this one]")
@click.option("--peers-python", type=click.Path(path_type=Path), help="One with openvino-genai and optimum.")
@click.option("--ort-genai-python", type=click.Path(path_type=Path), help="One with onnxruntime-genai and mobius.")
@click.option("--only", default="saccade", show_default=True, help="Names of systems or words in them, split by ;")
@click.option("--most", type=click.IntRange(256), default=8192, show_default=True, help="Most visual tokens.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--note", default="", help="What else the machine did, for the conditions.")
def main(
    work: Path,
    runtime_python: Path | None,
    peers_python: Path | None,
    ort_genai_python: Path | None,
    only: str,
    most: int,
    rounds: int,
    threads: int,
    note: str,
) -> None:
    """Measure, print, write."""
    pythons = Pythons(runtime_python, peers_python, ort_genai_python)
    chosen, skipped = ready(only, pythons, work, SHAPE)
    versions, runtimes = pythons.versions(), pythons.runtimes()
    counts = [count for count in GRIDS if count <= most]
    found: dict[str, dict[int, list[dict[str, Any]]]] = {s.name: {count: [] for count in counts} for s in chosen}
    for round_ in range(rounds):
        for system in chosen:
            click.echo(f"round {round_ + 1}/{rounds}: {system.name}", err=True)
            try:
                with Worker(system, str(pythons.of(system.python)), work / SHAPE, threads) as worker:
                    for count in counts:
                        rows, columns = GRIDS[count]
                        size = rows * PIXELS, columns * PIXELS
                        if count > LIMITS.get(system.name, count):
                            continue
                        if count == counts[0]:
                            worker.ask(size, 1, seed=7)  # warms up
                        found[system.name][count].append(worker.ask(size, 1, seed=round_ * 100 + count))
            except (OSError, RuntimeError) as e:
                skipped[system.name] = str(e)
    rows_ = [
        {
            "name": name,
            "first_token_ms": of_each(by, lambda row: float(row["vision_ms"] + row["prefill_ms"])),
            "vision_ms": of_each(by, lambda row: float(row["vision_ms"])),
            "peak_bytes": {str(count): max(row["peak_bytes"] for row in rows) for count, rows in by.items() if rows},
        }
        for name, by in found.items()
    ]
    document = {
        "schema": SCHEMA,
        "conditions": conditions(SHAPE, rounds, 1, 1, threads, note) | {"runtime": runtimes, "peers": versions},
        "systems": rows_,
        "skipped": skipped,
    }
    keep("growth", document)
    click.echo("\n".join(growth_of(document)))
    for name, why in skipped.items():
        click.echo(f"{name}: not measured to the end ({why})")


def of_each(by: dict[int, list[dict[str, Any]]], value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
    """[median, minimum, maximum] for every count that was reached."""
    return {str(count): spread([value(row) for row in rows]) for count, rows in by.items() if rows}


if __name__ == "__main__":
    main()
