"""Every question under every setting, each distinct computation once; what is done is on disk, so a run can go on.

The small model's pass is shared by all settings of the large one, and thresholds cost nothing: they only choose between
answers that are there. The journal is a JSONL file: a header that names bundle, data and settings, then a line for each
question.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from engines.answer import Answer, SmallPass
from engines.cascade import Cascade
from engines.decoder import keep_ratios
from engines.evaluation.data import Data, Example
from engines.guidance import random_guidance
from graphs.errors import BadArtefact, UsageError
from graphs.files import unreadable

SCHEMA = "saccade.eval-journal/1"
RANDOM = "random"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How the large model is pruned: shares per prune point, and by which policy; None where it sees everything."""

    keep: tuple[float, ...]
    policy: str | None

    @property
    def name(self) -> str:
        """A key that tells settings apart."""
        shares = ":".join(f"{share:g}" for share in self.keep) or "1"
        return f"{shares} {self.policy}" if self.policy else shares


@dataclass(frozen=True)
class Plan:
    """What is asked of a bundle. manifest, data: digests. seed: of random tokens, question i draws with seed + i."""

    manifest: str
    data: str
    target: str
    settings: tuple[Setting, ...]
    max_new_tokens: int | None
    seed: int

    def header(self) -> Row:
        """The journal's first line."""
        settings = [setting.name for setting in self.settings]
        return {"schema": SCHEMA, **vars(self), "settings": settings}


def settings_of(cascade: Cascade, keeps: list[tuple[float, ...]], policies: list[str]) -> tuple[Setting, ...]:
    """Each distinct way to prune the bundle's large (or only) model; () where it has none to prune.

    policies: the bundle's own by its name, and ``random`` where the host gives the scores. Raises UsageError for a
    policy that another export would be needed for.
    """
    if not cascade.large:
        if keeps or policies:
            raise UsageError(
                "this bundle's only model prunes nothing, so --keep and --policy do nothing; leave them out"
            )
        return ()
    plan = cascade.large.spec.plan
    possible = [plan.name] + ([RANDOM] if plan.needs_guidance else [])
    if unknown := [policy for policy in policies if policy not in possible]:
        raise UsageError(
            f"policy {unknown[0]!r} is not in this bundle, which can be run with {' and '.join(possible)}; export and "
            "build a bundle of that policy and evaluate it on the same data"
        )
    if not keeps and any(budget.count is not None for budget in plan.budgets):
        raise UsageError(
            f"plan {plan.name} keeps a count of tokens, which is another share of every image; give --keep"
        )
    found: list[Setting] = []
    for shares in keeps or [keep_ratios(plan, None)]:
        whole = keep_ratios(plan, shares if len(shares) > 1 else shares[0]) if shares else ()
        everything = all(share == 1 for share in whole)
        found += [Setting(whole, None)] if everything else [Setting(whole, p) for p in policies or [plan.name]]
    return tuple(dict.fromkeys(found))


def rows_of(cascade: Cascade, data: Data, plan: Plan, journal: Path) -> Iterator[Row]:
    """Yield a row for each question in order: those of the journal first, then new ones, each written when done."""
    done = opened_journal(journal, plan)
    yield from done
    with journal.open("a", encoding="utf-8") as file:
        for i, example in enumerate(data.examples[len(done) :], len(done)):
            row = row_of(cascade, example, plan, i)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            yield row


def opened_journal(path: Path, plan: Plan) -> list[Row]:
    """The rows of a journal of the same plan, made where there is none; a line that was cut short is dropped.

    Raises UsageError for the journal of another plan, BadArtefact for a file that is none.
    """
    header = json.dumps(plan.header()) + "\n"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header, "utf-8")
        return []
    try:
        content = path.read_bytes()
    except OSError as e:
        raise unreadable(path, e, "give another folder") from None
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    try:
        first, *rows = [json.loads(line) for line in lines] or [None]
    except ValueError:
        raise BadArtefact(f"{path} is no journal of an evaluation; remove it or give another folder") from None
    if first != plan.header():
        raise UsageError(f"{path} is of another bundle, data or settings; give another folder, or remove that one")
    os.truncate(path, whole)
    return list(rows)


def row_of(cascade: Cascade, example: Example, plan: Plan, i: int) -> Row:
    """Ask one question under every setting."""
    row: Row = {"digest": example.digest, "small": None, "large": {}}
    images = example.images or None
    options = {"max_new_tokens": plan.max_new_tokens}
    looked: SmallPass | None = None
    if cascade.small:
        looked = cascade.look(images, example.question, max_new_tokens=plan.max_new_tokens)
        row["small"] = _answer_row(cascade.answer_small(looked), "small")
        row["score"] = looked.confidence.score
    for setting in plan.settings:
        model: Literal["large", "alone"] = "large" if looked else "alone"
        if looked and cascade.large:
            if cascade.large.spec.plan.vision:  # what an earlier setting left in the cache was seen otherwise
                looked = replace(looked, turn=cascade.turn(looked.turn.talk, **options), shared={})  # type: ignore[arg-type]
            drawn = random_guidance(len(looked.guidance), plan.seed + i) if setting.policy == RANDOM else None
            # What the small model said may shorten only a run that waits for its pass anyway.
            draft = setting.policy not in (None, RANDOM)
            answer = cascade.answer_large(looked, setting.keep or None, drawn, **options, draft=draft)  # type: ignore[arg-type]
        else:
            answer = cascade.ask(images, example.question, setting.keep or None, max_new_tokens=plan.max_new_tokens)
        row["large"][setting.name] = _answer_row(answer, model)
    return row


def _answer_row(answer: Answer, model: str) -> Row:
    """What one model said, and what it took; opening its sessions happens once and is left out."""
    own = {stage: ms for stage, ms in answer.milliseconds.items() if stage.startswith(f"{model}_")}
    return {
        "text": answer.text,
        "tokens": len(answer.tokens),
        "visual_tokens": answer.visual_tokens,
        "retention": answer.average_retention,
        "milliseconds": {stage: round(ms, 3) for stage, ms in own.items() if not stage.endswith("_open")},
    }
