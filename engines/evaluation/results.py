"""From answers to a table: what each system is worth and what it takes; as JSON, CSV, text and a page.

A system is a small model, a large one under a setting, or the cascade of both under a threshold. Milliseconds and
estimated FLOPs are what a system would take alone: a guided large model's include the small one's pass.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.cascade import checked_threshold
from engines.evaluation.contenders import Contender, opened
from engines.evaluation.data import Data
from engines.evaluation.report import write_report
from engines.evaluation.settings import settings_of
from engines.evaluation.sweep import Plan, Row, answered, asked_before, rows_of
from engines.evaluation.systems import Worths, curves_of, reliability_of, systems_of
from engines.words import columns
from graphs.console import say, track, warn
from graphs.errors import UsageError
from graphs.files import atomic_file, refuse_foreign_folder

SCHEMA = "saccade.eval/2"
JOURNAL = "answers.jsonl"
ODD_NAMES = "replace"  # of files whose bytes are no UTF-8
FIELDS = (
    "system",
    "bundle",
    "keep",
    "policy",
    "layers",
    "threshold",
    "questions",
    "accuracy",
    "accuracy_standard_error",
    "accuracy_plus",
    "score",
    "exit_rate",
    "average_retention",
    "visual_tokens",
    "kept_tokens",
    "prompt_tokens",
    "new_tokens",
    "ms_per_question",
    "ms_per_question_median",
    "estimated_flops_per_question",
)
BY_STAGE = (("ms_by_stage", "ms_"), ("estimated_flops_by_stage", "estimated_flops_"))


def evaluate_bundles(
    bundles: Sequence[Path],
    data: Data,
    out: Path,
    metric: str,
    *,
    data_name: str = "",
    keeps: list[tuple[float, ...]] | None = None,
    policies: list[str] | None = None,
    layers: list[tuple[int, ...]] | None = None,
    thresholds: list[float] | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    target: str | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Ask, going on where the journal in ``out`` ends; write report.html, results.json and results.csv there.

    Returns the document of results.json. Raises UsageError for settings that the bundles cannot be run with, before any
    question is asked.
    """
    refuse_foreign_folder(out, JOURNAL)
    contenders = opened(bundles, target, threads)
    asked = data.once().digest
    for one in contenders:
        if any(found.data_sha256 == asked for found in one.manifest.calibrations):
            warn(f"{one.path} was calibrated on these very questions; ask others, to learn what its threshold is worth")
    settings = settings_of(contenders, keeps or [], policies or [], layers or [])
    if thresholds and not any(one.pair for one in contenders):
        raise UsageError("this bundle holds one model, so --threshold has no effect; leave it out")
    wanted = [checked_threshold(threshold) for threshold in thresholds or []]
    digests = tuple(one.manifest.models_sha256 for one in contenders)
    targets = tuple(one.target for one in contenders)
    plan = Plan(digests, data.digest, targets, settings, max_new_tokens, seed, threads)
    _say_cut_groups(data)
    rows, data = answered(_asked(contenders, data, plan, out / JOURNAL), data)
    worths = Worths.of(rows, data.examples, metric)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "bundles": [_described(one) for one in contenders],
        "data": data_name,
        "data_sha256": plan.data,
        "questions": len(data.examples),
        "metric": metric,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "threads": threads,
        "flops_are": "estimated from the products of the graphs at the lengths that were fed",
        "bad": list(data.bad),
        "systems": systems_of(contenders, rows, worths, settings, wanted, max_new_tokens),
        "reliability": reliability_of(contenders, rows, worths),
        "over_threshold": curves_of(contenders, rows, worths, settings),
    }
    with atomic_file(out / "results.json") as partial:
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8", ODD_NAMES)
    _write_csv(out / "results.csv", document["systems"])
    write_report(out / "report.html", document, contenders, rows, data, worths, settings)
    say(f"written: {out / 'report.html'}, {out / 'results.json'}, {out / 'results.csv'}")
    return document


def _asked(contenders: Sequence[Contender], data: Data, plan: Plan, journal: Path) -> list[Row]:
    """The rows of the journal and new ones; what was asked before says nothing about how much time is left."""
    done = asked_before(journal, plan, data)
    if done:
        say(f"{journal} holds {len(done)} of {len(data.examples)} questions")
    left = len(data.examples) - len(done)
    fresh = rows_of(contenders, data, plan, journal, len(done))
    return [*done, *(track(fresh, "asking every setting", left) if left else ())]


def _say_cut_groups(data: Data) -> None:
    """Say where a group has fewer questions than the others, for it is right more easily."""
    sizes = Counter(example.group for example in data.examples if example.group)
    if cut := sum(size < max(sizes.values()) for size in sizes.values()):
        say(f"{cut} of {len(sizes)} pictures do not have all of their questions here, which makes accuracy+ too good")


def _described(one: Contender) -> dict[str, Any]:
    model = one.cascade.large or one.cascade.small
    assert model
    return {
        "bundle": str(one.path),
        "manifest_sha256": one.manifest.sha256,
        "target": one.target,
        "precision": one.manifest.members[one.member].targets[one.target].computed_in,
        "architecture": model.spec.architecture,
        "policy": one.plan.name if one.plan else None,
        "default_threshold": one.cascade.threshold if one.pair else None,
    }


def _write_csv(path: Path, systems: Sequence[dict[str, Any]]) -> None:
    stages = [
        (group, stage, f"{prefix}{stage}")
        for group, prefix in BY_STAGE
        for stage in dict.fromkeys(stage for system in systems for stage in system[group] or ())
    ]
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", errors=ODD_NAMES, newline="") as file:
        table = csv.DictWriter(file, (*FIELDS, *(name for *_, name in stages)), extrasaction="ignore")
        table.writeheader()
        for system in systems:
            by_stage = {name: (system[group] or {}).get(stage) for group, stage, name in stages}
            table.writerow({**system, "keep": shares(system["keep"]), "layers": joined(system["layers"]), **by_stage})


def table_of(document: dict[str, Any]) -> list[str]:
    """The systems as lines of text."""
    several = len(document["bundles"]) > 1
    head = ("system", "keep", "policy", "layers", "threshold", document["metric"], "exits", "retention", "ms")
    rows: list[tuple[str, ...]] = [(*head, "GFLOPs (estimated)", *(["bundle"] if several else []))]
    for one in document["systems"]:
        flops = one["estimated_flops_per_question"]
        rows.append(
            (
                one["system"],
                shares(one["keep"]),
                one["policy"] or "",
                joined(one["layers"]),
                "" if one["threshold"] is None else f"{one['threshold']:g}",
                _accuracy(one),
                "" if one["exit_rate"] is None else f"{one['exit_rate']:.0%}",
                "" if one["average_retention"] is None else f"{one['average_retention']:.1%}",
                f"{one['ms_per_question']:.1f}",
                "" if flops is None else f"{flops / 1e9:.4g}",
                *([one["bundle"]] if several else []),
            )
        )
    return columns(rows)


def _accuracy(one: dict[str, Any]) -> str:
    """With its standard error, which says nothing where all answers are worth the same; and MME's score."""
    error, score = one["accuracy_standard_error"], one.get("score")
    told = f"{one['accuracy']:.1%}" + (f" ± {error:.1%}" if error else "")
    return told if score is None else f"{told}, score {score:.1f}"


def shares(keep: Sequence[float] | None) -> str:
    """Shares as the option --keep takes them."""
    return ":".join(f"{share:.4g}" for share in keep or ())


def joined(layers: Sequence[int] | None) -> str:
    """Layers as the option --layer takes them."""
    return ":".join(map(str, layers or ()))
