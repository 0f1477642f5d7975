"""What a narrower precision costs: the golden tensors through quantised stages, measured at build, held at verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from engines.bundles.golden import Case, Replay, runs
from engines.bundles.manifest import Loss
from engines.sessions.session import Session
from graphs.compare import Comparison, kept_overlap, scale_of
from graphs.spec import ExportSpec

OpenStage = Callable[[Path], Session]
# Between two machines: other kernels round activations to 8 bits elsewhere, and a near-tie keeps another row.
MARGIN, SLACK, SLACK_OF_KEPT = 1.5, 0.01, 0.1
LOGITS = "logits"


def losses_of(golden: Path, spec: ExportSpec, stages: Path, open_stage: OpenStage) -> tuple[Loss, ...]:
    """How far every golden output is from its reference.

    golden: the folder of the golden tensors. stages: the folder that ``spec``'s files are relative to.
    """
    return tuple(
        _loss(case, name, got[name], case.outputs[name])
        for case, got in runs(golden, spec, stages, open_stage)
        for name in case.outputs
    )


def replay_with_losses(
    folder: Path, spec: ExportSpec, losses: Iterable[Loss], open_stage: OpenStage
) -> Iterator[Replay]:
    """Replay as ``engines.bundles.golden.replay``, each tensor held to 1.5 times what the build measured for it."""
    known = {(loss.stage, loss.case, loss.tensor): loss for loss in losses}
    for case, got in runs(folder, spec, folder, open_stage):
        tensors = (
            _held(name, known.get((case.stage, case.name, name)), _loss(case, name, value, case.outputs[name]))
            for name, value in got.items()
        )
        yield Replay(case.stage, case.name, tuple(tensors))


def losses_in_words(losses: Iterable[Loss]) -> list[str]:
    """One line per stage: largest and mean error, how often the first token is the same, kept rows in common."""
    lines = []
    of_stage: dict[str, list[Loss]] = {}
    for loss in losses:
        of_stage.setdefault(loss.stage, []).append(loss)
    for stage, found in of_stage.items():
        numbers = [loss for loss in found if loss.overlap is None]
        line = (
            f"{stage}: error at most {max(loss.max_error for loss in numbers):.1e}, "
            f"mean {np.mean([loss.mean_error for loss in numbers]):.1e} of the largest value"
        )
        if tops := [loss.top1 for loss in found if loss.top1 is not None]:
            line += f", first token the same in {np.mean(tops):.0%} of the rows"
        if kept := [loss.overlap for loss in found if loss.overlap is not None]:
            line += f", kept rows at least {min(kept):.0%} the same"
        lines.append(line)
    return lines


def _loss(case: Case, name: str, got: np.ndarray, wanted: np.ndarray) -> Loss:
    loss = Loss(stage=case.stage, case=case.name, tensor=name)
    if name.startswith("kept_"):
        return loss.model_copy(update={"overlap": kept_overlap(got, wanted)})
    if not wanted.size:
        return loss
    got64, wanted64 = got.astype(np.float64), wanted.astype(np.float64)
    difference = np.abs(got64 - wanted64) / scale_of(wanted64)
    found = {"max_error": float(difference.max()), "mean_error": float(difference.mean())}
    if name == LOGITS:
        found["top1"] = float((got64.argmax(-1) == wanted64.argmax(-1)).mean())
    return loss.model_copy(update=found)


def _held(name: str, then: Loss | None, now: Loss) -> Comparison:
    if then is None:
        return Comparison(name, 0.0, problem="the manifest has no error for it")
    allowed = MARGIN * then.max_error + SLACK
    comparison = Comparison(name, allowed, error=now.max_error, overlap=now.overlap)
    if then.overlap is not None and now.overlap is not None:
        if now.overlap < then.overlap - SLACK_OF_KEPT:
            return replace(
                comparison, problem=f"{now.overlap:.0%} of the rows are kept, at the build {then.overlap:.0%}"
            )
        return replace(comparison, error=None)
    if not np.isfinite(now.max_error) or now.max_error > allowed:
        return replace(comparison, problem=f"error {now.max_error:.2g} is above {allowed:.2g}")
    return comparison
