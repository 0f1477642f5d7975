"""What a runtime has to offer: one protocol, and the opening of what serves a target.

A session runs one graph. Tensors go in by name, as numpy arrays or as values that an earlier run
left on the device; they come back as numpy arrays (``host``) or stay where they are (``device``),
so that a KV cache is handed from step to step without a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from engines.targets import TARGETS, found_at, refuse_unrunnable
from graphs.errors import BackendMissing, BadArtefact, OperationFailed, UsageError
from graphs.spec import CacheForm, FloatType

if TYPE_CHECKING:
    from engines.bundles.bundle import Engines

# A tensor on the host (numpy.ndarray) or a runtime's own handle of one on its device.
Value: TypeAlias = Any

NOTHING: Mapping[str, str] = {}
GRAPH_DISAGREES = "spec.json and the graph disagree, export the checkpoint again"


class Later(ABC):
    """An output that a session makes when it is asked for (``to_host``), from what runs left."""

    @abstractmethod
    def and_then(self, later: Any) -> Later:
        """The sum of this one and that of a later run on the same cache, made in one go."""


class Session(Protocol):
    """One opened graph.

    form: how a decoder's caches grow here, which the session knows from the inputs that it takes.
    """

    form: CacheForm

    def run(
        self,
        feeds: Mapping[str, Value],
        host: Collection[str] = (),
        device: Collection[str] = (),
        in_place: Mapping[str, str] = NOTHING,
    ) -> dict[str, Value]:
        """Run once; ``host`` outputs come back as numpy arrays, ``device`` outputs as handles (one may be a ``Later``),
        others not at all.

        in_place: output → the input whose memory it is written to; such an input is a ``buffer``.
        Raises OperationFailed where the runtime refuses or fails.
        """

    def buffers(self, sources: Mapping[str, Value], held: int, rows: int, wanted: int) -> dict[str, Value]:
        """Buffers for cache inputs, each [1, Hkv, C, d], C at least ``rows``; asked for where form is in-place only.

        sources: input name → what its first ``held`` rows are taken from, on the host or the device; the inputs are
        those of one segment, all of one shape. The other rows hold any numbers. wanted: C where the runtime is free to
        choose. Raises OperationFailed where there is no room for so many rows.
        """

    def to_host(self, value: Value) -> np.ndarray:
        """Copy a handle (or pass an array through) to the host."""

    def largest(self, name: str) -> tuple[int, ...] | None:
        """The largest shape of an input that a run takes; None where nothing but memory bounds it."""


def open_session(
    file: Path,
    target: str = "cpu",
    threads: int | None = None,
    engines: Engines | None = None,
    in_place: bool = False,
    dtype: FloatType | None = None,
) -> Session:
    """Open one graph file for a target.

    threads: how many CPU threads a run may use, None for the runtime's own choice. engines: what a bundle's manifest
    says of the engines that ``file`` is among, whose bytes are then held against it. in_place: let the runtime write a
    canonical decoder's caches in place where it can, as the session's ``form`` then says. dtype: what the graph is
    computed in, where the target can choose; None for what the file says. Raises UsageError for an unknown target,
    BackendMissing where its runtime is not installed, BadArtefact where the file cannot be read.
    """
    refuse_unrunnable(target)
    if target not in TARGETS:
        raise UsageError(f"no runtime serves target {target!r} here; known are {', '.join(sorted(TARGETS))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, but a run needs at least 1; leave it out for the runtime's choice")
    if engines and file not in engines:
        raise BadArtefact(f"{file} is not an engine of the bundle's manifest; do not use it, or build the bundle again")
    wanted = {"in_place": in_place, "dtype": dtype}
    said: dict[str, Any] = {name: wanted[name] for name in TARGETS[target].takes if wanted[name]}
    if engines:
        said["engine"] = engines[file]
    try:
        session: Session = found_at(TARGETS[target].session)(file, threads=threads, **said)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] in {"engines", "graphs", "plugins"}:
            raise
        raise BackendMissing(
            f"target {target} needs {e.name}, which this Python lacks: run pip install 'saccade[{target}]'"
        ) from None
    return session


def refuse_misfed(file: Path, inputs: Collection[str], feeds: Collection[str], remedy: str) -> None:
    """OperationFailed where the names that are fed are not a graph's inputs. remedy: what disagrees, and what to do."""
    taken, given = set(inputs), set(feeds)
    if given != taken:
        missing, unknown = sorted(taken - given), sorted(given - taken)
        raise OperationFailed(f"{file.name} was fed wrongly: missing {missing}, unknown {unknown}; {remedy}")
