"""The bundles of one evaluation: opened, metered, and told apart where they really differ.

Bundles of different policies or layers often hold the same small model and large ones of the same weights. Where the
files say so, what both would compute is computed once: the small model's pass, and the large model that sees all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engines.bundles.manifest import Manifest, manifest_of
from engines.cascade import Cascade
from engines.evaluation.flops import Meter, Metered, StageCost, costs_of
from engines.model import Model
from engines.sessions.session import Session
from engines.targets import TARGETS
from graphs.console import say
from graphs.errors import UsageError
from graphs.plan import PruningPlan
from graphs.spec import PROCESSOR_FOLDER


@dataclass(eq=False)
class Contender:
    """One bundle. small, whole: the first bundles of the same small model, and of the same unpruned large one.

    costs: model → what its stages cost, None where that cannot be read; meters: model → what it ran.
    """

    path: Path
    manifest: Manifest
    cascade: Cascade
    small: int = 0
    whole: int = 0
    costs: dict[str, Mapping[str, StageCost] | None] = field(default_factory=dict)
    meters: dict[str, Meter] = field(default_factory=dict)

    @property
    def pair(self) -> bool:
        """Whether a small model looks first."""
        return self.cascade.small is not None and self.cascade.large is not None

    @property
    def plan(self) -> PruningPlan | None:
        """What the large (or only) model prunes; None where the only model prunes nothing."""
        return self.cascade.large.spec.plan if self.cascade.large else None

    @property
    def model(self) -> Model:
        """The model whose answer is wanted in the end."""
        model = self.cascade.large or self.cascade.small
        assert model
        return model

    @property
    def member(self) -> Literal["large", "alone"]:
        """What that model is called in the manifest."""
        return "large" if self.pair else "alone"

    @property
    def target(self) -> str:
        """What it runs on."""
        return self.model.target


def opened(bundles: Sequence[Path], target: str | None, threads: int | None) -> list[Contender]:
    """Open every bundle; raises what ``Cascade.open`` raises, and UsageError for one that was given twice."""
    found: list[Contender] = []
    for path in bundles:
        manifest = manifest_of(path)
        if twin := next((c for c in found if c.manifest.sha256 == manifest.sha256), None):
            raise UsageError(f"{path} is the same bundle as {twin.path}, so it adds nothing; leave it out")
        one = Contender(path, manifest, Cascade.open(path, target, threads, reuses_beginnings=False))
        _meter(one)
        found.append(one)
        one.small = _first(small_identity(c) for c in found)
        one.whole = _first(whole_identity(c) for c in found)
    return found


def unmetered(path: Path, manifest: Manifest, cascade: Cascade) -> Contender:
    """A bundle alone whose FLOPs nobody asks for."""
    models = ("small", "large")
    return Contender(path, manifest, cascade, costs=dict.fromkeys(models), meters={name: Meter() for name in models})


def small_identity(of: Contender) -> Any:
    """Equal where the small models are the same files on the same target."""
    if not of.cascade.small:
        return object()
    folder = of.manifest.members["small" if of.pair else "alone"].folder
    return of.target, sorted(_files(of.manifest, f"{folder}/", ""))


def whole_identity(of: Contender) -> Any:
    """Equal where the large models compute the same as long as they prune nothing.

    They have the same small model before them, the same weights and processor; graphs differ in what they would prune.
    """
    if not of.cascade.large or TARGETS[of.target].runs == "engines":
        return object()
    spec, folder = of.cascade.large.spec, of.manifest.members[of.member].folder
    weights = {weight.name for weight in spec.weights}
    files = _files(of.manifest, f"{folder}/", PROCESSOR_FOLDER) + [
        entry for entry in _files(of.manifest, f"{folder}/", "") if entry[0] in weights
    ]
    return of.target, spec.architecture, spec.dtype, of.small if of.pair else None, sorted(files)


def _first(identities: Iterable[Any]) -> int:
    """The place of the first that equals the last."""
    *_, last = every = list(identities)
    return every.index(last)


def _files(manifest: Manifest, folder: str, below: str) -> list[tuple[str, str]]:
    """Names and digests of what the folder holds."""
    prefix = folder + (f"{below}/" if below else "")
    return [(f.path.removeprefix(folder), f.sha256) for f in manifest.files if f.path.startswith(prefix)]


def _meter(one: Contender) -> None:
    """Have every run of both models noted, where its cost is known; say where it is not."""
    for name, model in (("small", one.cascade.small), ("large", one.cascade.large)):
        if not model:
            continue
        costs = costs_of(one.path, one.manifest, name if one.pair else "alone")
        one.costs[name] = costs
        one.meters[name] = meter = Meter()
        if costs is None:
            say(
                f"{one.path}: FLOPs of the {name} model are not estimated, because the bundle holds engines only, "
                "whose layers cannot be read; build it for --target cpu too"
            )
            continue
        if left_out := [product for cost in costs.values() for product in cost.uncounted]:
            say(f"{one.path}: estimated FLOPs of the {name} model leave out {len(left_out)} products: {left_out[0]} …")
        model.watch = _watch(costs, meter)


def _watch(costs: Mapping[str, StageCost], meter: Meter) -> Callable[[str, Session], Session]:
    return lambda stage, session: Metered(session, stage, costs[stage], meter)
