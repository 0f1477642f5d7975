"""`python -m glyphs.findings -o DIR`: every finding on the shipped pair, resumable; writes DIR/findings.json."""

from __future__ import annotations

import json
import os
import re
from datetime import date
from pathlib import Path
from typing import Any

import click

from glyphs.checkpoint import PAIR
from graphs.console import say

QUESTIONS = 1000
SCHEMA = "saccade.findings/1"


@click.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Work folder; what it holds is not done again."
)
@click.option("--questions", type=click.IntRange(20), default=QUESTIONS, show_default=True)
@click.option(
    "--small",
    "others",
    multiple=True,
    type=(int, click.Path(path_type=Path, exists=True, file_okay=False)),
    metavar="SEED FOLDER",
    help="The small model of another seed (python -m glyphs.train small --seed 2 --to DIR: 2 DIR/small); repeatable.",
)
@click.option("--publish", is_flag=True, help="Write the document and its tables into this source tree.")
def main(out: Path, questions: int, others: tuple[tuple[int, Path], ...], publish: bool) -> None:
    """Look for what SGL and STAR found, on the shipped pair."""
    from graphs.versions import require

    require("torch", "transformers", "onnxruntime")
    document = findings(out, questions, others)
    write(out / "findings.json", document)
    say(f"findings: {out / 'findings.json'}")
    if publish:
        from glyphs.findings.tables import RESULTS, publish_tables

        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write(RESULTS, document)
        publish_tables()


def findings(out: Path, questions: int, others: tuple[tuple[int, Path], ...] = ()) -> dict[str, Any]:
    """Compute all of it, or what the folder ``out`` lacks of it, and return the document."""
    import torch

    from glyphs.findings.check import check
    from glyphs.findings.exits import exits
    from glyphs.findings.guidance import guidance
    from glyphs.findings.overlap import overlap
    from glyphs.findings.star import star
    from glyphs.findings.statistics import share
    from glyphs.findings.work import SEED, Work

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    checkpoints = {"large": PAIR / "large", "small": PAIR / "small"}
    checkpoints |= {f"small, seed {seed}": folder for seed, folder in others}
    with torch.inference_mode():
        work = Work(out, checkpoints, questions)
        small = [name for name in checkpoints if name != "large"]
        models = {name: {"weights_sha256": work.digests[name], **share(work.heard(name).right)} for name in checkpoints}
        stages = star(work)
        return {
            "schema": SCHEMA,
            "conditions": {"questions": questions, "questions_seed": SEED, **conditions()},
            "models": models,
            "check": check(work, "small", out / "exports"),
            "guidance": guidance(work, small),
            "overlap": overlap(work, small),
            "exits": exits(work, small),
            "star": stages,
        }


def conditions() -> dict[str, Any]:
    """Where and with what it was computed."""
    import platform

    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "precision": "float32",
    }


def write(file: Path, document: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = file.with_suffix(".json.partial")
    text = json.dumps(document, indent=1, ensure_ascii=False)
    for innermost in (r"\{[^{}\[\]]*\}", r"\[[^{}\[\]]*\]"):
        text = re.sub(innermost, lambda found: " ".join(found[0].split()), text)
    partial.write_text(text + "\n", "utf-8")
    partial.replace(file)


if __name__ == "__main__":
    main()
