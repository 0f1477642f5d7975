"""``python -m benchmarks.draft``: the shipped pair's large model with the small answer as a draft, beside without.

Every question is asked both ways, one right after the other and in turns the first, at three retentions; the small
model's pass is shared and not timed. Tokens must be equal; a step is a near-tie where the two best logits lie closer
than 1e-4. A millisecond is one of prefill and decode of the large model. One JSON document goes to stdout and to
``benchmarks/results/draft.json``, and README's sentences are made of it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.draft_words import RESULTS, publish
from benchmarks.figures import commit
from engines.answer import Answer, SmallPass
from engines.cascade import Cascade
from engines.draft import padded, with_draft
from engines.guidance import priority_of
from glyphs.data import held_out_questions
from glyphs.demo import PAIR
from graphs.console import track
from graphs.errors import SaccadeError
from graphs.files import atomic_file
from graphs.plan import keep_for_retention

RETENTIONS = (0.64, 0.35, 0.09)
NEAR_TIE = 1e-4


@click.command()
@click.option("--questions", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads of a run. [the runtime's choice]")
@click.option("--beside", default="nothing", show_default=True, metavar="TEXT", help="What else runs on the machine.")
def main(questions: int, threads: int | None, beside: str) -> None:
    """Measure, print, write."""
    try:
        document = measure(questions, threads, beside)
    except SaccadeError as e:
        click.echo(f"benchmarks.draft: {e}", err=True)
        sys.exit(e.exit_code)
    text = json.dumps(document, indent=2)
    with atomic_file(RESULTS) as partial:
        partial.write_text(text + "\n", "utf-8")
    publish()
    click.echo(text)


def measure(questions: int, threads: int | None, beside: str) -> dict[str, Any]:
    """The document."""
    import saccade

    shipped = json.loads((PAIR / "threshold.json").read_text("utf-8"))
    with TemporaryDirectory(prefix="saccade-draft-") as held:
        for role in ("small", "large"):
            saccade.export(PAIR / role, Path(held) / role, policy="sgl", role=role)
        cascade = Cascade.from_exports(Path(held) / "small", Path(held) / "large", threads=threads)
        assert cascade.large
        layers, layer = cascade.large.spec.language.layers, cascade.large.spec.plan.points[0].layer
        keeps = {retention: keep_for_retention(layers, layer, retention) for retention in RETENTIONS}
        rows: dict[float, list[dict[str, Any]]] = {retention: [] for retention in RETENTIONS}
        for i, question in enumerate(track(held_out_questions(questions), "asking both ways")):
            looked = cascade.look(question.image, question.question)
            for retention, keep in keeps.items():
                first = bool(i % 2)
                answers = {d: cascade.answer_large(looked, keep, draft=d) for d in (first, not first)}
                exits = looked.confidence.score > shipped["threshold"]
                rows[retention].append(row(cascade, looked, keep, answers) | {"exits": exits})
    return {
        "schema": "saccade.benchmark.draft/1",
        "conditions": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads or "the runtime's choice",
            "beside": beside,
            "load_average_at_the_end": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "onnxruntime": metadata.version("onnxruntime"),
            "precision": "float32",
            "commit": commit(),
            "date_utc": datetime.now(UTC).date().isoformat(),
            "questions": questions,
            "threshold": shipped["threshold"],
        },
        "results": [
            {"average_retention": retention, "asked": asked, **summary([r for r in of if everyone or not r["exits"]])}
            for retention, of in rows.items()
            for everyone, asked in ((True, "all questions"), (False, "those that do not exit"))
        ],
    }


def row(cascade: Cascade, looked: SmallPass, keep: float, answers: dict[bool, Answer]) -> dict[str, Any]:
    """One question at one retention."""
    drafted, plain = answers[True], answers[False]
    gap_N = gaps(cascade, looked, keep, plain.tokens)
    told = drafted.draft
    return {
        "equal": drafted.tokens == plain.tokens,
        "kept_equal": all(np.array_equal(a, b) for a, b in zip(drafted.kept or (), plain.kept or (), strict=True)),
        "near_ties": int((gap_N < NEAR_TIE).sum()),
        "smallest_gap": float(gap_N.min()),
        "steps": len(plain.tokens) - 1,
        "tokens": told.tokens if told else 0,
        "accepted": told.accepted if told else 0,
        "saved": told.steps_saved if told else 0,
        **{f"{name}_ms": _spent(answers[way]) for way, name in ((True, "draft"), (False, "plain"))},
    }


def gaps(cascade: Cascade, looked: SmallPass, keep: float, tokens: tuple[int, ...]) -> np.ndarray:
    """How far the best logit of each step lies above the second, float32 [N], the answer being forced."""
    large = cascade.large
    assert large
    prompt, fed = looked.shared["large"], tokens[:-1]
    step = large.decoder.run(
        with_draft(large, prompt.chunk, fed),
        keep=keep,
        tail=len(tokens),
        priority_S=padded(priority_of(prompt, looked.guidance), fed),
    )
    best_N2 = np.sort(step.logits, axis=-1)[:, -2:]
    gap_N: np.ndarray = best_N2[:, 1] - best_N2[:, 0]
    return gap_N


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, sums and times of one retention."""
    if not rows:
        return {"questions": 0}
    total = {key: sum(r[key] for r in rows) for key in ("steps", "tokens", "accepted", "saved", "near_ties")}
    ms = {way: np.array([r[f"{way}_ms"] for r in rows]) for way in ("draft", "plain")}
    return {
        "questions": len(rows),
        "answers_equal": sum(r["equal"] for r in rows),
        "kept_tokens_equal": sum(r["kept_equal"] for r in rows),
        "near_ties": total["near_ties"],
        "smallest_gap": min(r["smallest_gap"] for r in rows),
        "draft_tokens": total["tokens"],
        "accepted": total["accepted"],
        "whole_draft_accepted": sum(r["tokens"] == r["accepted"] for r in rows),
        "decode_steps_without": total["steps"],
        "decode_steps_saved": total["saved"],
        "ms_with_median": round(float(np.median(ms["draft"])), 3),
        "ms_without_median": round(float(np.median(ms["plain"])), 3),
        "ms_with_mean": round(float(ms["draft"].mean()), 3),
        "ms_without_mean": round(float(ms["plain"].mean()), 3),
        "ms_saved_median": round(float(np.median(ms["plain"] - ms["draft"])), 3),
    }


def _spent(answer: Answer) -> float:
    return answer.milliseconds["large_prefill"] + answer.milliseconds["large_decode"]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
