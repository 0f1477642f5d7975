"""What a bundle's manifest says about a calibrated threshold: the promise, what it is tied to, and the evidence."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graphs.console import percent
from graphs.plan import Record

Baseline = Literal["pruned", "full"]


class Calibration(Record):
    """With probability ``confidence`` the risk of exiting above ``threshold`` is at most ``max_loss``.

    The risk is a share of all questions: exit and, by metric, the small answer is worse than the baseline's (metric
    ``agreement``: differs from it). baseline: the large model pruned at ``keep``, or seeing everything. target to
    max_new_tokens: what it is tied to, beside greedy decoding without a penalty or stop strings; keep None: what the
    plan says in counts. data_sha256 to exit_rate: what it was found on; losses and exit_rate at the threshold.
    """

    threshold: float = Field(ge=0, le=1)
    max_loss: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0, lt=1)
    metric: str
    baseline: Baseline
    target: str
    precision: dict[str, str]
    keep: tuple[float, ...] | None
    max_new_tokens: int | None
    test: Literal["binomial", "hoeffding-bentkus"]
    data_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    questions: int = Field(ge=1)
    losses: float = Field(ge=0)
    p_value: float = Field(ge=0, le=1)
    exit_rate: float = Field(ge=0, le=1)

    def tied_to(self) -> tuple[object, ...]:
        """What a later calibration must share to take this one's place."""
        return self.target, sorted(self.precision.items()), self.keep, self.max_new_tokens

    def in_words(self) -> str:
        """One line."""
        shares = "the plan's keep" if self.keep is None else f"keep {','.join(f'{share:g}' for share in self.keep)}"
        return (
            f"calibrated for {self.target}, {shares}, greedy: exit threshold {self.threshold:g}, with confidence "
            f"{self.confidence:g} at most {percent(self.max_loss)} lost ({self.metric}, against the {self.baseline} "
            f"large model), on {self.questions} questions, of which {self.exit_rate:.0%} exit"
        )
