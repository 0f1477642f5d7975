"""``python -m benchmarks.peers.questions``: whole questions of the shipped pair, every system asked the same in turn.

A system stays open in its process; each question goes to all of them before the next one, in an order that is drawn
anew, with a pause in front of each: so what else the machine does meets all alike, and a question comes as it comes to
who waits for one. Without the pause a runtime's threads, which spin on for some milliseconds, are a load for the next
system, always the same one in an order that only turns, and every system's threads are awake already.
The threshold is calibrated on other questions than are asked here.
OpenVINO GenAI is not among them: it prepares LLaVA's images in its own way, and few of the pair's answers came out
right when that was tried (no result is kept).
Results: benchmarks/results/MACHINE/questions.json.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.figures import conditions, keep, spread
from benchmarks.peers.making import made
from benchmarks.peers.process import Pythons, Worker
from benchmarks.peers.systems import QUESTIONS

SHAPE, SCHEMA, TOKENS = "glyphs", "saccade.benchmark.questions/1", 16
PAUSE_S = 0.05  # the longest that one of these was seen to spin is some 4 ms


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where exports and bundles are kept.")
@click.option("--runtime-python", type=click.Path(path_type=Path), help="One with saccade[cpu,openvino]. [this one]")
@click.option("--peers-python", type=click.Path(path_type=Path), help="One with openvino-genai and optimum.")
@click.option("--questions", type=click.IntRange(1), default=200, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--note", default="", help="What else the machine did, for the conditions.")
def main(
    work: Path, runtime_python: Path | None, peers_python: Path | None, questions: int, threads: int, note: str
) -> None:
    """Measure, print, write."""
    from glyphs.data import held_out_questions

    pythons, folder = Pythons(runtime_python, peers_python), work / SHAPE
    rows: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as stack, TemporaryDirectory() as images:
        workers = {}
        for system in QUESTIONS:
            python = pythons.of(system.python)
            why = made(system.made, folder, SHAPE, python) if python else f"no --{system.python}-python was given"
            if why or not python:
                skipped[system.name] = why
            else:
                workers[system.name] = stack.enter_context(Worker(system, python, folder, threads))
        asked = held_out_questions(questions + 1)
        for i, question in enumerate(asked):
            file = Path(images) / "asked.png"
            question.image.save(file)
            for name in np.random.default_rng(i).permutation(list(workers)).tolist():
                time.sleep(PAUSE_S)
                row = workers[name].ask_about(file, question.question, TOKENS)
                if i:  # the first one warms up
                    rows.setdefault(name, []).append(row | {"right": row["text"] == question.answer})
        peaks = {name: worker.peak_bytes for name, worker in workers.items()}
    document = {
        "schema": SCHEMA,
        "conditions": conditions(SHAPE, 1, questions, TOKENS, threads, note)
        | {"questions": questions, "pause_s": PAUSE_S, "runtime": pythons.runtimes()},
        "systems": [
            {
                "name": name,
                "exit_rate": sum(row["exited"] for row in found) / len(found),
                "accuracy": sum(row["right"] for row in found) / len(found),
                "whole_ms": spread([row["whole_ms"] for row in found]),
                "whole_ms_mean": round(sum(row["whole_ms"] for row in found) / len(found), 3),
                "peak_bytes": peaks[name],
            }
            for name, found in rows.items()
        ],
        "skipped": skipped,
    }
    keep("questions", document)
    click.echo(json.dumps(document["systems"], indent=1))


if __name__ == "__main__":
    main()
