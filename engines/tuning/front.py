"""From answers to systems: what each layer, keep ratio and threshold is worth and takes, and which are worth having.

Milliseconds are what a system would take alone, sessions open: a guided large model's include the small one's pass, a
cascade's the large one's only where it does not exit. A large model that sees everything is timed without the small
answer as a draft. Thresholds cost nothing to try: they choose between answers that
are there.
Legend: N questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engines.evaluation.metrics import METRICS
from engines.evaluation.settings import Setting
from engines.evaluation.sweep import Row, spent

ONLY = "0"  # a journal of several bundles tells their small models apart
BARS = tuple(round(bar / 50, 2) for bar in range(50))  # 0 always exits


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers to N questions under one setting. worth: of the large model's, float [N] in [0, 1]; ms: what each took.

    small: the small model's worth, milliseconds and score, where there is one. looks: the large one waits for its pass.
    """

    layer: int | None
    setting: Setting
    worth: np.ndarray
    ms: np.ndarray
    small: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    looks: bool

    def system(self, threshold: float | None) -> System:
        """What the large model is worth, or with a threshold the cascade of both."""
        worth_N, ms_N, exits_N = self.chosen(threshold)
        return System(
            policy=self.setting.policy,
            layer=self.layer if self.setting.policy else None,
            keep=self.setting.keep,
            threshold=threshold,
            accuracy=float(worth_N.mean()),
            ms=round(float(ms_N.mean()), 3),
            exit_rate=None if exits_N is None else float(exits_N.mean()),
        )

    def chosen(self, threshold: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Worth and milliseconds of each question, and whether it exits."""
        if not self.small:
            return self.worth, self.ms, None
        worth_N, ms_N, score_N = self.small
        if threshold is None:
            return self.worth, self.ms + (ms_N if self.looks else 0), None
        exits_N = score_N > threshold
        return np.where(exits_N, worth_N, self.worth), ms_N + np.where(exits_N, 0, self.ms), exits_N


@dataclass(frozen=True)
class System:
    """A way to answer. threshold: None where nothing exits. ms: the mean.

    policy: None where nothing is pruned. layer: of the one cut in the decoder, None where there is none, or several.
    """

    policy: str | None
    layer: int | None
    keep: tuple[float, ...]
    threshold: float | None
    accuracy: float
    ms: float
    exit_rate: float | None

    def document(self) -> dict[str, Any]:
        """The system as JSON knows it."""
        told = asdict(self)
        return {**told, "keep": list(self.keep), "ms_per_question": told.pop("ms")}


def asked_of(
    rows: Sequence[Row], truths: Sequence[Sequence[str]], metric: str, layer: int | None, setting: Setting, guided: bool
) -> Asked:
    """Read a journal's rows of one setting. guided: whether pruning needs the small model's pass."""
    value = METRICS[metric].value
    large = [row["large"][setting.name] for row in rows]
    small = [row["small"][ONLY] for row in rows if row["small"]]
    known = [(a["text"], truth) for a, truth in zip(small, truths, strict=False)]
    small_worth_N = np.array([value(*one) for one in known])
    return Asked(
        layer,
        setting,
        np.array([value(a["text"], truth) for a, truth in zip(large, truths, strict=True)]),
        spent(large),
        (small_worth_N, spent(small), np.array([answer["score"] for answer in small])) if small else None,
        guided and setting.policy is not None,
    )


def systems_of(asked: Iterable[Asked]) -> list[System]:
    """Every setting, and where there is a small model with every threshold."""
    return [one.system(bar) for one in asked for bar in (None, *(BARS if one.small else ()))]


def front_of(systems: Iterable[System]) -> list[System]:
    """Return those that no other beats in accuracy and time, fastest first."""
    found: list[System] = []
    for system in sorted(systems, key=_by_time):
        if not found or system.accuracy > found[-1].accuracy:
            found.append(system)
    return found


def cheapest(systems: Iterable[System], accuracy: float) -> System | None:
    """Return the fastest that is worth at least this, None where there is none."""
    enough = [system for system in systems if system.accuracy >= accuracy - 1e-9]
    return min(enough, key=_by_time, default=None)


def _by_time(system: System) -> tuple[float, float]:
    return system.ms, -system.accuracy
