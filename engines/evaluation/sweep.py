"""Every question under every setting, each distinct computation once.

The small model's pass is shared by all settings of the large one, in all bundles that hold the same small model, and
thresholds cost nothing: they only choose between answers that are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.answer import Answer, SmallPass
from engines.evaluation.contenders import Contender
from engines.evaluation.data import GO_ON, Data, Example
from engines.evaluation.flops import stage_flops
from engines.evaluation.journal import Row, appending, opened_journal
from engines.evaluation.settings import RANDOM, Setting
from engines.guidance import random_guidance
from graphs.errors import BadArtefact, UnaskableQuestion


@dataclass(frozen=True)
class Plan:
    """What is asked of bundles, and how: times of other threads are other times.

    manifests, data: digests. seed: of random tokens, question i draws with seed + i. threads: None for the runtime's.
    """

    manifests: tuple[str, ...]
    data: str
    targets: tuple[str, ...]
    settings: tuple[Setting, ...]
    max_new_tokens: int | None
    seed: int
    threads: int | None = None

    def header(self) -> Row:
        """What a journal names in its first line."""
        listed = {"manifests": list(self.manifests), "targets": list(self.targets)}
        settings = [setting.name for setting in self.settings]
        return {**vars(self), **listed, "settings": settings}


def asked_before(journal: Path, plan: Plan, data: Data) -> list[Row]:
    """The rows that a journal of the same plan holds; raises what ``opened_journal`` raises.

    BadArtefact too for a question among them that could not be asked, where such ones end it all.
    """
    rows = opened_journal(journal, plan.header(), data.examples)
    refused = next((row["bad"] for row in rows if "bad" in row), None)
    if refused and not data.skip_bad:
        raise BadArtefact(f"{refused} {GO_ON}")
    return rows


def rows_of(contenders: Sequence[Contender], data: Data, plan: Plan, journal: Path, done: int) -> Iterator[Row]:
    """Yield a row for each question behind the ``done`` first, each written to the journal when it is done.

    The first of them is asked once before that, so that no question pays for what is done once. What cannot be asked
    is a row that says why.
    """
    with appending(journal, done) as add:
        with suppress(UnaskableQuestion):
            row_of(contenders, data.examples[done], plan, done)
        for i, example in enumerate(data.examples[done:], done):
            try:
                row = row_of(contenders, example, plan, i)
            except UnaskableQuestion as e:
                row = {"digest": example.digest, "small": {}, "large": {}, "bad": data.left_out(example, e)}
            add(row)
            yield row


def answered(rows: Sequence[Row], data: Data) -> tuple[list[Row], Data]:
    """The rows of questions that were answered, with the data of these alone."""
    bad = {i: row["bad"] for i, row in enumerate(rows) if "bad" in row}
    return [row for row in rows if "bad" not in row], data.without(bad) if bad else data


def row_of(contenders: Sequence[Contender], example: Example, plan: Plan, i: int) -> Row:
    """Ask one question under every setting.

    small: the first bundle of each distinct small model → its answer; large: setting → the answer.
    """
    asked = _Asked(contenders, example, plan, i)
    row: Row = {"digest": example.digest, "small": {}, "large": {}}
    for at, one in enumerate(contenders):
        if one.cascade.small and one.small == at:
            row["small"][str(at)] = asked.small(at)
    for setting in plan.settings:
        row["large"][setting.name] = asked.large(setting)
    return row


@dataclass(eq=False)
class _Asked:
    """One question on its way through all bundles.

    looked: bundle → the small model's pass, with the bundle's own memory of the large model. seen: bundle → FLOPs of
    the vision stage whose result its settings share.
    """

    contenders: Sequence[Contender]
    example: Example
    plan: Plan
    number: int
    looked: dict[int, SmallPass] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def small(self, at: int) -> Row:
        one = self.contenders[at]
        looked = one.cascade.look(self._images, self.example.question, max_new_tokens=self.plan.max_new_tokens)
        self.looked[at] = looked
        answer = one.cascade.answer_small(looked)
        flops = self._flops(one, "small", "small", checked=len(looked.guidance) > 0)
        return {**_answer_row(answer, "small", flops), "score": looked.confidence.score}

    def large(self, setting: Setting) -> Row:
        one, options = self.contenders[setting.bundle], {"max_new_tokens": self.plan.max_new_tokens}
        if not one.pair:
            answer = one.cascade.ask(self._images, self.example.question, setting.keep or None, **options)  # type: ignore[arg-type]
            return _answer_row(answer, "alone", self._flops(one, "large", "alone"))
        looked = self.looked.get(setting.bundle)
        # Another bundle's pass comes without this one's large model; and each setting of a vision stage, whose result
        # none shares with another, pays for the image alike.
        if looked is None or (one.plan and one.plan.vision):
            shared = self.looked[one.small]
            fresh = one.cascade.turn(shared.turn.talk, max_new_tokens=self.plan.max_new_tokens)
            looked = self.looked[setting.bundle] = replace(shared, turn=fresh, shared={})
        random = random_guidance(len(looked.guidance), self.plan.seed + self.number)
        drawn = random if setting.policy == RANDOM else None
        # What the small model said may shorten only a run that waits for its pass anyway.
        draft = setting.policy not in (None, RANDOM)
        answer = one.cascade.answer_large(looked, setting.keep or None, drawn, **options, draft=draft)  # type: ignore[arg-type]
        flops = self._flops(one, "large", "large")
        if flops is not None:
            flops = {"large_vision": self.seen.get(setting.bundle, 0), **flops}
            self.seen[setting.bundle] = flops["large_vision"]
        return _answer_row(answer, "large", flops)

    @property
    def _images(self) -> Any:
        return self.example.images or None

    @staticmethod
    def _flops(one: Contender, model: str, name: str, checked: bool = False) -> dict[str, int] | None:
        runs, costs = one.meters[model].taken(), one.costs[model]
        return None if costs is None else stage_flops(name, runs, costs, checked)


def _answer_row(answer: Answer, model: str, flops: dict[str, int] | None) -> Row:
    """What one model said, and what it took.

    kept: which of the visual tokens are there in the last layers, as bits in hexadecimal, first token first.
    """
    kept = answer.kept[-1] if answer.kept else None
    return {
        "text": answer.text,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "kept_tokens": answer.visual_tokens if kept is None else len(kept),
        "kept": None if kept is None else as_bits(kept, answer.visual_tokens),
        "retention": answer.average_retention,
        "flops": flops,
        "milliseconds": {stage: round(ms, 3) for stage, ms in answer.stages(model).items()},
    }


def spent(answers: Sequence[Row]) -> np.ndarray:
    """Milliseconds that each of these answers took, float64 [N]."""
    return np.array([sum(answer["milliseconds"].values()) for answer in answers], float)


def as_bits(kept: np.ndarray, tokens: int) -> str:
    """Indices of kept tokens as bits in hexadecimal."""
    stays = np.zeros(tokens, bool)
    stays[kept] = True
    return np.packbits(stays).tobytes().hex()


def from_bits(bits: str, tokens: int) -> np.ndarray:
    """The indices again, int64."""
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    return np.flatnonzero(np.unpackbits(packed, count=tokens))
