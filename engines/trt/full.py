"""What a build for full TensorRT is told beside what every engine is told, and whether it can be made here at all.

It differs from TensorRT-RTX: kernels are timed, so there is a timing cache and the GPU must be here; an engine may be
made to run on other GPUs and on newer versions; kernels may go in ahead of time, without Python at run; and TensorRT
10.3, of JetPack 6, takes graphs that are written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from engines.bundles.manifest import Compatibility, Hardware, Plugins
from engines.trt.flavour import FULL, LEAST_WRITTEN_OUT, out_of_range
from engines.trt.running import tensorrt_reasons
from graphs.errors import BackendMissing, UsageError
from graphs.spec import Parser

LEVELS = range(6)
LEVEL_OF: dict[Hardware, str] = {
    "none": "",
    "ampere-plus": "AMPERE_PLUS",
    "same-cc": "SAME_COMPUTE_CAPABILITY",
}
FORMS = ("python", "aot")
PARSERS: tuple[Parser, ...] = get_args(Parser)
AMPERE = 80
LEAST_WORKSPACE, MOST_WORKSPACE = 0.001, 1024  # GB


@dataclass(frozen=True)
class TensorrtOptions:
    """What ``saccade build --target tensorrt`` alone is told.

    timing_cache: a file that is read where it exists and updated after each engine. optimization_level: 0 to 5, None
    for TensorRT's own. version_compatible: engines bring a runtime and run on newer TensorRTs. hardware_compatibility:
    a key of ``LEVEL_OF``. plugins: what kernels become, ``python`` (ours must be registered at run) or ``aot`` (in
    the engine, which needs no Python then); None: python where plugins serve at all. parser: ``10.3`` for JetPack 6.
    workspace: GB of device memory that a kernel may take beside its tensors, at the build and at run; None for
    TensorRT's own bound, which is all there is, on a Jetson the host's.
    """

    timing_cache: Path | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    plugins: str | None = None
    parser: Parser = "current"
    workspace: float | None = None

    def check(self, ops: str, precision: str | None) -> None:
        """UsageError for a value that is not known, or that does not go with another."""
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise UsageError(f"optimization level {self.optimization_level} does not exist; choose 0 to 5")
        if self.workspace is not None and not LEAST_WORKSPACE <= self.workspace <= MOST_WORKSPACE:
            raise UsageError(
                f"--workspace is {self.workspace:g}, but must lie in [{LEAST_WORKSPACE}, {MOST_WORKSPACE}] GB; leave "
                "it out for TensorRT's own bound"
            )
        if self.hardware_compatibility not in LEVEL_OF:
            known = ", ".join(LEVEL_OF)
            raise UsageError(
                f"hardware compatibility {self.hardware_compatibility!r} is not known; choose from {known}"
            )
        if self.plugins is not None and self.plugins not in FORMS:
            raise UsageError(f"plugins {self.plugins!r} are neither python nor aot; choose one")
        if self.plugins is not None and ops != "plugin":
            raise UsageError("--plugins says how kernels are built in, and --ops body has none; give --ops plugin too")
        if self.version_compatible and ops == "plugin":
            raise UsageError(
                "a version-compatible engine runs on a TensorRT of its own, which does not know our plugins; "
                "choose --ops body"
            )
        if (cache := self.timing_cache) and (cache.is_symlink() or (cache.exists() and not cache.is_file())):
            raise UsageError(f"--timing-cache {cache} is a folder, link or device; name a plain file")
        refuse_for_parser(self.parser, ops, precision)

    @property
    def compatibility(self) -> Compatibility:
        """As the manifest says it."""
        hardware: Any = self.hardware_compatibility
        return Compatibility(hardware=hardware, versions=self.version_compatible)

    def form(self, ops: str) -> Plugins:
        """What kernels are in an engine, as the manifest says it."""
        if ops != "plugin":
            return "none"
        return "aot" if self.plugins == "aot" else "python"

    def settings(self, sm: int, ops: str) -> dict[str, Any]:
        """The worker's settings for a GPU."""
        return {
            "optimization_level": self.optimization_level,
            "workspace": None if self.workspace is None else int(self.workspace * 1e9),
            "version_compatible": self.version_compatible,
            "hardware_compatibility": LEVEL_OF[self.compatibility.hardware],
            "kernel_sms": self._kernel_sms(sm, ops),
        }

    def _kernel_sms(self, sm: int, ops: str) -> list[int]:
        """What kernels are compiled for: as far as the engine itself may go."""
        if ops != "plugin" or self.compatibility.hardware != "ampere-plus":
            return [sm]
        if self.form(ops) == "aot":
            return [AMPERE]  # PTX, which newer GPUs read
        from plugins.cubins import SMS

        return list(SMS)


def refuse_for_parser(parser: str, ops: str, precision: str | None) -> None:
    """UsageError for a parser that is not known, or that takes no plugins, no bf16 and no weights of 4 bits.

    precision: fp16, bf16, bfloat16, int4, …; None where the export's own is not known yet.
    """
    if parser not in PARSERS:
        raise UsageError(f"parser {parser!r} is not known; choose {' or '.join(PARSERS)}")
    if parser == "10.3" and (ops == "plugin" or precision in ("bf16", "bfloat16", "int4")):
        raise UsageError(
            "TensorRT 10.3 takes no plugins of ours, no bf16 and no int4; choose --ops body and fp16, fp32 or int8"
        )


def own_sm(sms: tuple[int, ...], options: TensorrtOptions, ops: str, *, alone: bool) -> int:
    """The compute capability, as 89, of the GPU that is here, which is the one that is built for.

    sms: what --sm asked for. alone: whether no other target of the build reads that. Errors: BackendMissing, with every
    reason, where full TensorRT cannot build here; UsageError where --sm names another GPU, or one that the kernels of
    ``options`` are not compiled for.
    """
    found, installed = tensorrt_reasons(), FULL.version()
    if installed and options.parser == "current":
        # What runs a graph that was written out is found too; only the build asks for more.
        why = out_of_range(installed, options.parser)
        takes = f" (this one takes --parser {LEAST_WRITTEN_OUT})"
        if why and why not in found:
            found.append(why + (takes if not out_of_range(installed, LEAST_WRITTEN_OUT) else ""))
    if found:
        raise BackendMissing(
            f"target tensorrt cannot be built here: {'; '.join(found)}; build on a machine with TensorRT and the GPU, "
            "or for --target rtx, which needs no GPU and serves GeForce and RTX GPUs"
        )
    from engines.trt.device import capability

    here = capability()
    if alone and sms and set(sms) != {here}:
        other = next(sm for sm in sms if sm != here)
        raise UsageError(
            f"--sm is {other}, and full TensorRT builds for the GPU that is here, of SM {here}; leave --sm out, build "
            "where the other GPU is, or build for --target rtx"
        )
    if options.form(ops) == "aot":
        from plugins.aot import check_sm

        check_sm(min(options.settings(here, ops)["kernel_sms"]))
    elif ops == "plugin":
        from plugins.cubins import check_sms

        check_sms(options.settings(here, ops)["kernel_sms"])
    return here
