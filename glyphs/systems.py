"""The systems that the demo compares, and their tally over one list of questions.

Every system sees the same questions in the same run. A system under the large model's pruning
shares the small model's pass and the large model's image with the others; its milliseconds still
count every stage that it needs, so they add up to what it would take alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from glyphs.data import Question

# What saccade.Cascade and its answers are; this room knows them by the front door only.
Cascade: TypeAlias = Any
SmallPass: TypeAlias = Any
Answer: TypeAlias = Any

RETENTIONS = (0.64, 0.35, 0.09)


@dataclass
class Tally:
    """One row of the table, filled question by question."""

    name: str
    average_retention: float | None = None
    layer: int | None = None
    keep: float | None = None
    right: int = 0
    exits: int | None = None
    milliseconds: list[float] = field(default_factory=list)

    def add(self, right: bool, milliseconds: float, exited: bool | None = None) -> None:
        """Count one question."""
        self.right += right
        self.milliseconds.append(milliseconds)
        if exited is not None:
            self.exits = (self.exits or 0) + exited

    def document(self) -> dict[str, Any]:
        """Return the row as JSON knows it; the time is the median, because a first question opens sessions."""
        asked = len(self.milliseconds)
        return {
            "name": self.name,
            "accuracy": self.right / asked,
            "average_retention": self.average_retention,
            "prune_layer": self.layer,
            "keep": self.keep,
            "exit_rate": None if self.exits is None else self.exits / asked,
            "ms_per_question": round(float(np.median(self.milliseconds)), 2),
            "ms_per_question_mean": round(float(np.mean(self.milliseconds)), 2),
        }


@dataclass
class Parity:
    """How far our unpruned answers are from the reference's."""

    questions: int = 0
    equal: int = 0
    max_abs_logit_diff: float = 0.0

    def add(self, ours: tuple[int, ...], theirs: tuple[int, ...], logits: np.ndarray, expected: np.ndarray) -> None:
        """Compare one answer's tokens and the logits of its first token."""
        self.questions += 1
        self.equal += ours == theirs
        self.max_abs_logit_diff = max(self.max_abs_logit_diff, float(np.abs(logits - expected).max()))

    def document(self) -> dict[str, Any]:
        """Return the comparison as JSON knows it."""
        return {
            "tokens_equal": self.equal / max(self.questions, 1),
            "max_abs_logit_diff": self.max_abs_logit_diff,
            "answers_compared": self.questions,
        }


class Comparison:
    """All systems over a pair, a small model that listens to one layer only, and the reference models."""

    def __init__(
        self,
        cascade: Cascade,
        one_layer: Cascade,
        references: dict[str, Any],
        threshold: float,
        retention: float = RETENTIONS[1],
        seed: int = 0,
    ) -> None:
        from graphs.plan import average_retention, keep_for_retention

        if cascade.small is None or cascade.large is None:
            raise ValueError("the comparison needs a pair")
        self.cascade, self.one_layer, self.references = cascade, one_layer, references
        self.small, self.large = cascade.small, cascade.large
        self.threshold, self.retention = threshold, retention
        self.draw = np.random.Generator(np.random.PCG64(seed))
        layers, layer = self.large.spec.language.layers, self.large.spec.plan.points[0].layer
        self.tallies: dict[str, Tally] = {}
        self.parity = Parity()
        self.keep: dict[float, float] = {}
        self._row("small alone", 1.0)
        self._row("large alone", 1.0)
        for share in RETENTIONS:
            keep = round(keep_for_retention(layers, layer, share), 4)
            self.keep[share] = keep
            for source in ("guided by small", "random tokens", "one layer of small"):
                name = f"large {share:.0%}, {source}"
                self._row(name, average_retention(layers, layer, keep), layer=layer, keep=keep)
        self._row("cascade", retention, layer=layer, keep=self.keep[retention])
        for name in references:
            self._row(f"HF generate, {name}", 1.0)

    def _row(self, name: str, retention: float | None, **rest: Any) -> None:
        self.tallies[name] = Tally(name, retention, **rest)

    def run(self, questions: Iterable[Question]) -> Iterator[None]:
        """Ask every system every question, one step a question."""
        for question in questions:
            self.ask(question)
            yield

    def ask(self, question: Question) -> None:
        """Ask every system one question."""
        looked = self.cascade.look(question.image, question.question)
        small = self.cascade.answer_small(looked, self.threshold)
        self._add("small alone", small.text, question, small.spent("small"))
        self._compare_unpruned(question, looked)
        narrow = self.one_layer.look(question.image, question.question)
        scores = {
            "guided by small": looked.guidance,
            "random tokens": self.draw.random(len(looked.guidance), dtype=np.float32),
            "one layer of small": narrow.guidance,
        }
        pruned: dict[tuple[float, str], Answer] = {}
        for retention, keep in self.keep.items():
            for source, guidance in scores.items():
                # Random tokens are timed without the small model, so its answer is no draft there.
                answer = self.cascade.answer_large(looked, keep, guidance, draft=source != "random tokens")
                pruned[retention, source] = answer
                needed = answer.spent("large")
                if source == "guided by small":
                    needed += answer.spent("small")
                elif source == "one layer of small":
                    needed += self.one_layer.answer_small(narrow).spent()
                self._add(f"large {retention:.0%}, {source}", answer.text, question, needed)
        exited = looked.confidence.score > self.threshold
        final = small if exited else pruned[self.retention, "guided by small"]
        self._add("cascade", final.text, question, final.spent(), exited)

    def _compare_unpruned(self, question: Question, looked: SmallPass) -> None:
        """Answer with both models, nothing pruned, beside their references."""
        for name, model in (("small", self.small), ("large", self.large)):
            prompt = looked.prompt if name == "small" else self.cascade.memories()[name].prompt(looked.turn.talk)
            priority = None if name == "small" else np.zeros(len(prompt), np.float32)
            run = model.generate(prompt, keep=None if name == "small" else 1.0, priority_S=priority).finish()
            ours = sum(ms for stage, ms in prompt.ms.items() if stage != "open") + run.prefill_ms + run.decode_ms
            if name == "large":
                looked.shared["large"] = prompt
                self._add("large alone", run.text, question, ours)
            if name in self.references:
                theirs = self.references[name].answer(question.image, question.question)
                self.parity.add(tuple(run.tokens), theirs.tokens, run.first_logits, theirs.first_logits)
                self._add(f"HF generate, {name}", theirs.text, question, theirs.milliseconds)

    def _add(self, name: str, text: str, question: Question, milliseconds: float, exited: bool | None = None) -> None:
        self.tallies[name].add(text == question.answer, milliseconds, exited)
