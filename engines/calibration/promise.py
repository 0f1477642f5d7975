"""When a calibrated threshold holds at run time: only under the conditions that it was found under."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from engines.answer import Answer, Turn
from engines.budgets import Keep, keep_ratios
from engines.calibration.record import Calibration
from engines.sampling import Options
from graphs.console import say
from graphs.plan import PruningPlan

if TYPE_CHECKING:
    from engines.bundles.bundle import Bundle
    from engines.cascade import Cascade

CALIBRATED_WITH = ("target", "precision", "keep", "max_new_tokens")  # what another calibration may be made under


def tied_keep(plan: PruningPlan, keep: Keep) -> tuple[float, ...] | None:
    """The shares that a calibration is tied to; None where the plan's own are counts, whose shares vary."""
    if keep is None and any(budget.count is not None for budget in plan.budgets):
        return None
    return keep_ratios(plan, keep)


def promises_of(bundle: Bundle) -> Promises | None:
    """The calibrated thresholds of an opened bundle; None where there is no choice between two models."""
    if "large" not in bundle.members:
        return None
    entries = {name: member.targets[bundle.target] for name, member in bundle.manifest.members.items()}
    precision: dict[str, str] = {name: entry.computed_in for name, entry in entries.items()}
    return Promises(bundle.manifest.calibrations, bundle.target, precision, bundle.members["large"].spec.plan)


@dataclass
class Promises:
    """The calibrated thresholds of a bundle on the target that it was opened on.

    precision: model → what it is computed in, as int8 or bfloat16. plan: the large model's.
    """

    calibrations: tuple[Calibration, ...]
    target: str
    precision: dict[str, str]
    plan: PruningPlan
    _said: set[str] = field(default_factory=set)

    def parts(
        self, cascade: Cascade, turn: Turn, keep: Keep, guidance: np.ndarray | None = None
    ) -> Iterator[str | Answer]:
        """The pieces of an answer under the threshold that holds; a calibrated one is named in the answer."""
        held = self.that_holds(keep, turn.options, guidance is not None)
        for part in cascade.parts(turn, keep, held.threshold if held else None, guidance):
            yield replace(part, calibration=held) if isinstance(part, Answer) else part

    def that_holds(self, keep: Keep, options: Options, guided: bool = False) -> Calibration | None:
        """The calibration for a question asked like this; None, and why on stderr once, where there is none.

        guided: the large model is pruned by other guidance than the small model's.
        """
        refusals = []
        for calibration in self.calibrations:
            why = self._why_not(calibration, keep, options, guided)
            if not why:
                return calibration
            refusals.append(f"the calibrated threshold {calibration.threshold:g} is not used, because {why}")
        for refusal in refusals[-1:]:
            self.note(refusal)
        return None

    def note(self, refusal: str) -> None:
        """Say once that the bundle's own threshold is used, and why."""
        if self.calibrations and refusal not in self._said:
            self._said.add(refusal)
            say(f"{refusal}; the threshold from its build is used")

    def _why_not(self, of: Calibration, keep: Keep, options: Options, guided: bool) -> str:
        """The first condition that differs, or nothing."""
        asked = tied_keep(self.plan, keep)
        differs = [
            ("target", of.target, self.target),
            ("precision", of.precision, self.precision),
            ("keep", of.keep, asked),
            ("max_new_tokens", of.max_new_tokens, options.max_new_tokens),
            ("temperature", 0, options.temperature),
            ("repetition_penalty", None, options.repetition_penalty),
            ("stop", [], list(options.stop)),
        ]
        for name, tied, got in differs:
            if tied != got:
                again = " (calibrate with that too)" if name in CALIBRATED_WITH else ""
                return f"it was calibrated for {name} {_in_words(tied)} and this question uses {_in_words(got)}{again}"
        return "this question's guidance is not the small model's" if guided else ""


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{share:g}" for share in value)
    if isinstance(value, dict):
        return ", ".join(f"{model} {dtype}" for model, dtype in sorted(value.items()))
    return "the default" if value is None else str(value) if value != [] else "none"
