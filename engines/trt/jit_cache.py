"""What TensorRT-RTX compiles when an engine is first run, kept for the next time.

A TensorRT-RTX engine is finished on the machine that runs it: its kernels are compiled when an execution context is
made, and for new shapes while it runs. The binding can hand that work out and take it back (``IRuntimeCache``); it
refuses what another version, GPU or driver made. Full TensorRT's engines are finished. Not yet run on a GPU.

The files lie in ``$XDG_CACHE_HOME/saccade/tensorrt-rtx`` (``~/.cache``), one per engine by its digest, and may be
deleted. ``SACCADE_JIT_CACHE`` names another folder; empty, nothing is kept.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from engines.bundles.manifest import EngineFile
from engines.notes import cache_home
from graphs.console import warn
from graphs.errors import SaccadeError
from graphs.files import atomic_file

VARIABLE = "SACCADE_JIT_CACHE"


class JitCache:
    """One engine's. ``how`` says what its contexts are created by, a runtime configuration or an allocation strategy.

    Saved when asked, and once more when the session goes, for shapes that were met on the way; a file that cannot be
    written is warned of, and the engine runs all the same.
    """

    def __init__(self, trt: Any, engine: Any, said: EngineFile | None) -> None:
        # The memory of a context is that of its profile, not of the largest.
        self._allocation: Any = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self._state: tuple[Any, Path, list[bytes]] | None = None
        self._configs: dict[bool, Any] = {}
        if not hasattr(trt, "IRuntimeCache"):
            return
        self._configs = {steady: engine.create_runtime_config() for steady in (False, True)}
        for config in self._configs.values():
            config.set_execution_context_allocation_strategy(self._allocation)
        # Else the first steps, and what is captured of them, run fallback kernels until others are compiled beside.
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._configs[True].dynamic_shapes_kernel_specialization_strategy = eager
        folder = cache_folder()
        if folder is None or said is None:
            return
        cache, file = self._configs[False].create_runtime_cache(), folder / f"{said.sha256}.cache"
        held = _read(file)
        if held and not cache.deserialize(held):
            held = b""  # another GPU's or driver's: it is replaced
        for config in self._configs.values():
            config.set_runtime_cache(cache)
        self._state = (cache, file, [held])
        # With the configurations, and so the engine, alive: what is compiled belongs to them.
        weakref.finalize(self, lambda configs, *state: _save(*state), self._configs, *self._state)

    def how(self, *, steady: bool = False) -> Any:
        """What a context is created by. steady: one of few shapes, each of which is worth its own kernels at once."""
        return self._configs.get(steady, self._allocation)

    def save(self) -> None:
        """Write what is new, if anything is."""
        if self._state:
            _save(*self._state)


def cache_folder() -> Path | None:
    """Where the files lie, None where nothing is to be kept."""
    if (chosen := os.environ.get(VARIABLE)) is not None:
        return Path(chosen) if chosen else None
    try:
        return cache_home() / "tensorrt-rtx"
    except RuntimeError:  # no home folder
        return None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _save(cache: Any, file: Path, held: list[bytes]) -> None:
    """Write a cache whose content is not ``held``; where that fails it is told, for the next start will take longer."""
    data = bytes(cache.serialize())
    if not data or data == held[0]:
        return
    held[0] = data
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(file) as partial:
            partial.write_bytes(data)
    except (OSError, SaccadeError) as e:
        warn(f"what TensorRT-RTX compiled cannot be kept in {file.parent} ({e}); {VARIABLE} names another folder")
