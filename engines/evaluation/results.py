"""From answers to a table: what each system is worth and what it takes; as JSON, as CSV, as text.

A system is the small model, the large one under a setting, or the cascade of both under a threshold. Milliseconds are
what a system would take alone: a guided large model's include the small one's pass.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundles.manifest import manifest_of
from engines.cascade import Cascade, checked_threshold
from engines.evaluation.data import Data
from engines.evaluation.metrics import METRICS
from engines.evaluation.sweep import RANDOM, Plan, Row, Setting, rows_of, settings_of
from engines.model import Model
from engines.words import columns
from graphs.errors import UsageError
from graphs.files import atomic_file
from graphs.talk import say, track

SCHEMA = "saccade.eval/1"
JOURNAL = "answers.jsonl"
FIELDS = (
    "system",
    "keep",
    "policy",
    "threshold",
    "questions",
    "accuracy",
    "accuracy_standard_error",
    "exit_rate",
    "average_retention",
    "new_tokens",
    "ms_per_question",
    "ms_per_question_median",
)


def evaluate_bundle(
    bundle: Path,
    data: Data,
    out: Path,
    metric: str,
    *,
    keeps: list[tuple[float, ...]] | None = None,
    policies: list[str] | None = None,
    thresholds: list[float] | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    target: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Ask, going on where the journal in ``out`` ends, and write results.json and results.csv; return the document.

    Raises UsageError for settings that the bundle cannot be run with, before any question is asked.
    """
    manifest = manifest_of(bundle)
    cascade = Cascade.open(bundle, target, threads)
    settings = settings_of(cascade, keeps or [], policies or [])
    pair = cascade.small is not None and cascade.large is not None
    if thresholds and not pair:
        raise UsageError("this bundle holds one model, so --threshold does nothing; leave it out")
    bars = [checked_threshold(t) for t in thresholds or [cascade.threshold]] if pair else []
    ran_on = _any_model(cascade).target
    plan = Plan(manifest.sha256, data.digest, ran_on, settings, max_new_tokens, seed)
    rows = list(track(rows_of(cascade, data, plan, out / JOURNAL), "asking every setting", len(data.examples)))
    guided = bool(cascade.large and cascade.large.spec.plan.needs_guidance)
    systems = systems_of(rows, [e.answers for e in data.examples], metric, settings, bars, guided)
    document = {
        "schema": SCHEMA,
        "bundle": str(bundle),
        "manifest_sha256": manifest.sha256,
        "data_sha256": data.digest,
        "target": ran_on,
        "metric": metric,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "bad": list(data.bad),
        "systems": systems,
    }
    with atomic_file(out / "results.json") as partial:
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    with atomic_file(out / "results.csv") as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        table.writeheader()
        table.writerows({**system, "keep": _shares(system["keep"])} for system in systems)
    say(f"written: {out / 'results.json'}, {out / 'results.csv'}")
    return document


def systems_of(
    rows: Sequence[Row],
    truths: Sequence[Sequence[str]],
    metric: str,
    settings: Sequence[Setting],
    thresholds: Sequence[float],
    guided: bool,
) -> list[dict[str, Any]]:
    """One entry a system, from the journal's rows and what is right for each.

    guided: whether the bundle's own policy needs the small model's pass.
    """
    value = METRICS[metric].value
    small = [_scored(row["small"], known, value) for row, known in zip(rows, truths, strict=True) if row["small"]]
    found = [_system("small", small)] if small else []
    for setting in settings:
        large = [_scored(row["large"][setting.name], known, value) for row, known in zip(rows, truths, strict=True)]
        shown = {"keep": list(setting.keep), "policy": setting.policy}
        if not small:
            found.append(_system("alone", large) | shown)
            continue
        looks = guided and setting.policy not in (None, RANDOM)
        both = [_after(s, b) for s, b in zip(small, large, strict=True)]
        found.append(_system("large", both if looks else large) | shown)
        for bar in thresholds:
            exits = [row["score"] > bar for row in rows]
            chosen = [s if gone else b for s, b, gone in zip(small, both, exits, strict=True)]
            entry = _system("cascade", chosen) | shown
            found.append(entry | {"threshold": bar, "exit_rate": float(np.mean(exits))})
    return found


def table_of(document: dict[str, Any]) -> list[str]:
    """The systems as lines of text."""
    rows = [("system", "keep", "policy", "threshold", document["metric"], "exits", "retention", "ms")]
    rows += [
        (
            one["system"],
            _shares(one["keep"]),
            one["policy"] or "",
            "" if one["threshold"] is None else f"{one['threshold']:g}",
            f"{one['accuracy']:.1%} ± {one['accuracy_standard_error']:.1%}",
            "" if one["exit_rate"] is None else f"{one['exit_rate']:.0%}",
            "" if one["average_retention"] is None else f"{one['average_retention']:.1%}",
            f"{one['ms_per_question']:.1f}",
        )
        for one in document["systems"]
    ]
    return columns(rows)


def _shares(keep: Sequence[float] | None) -> str:
    """Shares as the option --keep takes them."""
    return ":".join(f"{share:.4g}" for share in keep or ())


def _scored(answer: Row, known: Sequence[str], value: Callable[[str, Sequence[str]], float]) -> Row:
    return {**answer, "worth": value(answer["text"], known)}


def _after(small: Row, large: Row) -> Row:
    """The large model's answer behind the small one's pass."""
    return {**large, "milliseconds": {**small["milliseconds"], **large["milliseconds"]}}


def _system(name: str, answers: Sequence[Row]) -> dict[str, Any]:
    """Means over all questions; a stage that did not run for a question took 0 there.

    average_retention: over the questions with an image for which the pruned model ran, None where there are none.
    """
    worth = np.array([a["worth"] for a in answers])
    spent = np.array([sum(a["milliseconds"].values()) for a in answers])
    stages = dict.fromkeys(stage for a in answers for stage in a["milliseconds"])
    kept = [a["retention"] for a in answers if a["retention"] is not None]
    return {
        "system": name,
        "keep": None,
        "policy": None,
        "threshold": None,
        "questions": len(answers),
        "accuracy": float(worth.mean()),
        "accuracy_standard_error": float(worth.std() / np.sqrt(len(answers))),
        "exit_rate": None,
        "average_retention": float(np.mean(kept)) if kept else None,
        "new_tokens": float(np.mean([a["tokens"] for a in answers])),
        "ms_per_question": round(float(spent.mean()), 3),
        "ms_per_question_median": round(float(np.median(spent)), 3),
        "ms_by_stage": {
            stage: round(float(np.mean([a["milliseconds"].get(stage, 0) for a in answers])), 3) for stage in stages
        },
    }


def _any_model(cascade: Cascade) -> Model:
    model = cascade.large or cascade.small
    assert model
    return model
