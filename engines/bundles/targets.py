"""The targets a bundle can hold, best first: what each runs, whose memory it takes, and why it cannot be had here.

A target is one line of ``TABLE``. ``why_not`` finds its reasons without touching a file of the bundle, so a refusal
comes before anything is deserialised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from engines.bundles.manifest import EngineEntry
from graphs.errors import BackendMissing, UsageError
from graphs.versions import extras_of


@dataclass(frozen=True)
class Target:
    """runs: the ONNX stages that all such targets of a bundle share, or engines built beside them.

    memory: where weights and caches lie. reasons: ``module:function`` from the bundle's engines for this target
    (none for graphs) to every reason why this machine cannot run it; an empty list where it can. precisions: what
    its graphs can be packed or computed in, where a build may choose. packed: those of them with files of their own.
    """

    name: str
    runs: Literal["graphs", "engines"]
    memory: Literal["host", "device"]
    reasons: str
    precisions: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()


CPU_PRECISIONS = ("fp32", "int8", "int4")
TABLE = (
    Target("tensorrt", "engines", "device", "engines.trt.running:tensorrt_reasons"),
    Target("rtx", "engines", "device", "engines.trt.running:reasons"),
    Target("ort-tensorrt", "graphs", "device", "engines.sessions.ort_providers:tensorrt_reasons"),
    Target("ort-rtx", "graphs", "device", "engines.sessions.ort_providers:rtx_reasons"),
    Target("cuda", "graphs", "device", "engines.sessions.ort_providers:cuda_reasons"),
    Target(
        "openvino",
        "graphs",
        "host",
        "engines.sessions.openvino_device:reasons",
        ("bf16", "fp32", "int8", "int4"),
        packed=("int8", "int4"),
    ),
    Target("cpu", "graphs", "host", "engines.bundles.targets:cpu_reasons", CPU_PRECISIONS, packed=CPU_PRECISIONS),
)
TARGETS = {target.name: target for target in TABLE}


def why_not(name: str, engines: Sequence[EngineEntry] = ()) -> list[str]:
    """Every reason why this machine cannot run a target (driver, SM, version, package); empty where it can.

    engines: those of the bundle for it, so that their SM and version can be told.
    """
    if name not in TARGETS:
        return ["this release does not know it"]
    module, _, function = TARGETS[name].reasons.partition(":")
    found: list[str] = getattr(import_module(module), function)(engines)
    return found


def cpu_reasons(_: Sequence[EngineEntry] = ()) -> list[str]:
    """Why the CPU cannot run graphs here."""
    if find_spec("onnxruntime"):
        return []
    return [f"onnxruntime is not installed (pip install {extras_of('onnxruntime')})"]


def checked_targets(asked: str | Sequence[str]) -> tuple[str, ...]:
    """The targets to build for, best first, each once; UsageError for none or an unknown one."""
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    known = ", ".join(TARGETS)
    if not names:
        raise UsageError(f"no target was given; choose one or more of {known}")
    if unknown := [name for name in names if name not in TARGETS]:
        raise UsageError(f"unknown target {unknown[0]!r}; known are {known}")
    return tuple(name for name in TARGETS if name in names)


def choose(held: Mapping[str, Sequence[EngineEntry]], asked: str | None, bundle: str) -> tuple[str, dict[str, str]]:
    """The target to run, and for each better one that the bundle holds why it was passed over.

    held: target → its engines, in any order. asked: this one and no other. Errors: UsageError for a target that the
    bundle does not hold, BackendMissing with every reason where the asked one, or none at all, can be had.
    """
    if asked is not None and asked not in held:
        if asked not in TARGETS:
            raise UsageError(f"unknown target {asked!r}; {bundle} was built for {' and '.join(held)}, use that")
        raise UsageError(
            f"{bundle} was built for target {' and '.join(held)}, not {asked}; "
            f"build it again with: saccade build SMALL LARGE -o OTHER --target {asked}"
        )
    passed: dict[str, str] = {}
    for name in (asked,) if asked else sorted(held, key=_rank):
        reasons = why_not(name, held[name])
        if not reasons:
            return name, passed
        passed[name] = "; ".join(reasons)
    others = [name for name in sorted(held, key=_rank) if name not in passed]
    advice = f"open it with --target {others[0]}" if others else "build the pair for a target that this machine has"
    if not others and "cpu" not in held:
        advice = "build the pair for --target cpu too"
    said = "; ".join(f"target {name} cannot be run here: {why}" for name, why in passed.items())
    raise BackendMissing(f"{bundle}: {said}; {advice}")


def _rank(name: str) -> int:
    return list(TARGETS).index(name) if name in TARGETS else len(TARGETS)
