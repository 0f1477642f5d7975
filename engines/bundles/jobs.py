"""What a build is asked for, resolved once: a job for each target, or a refusal. Nothing is read or written here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engines.bundles.manifest import EngineEntry, Loss, Served
from engines.targets import TARGETS, Target, checked_targets, refuse_unrunnable
from graphs.errors import UsageError
from graphs.spec import ExportSpec, FloatType

if TYPE_CHECKING:
    from engines.trt.options import EngineOptions
    from graphs.lowering.packing import HostPrecision


@dataclass(frozen=True)
class Job:
    """What every model of a bundle becomes on one target.

    packed: the precision of files of its own. widens: whether an fp16 export gets such, in fp32. engines: how they are
    built. Without any it runs the canonical graphs, which such targets share. dtype: what it computes these, or wide
    weights, in; None for the files' own.
    """

    target: str
    packed: HostPrecision | None = None
    engines: EngineOptions | None = None
    dtype: FloatType | None = None
    widens: bool = False

    def packed_from(self, spec: ExportSpec) -> HostPrecision | None:
        """The precision of the files of its own that this export gets; None where it gets none."""
        return self.packed or ("fp32" if self.widens and spec.dtype == "float16" else None)

    def shares(self, spec: ExportSpec) -> bool:
        """Whether it runs this export's graphs, which lie in the model's folder."""
        return not self.packed_from(spec) and not self.engines


@dataclass(frozen=True)
class BuiltMember:
    """One model as a job made it, its files told from the model's folder.

    ops: for each op what serves it, None where every body does. precision: of packed files, as the manifest has it,
    and losses: what it cost. engines: by stage, where there are some.
    """

    spec: ExportSpec
    weight_bytes: int
    precision: str = ""
    losses: tuple[Loss, ...] = ()
    ops: dict[str, Served] | None = None
    engines: dict[str, EngineEntry] = field(default_factory=dict)


def resolved(targets: str | Sequence[str], precision: str | None, engines: EngineOptions | None) -> tuple[Job, ...]:
    """One job for each target, best first.

    precision: of what runs graphs. engines: as in ``engines.bundles.build.build_bundle``. Errors: UsageError for what
    is not known, or that none of the targets takes; BackendMissing where engines for a target cannot be built here, or
    its packed files cannot be run, and so not measured.
    """
    names = checked_targets(targets)
    options = _engine_options(names, engines)
    _refuse_precision(names, precision)
    jobs = tuple(_job(TARGETS[name], precision, options) for name in names)
    for job in jobs:
        if job.packed:
            refuse_unrunnable(job.target)
    return jobs


def split_precision(targets: Sequence[str], precision: str | None) -> tuple[str | None, str | None]:
    """What of a precision asked for on the command line is that of graphs and what the engines'."""
    known = [TARGETS[target] for target in targets if target in TARGETS]
    of_engines = any(target.runs == "engines" for target in known)
    of_graphs = not of_engines or any(precision in target.precisions for target in known)
    return precision if of_graphs else None, precision if of_engines else None


def _job(target: Target, precision: str | None, options: EngineOptions | None) -> Job:
    if target.runs == "engines":
        return Job(target.name, engines=options)
    if precision in target.packed:
        return Job(target.name, packed=precision)
    dtype: FloatType | None = "bfloat16" if precision == "bf16" and precision in target.precisions else None
    return Job(target.name, dtype=dtype, widens=precision in target.widened)


def _engine_options(targets: Sequence[str], engines: EngineOptions | None) -> EngineOptions | None:
    """Options for the targets that have engines, None where none has."""
    if of_engines := [target for target in targets if TARGETS[target].runs == "engines"]:
        from engines.trt.options import EngineOptions

        return (engines or EngineOptions()).checked(of_engines)
    if engines is not None:
        raise UsageError(
            f"the target {' or '.join(targets)} has no engines to build, so options of engines have no effect; "
            "leave them out"
        )
    return None


def _refuse_precision(targets: Sequence[str], precision: str | None) -> None:
    if precision is None or any(precision in TARGETS[target].precisions for target in targets):
        return
    known = {target: TARGETS[target].precisions for target in targets if TARGETS[target].precisions}
    if not known:
        raise UsageError(
            f"the targets {', '.join(targets)} run the graphs as they are, so a precision has no effect; leave it out"
        )
    choices = "; ".join(f"{target}: {', '.join(precisions)}" for target, precisions in known.items())
    raise UsageError(f"precision {precision!r} is not one that these targets have; choose one of {choices}")
