"""The stages in which each model is trained."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stage:
    """Learning rate falls along a half cosine from `high` to `low`, and is `sight` times that outside the decoder.

    Stride 0 trains the tower alone, otherwise every stride-th layer takes part; `images` a step.
    `spare`: share of the steps that leave background tokens out, never a glyph's.
    """

    steps: int
    stride: int
    high: float
    low: float
    sight: float = 1.0
    images: int = 8
    look: bool = False
    spare: float = 0.0


@dataclass(frozen=True)
class Plan:
    """`enough`: stop as soon as this share of the validation questions is answered exactly."""

    name: str
    stages: tuple[Stage, ...]
    seed: int = 0
    enough: float = 2.0
    validate_every: int = 200
    validate_on: int = 400

    @property
    def ends(self) -> list[int]:
        """The steps after which a stage is over."""
        return np.cumsum([stage.steps for stage in self.stages]).tolist()

    @property
    def steps(self) -> int:
        """Of all stages together."""
        return self.ends[-1]

    def at(self, step: int) -> tuple[Stage, float]:
        """Stage and learning rate of a step; each stage warms up."""
        for stage in self.stages:
            if step < stage.steps:
                fall = 0.5 + 0.5 * float(np.cos(np.pi * step / stage.steps))
                return stage, min(1.0, (step + 1) / 60) * (stage.low + (stage.high - stage.low) * fall)
            step -= stage.steps
        raise ValueError("step is past the plan's end")


PLANS = {
    "large": Plan(
        "large",
        (
            Stage(8000, 0, 2e-3, 5e-4),
            Stage(8050, 4, 1.4e-3, 1e-3),
            Stage(5800, 2, 1.2e-3, 5e-5, look=True),
            Stage(200, 1, 1e-4, 0.0),
            Stage(900, 1, 4e-4, 0.0, spare=0.75),
        ),
    ),
    "small": Plan("small", (Stage(3000, 0, 2e-3, 1e-3), Stage(15000, 1, 1.5e-3, 2e-4)), seed=1, enough=0.80),
}
