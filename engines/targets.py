"""The targets a bundle can hold, best first: what each runs and on what, and why it cannot be had here.

A target is one record of ``TABLE``, and all that another file must know of one stands there. ``why_not`` finds its
reasons without touching a file of the bundle, so a refusal comes before anything is deserialised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from engines.trt.flavour import FULL, RTX
from graphs.errors import BackendMissing, UsageError
from graphs.spec import FloatType
from graphs.versions import extras_of, installed_rivals

if TYPE_CHECKING:
    from engines.bundles.manifest import EngineEntry
    from graphs.lowering.packing import HostPrecision


@dataclass(frozen=True)
class Target:
    """runs: the ONNX stages that all such targets of a bundle share, or engines built beside them.

    memory: where weights and caches lie. Places are ``module:function``. session: from a file and threads, and engine
    where it runs engines, to an ``engines.sessions.session.Session``. reasons: from the bundle's engines for this
    target (none for graphs) to every reason why this machine cannot run it; an empty list where it can. module: what
    is imported to run it. distributions: those that bring it, ours first.

    runs_ahead: whether a run on small feeds, before the first question, saves that question time; not where it compiles
    for the sizes that it meets. takes: what else the session may be told, as ``engines.sessions.session.open_session``
    has it. precisions: what its graphs can be packed or computed in, where a build may choose. packed: those of them
    with files of their own. widened: those for which the weights of an fp16 export are written as fp32, because it
    would make them so whenever it opens them. packed_dtype: what it computes in between quantised weights. wide_caches:
    types whose caches it holds in float32.
    """

    name: str
    runs: Literal["graphs", "engines"]
    memory: Literal["host", "device"]
    session: str
    reasons: str
    module: str
    distributions: tuple[str, ...]
    runs_ahead: bool = True
    takes: tuple[Literal["in_place", "dtype"], ...] = ()
    precisions: tuple[str, ...] = ()
    packed: tuple[HostPrecision, ...] = ()
    widened: tuple[str, ...] = ()
    packed_dtype: FloatType = "float32"
    wide_caches: tuple[FloatType, ...] = ()


TABLE = (
    Target(
        "tensorrt",
        "engines",
        "device",
        session="engines.trt.session:tensorrt_session",
        reasons="engines.trt.running:tensorrt_reasons",
        module=FULL.module,
        distributions=FULL.distributions[:1],
    ),
    Target(
        "rtx",
        "engines",
        "device",
        session="engines.trt.session:rtx_session",
        reasons="engines.trt.running:reasons",
        module=RTX.module,
        distributions=RTX.distributions,
    ),
    Target(
        "ort-tensorrt",
        "graphs",
        "device",
        session="engines.sessions.ort_gpu:tensorrt_session",
        reasons="engines.sessions.ort_providers:tensorrt_reasons",
        module="onnxruntime",
        distributions=("onnxruntime-gpu",),
        runs_ahead=False,
    ),
    Target(
        "ort-rtx",
        "graphs",
        "device",
        session="engines.sessions.ort_gpu:rtx_session",
        reasons="engines.sessions.ort_providers:rtx_reasons",
        module="onnxruntime",
        distributions=("onnxruntime-gpu",),
        runs_ahead=False,
    ),
    Target(
        "cuda",
        "graphs",
        "device",
        session="engines.sessions.ort_gpu:cuda_session",
        reasons="engines.sessions.ort_providers:cuda_reasons",
        module="onnxruntime",
        distributions=("onnxruntime-gpu",),
    ),
    Target(
        "openvino",
        "graphs",
        "host",
        session="engines.sessions.openvino_session:OpenVinoSession",
        reasons="engines.sessions.openvino_device:reasons",
        module="openvino",
        distributions=("openvino",),
        takes=("dtype",),
        precisions=("bf16", "fp32", "int8", "int4"),
        packed=("int8", "int4"),
        widened=("bf16", "fp32"),
        packed_dtype="bfloat16",  # falls back to fp32 by itself
        wide_caches=("float16",),  # which it computes in fp32 on a CPU
    ),
    Target(
        "cpu",
        "graphs",
        "host",
        session="engines.sessions.ort_session:OrtSession",
        reasons="engines.targets:cpu_reasons",
        module="onnxruntime",
        distributions=("onnxruntime", "onnxruntime-gpu"),
        takes=("in_place",),
        precisions=("fp32", "int8", "int4"),
        packed=("fp32", "int8", "int4"),
    ),
)
TARGETS = {target.name: target for target in TABLE}


def found_at(place: str) -> Any:
    """What a place, ``module:name``, names; its module is imported now. ModuleNotFoundError where that lacks one."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def why_not(name: str, engines: Sequence[EngineEntry] = ()) -> list[str]:
    """Every reason why this machine cannot run a target (driver, SM, version, package); empty where it can.

    engines: those of the bundle for it, so that their SM and version can be told.
    """
    if name not in TARGETS:
        return ["this release does not know it"]
    found: list[str] = found_at(TARGETS[name].reasons)(engines)
    return found


def refuse_unrunnable(target: str, engines: Sequence[EngineEntry] = ()) -> None:
    """BackendMissing, with every reason at once, for a target that this machine or this release cannot run.

    engines: those of the bundle for it, so that their SM and version can be told.
    """
    reasons = why_not(target, engines) if target in TARGETS else []
    if reasons:
        raise BackendMissing(
            f"target {target} cannot be run here: {'; '.join(reasons)}; build the pair for --target cpu too"
        )


def cpu_reasons(_: Sequence[EngineEntry] = ()) -> list[str]:
    """Why the CPU cannot run graphs here."""
    rivals = installed_rivals("onnxruntime")
    if len(rivals) > 1:
        remedy = f"pip uninstall {' '.join(rivals)}, then pip install one of {extras_of('onnxruntime')}"
        return [f"{' and '.join(rivals)} are both installed and overwrite each other ({remedy})"]
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
