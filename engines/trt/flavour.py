"""What differs between TensorRT-RTX and full TensorRT, as one record each; the rest of this room is written for both.

Sources: NVIDIA's Python API of TensorRT 10.16 and 11.4, of TensorRT-RTX 1.7, and its pages on engine compatibility.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from packaging.version import Version

from graphs.errors import BackendMissing
from graphs.versions import extras_of, installed_version

# Full TensorRT: ``plugins.trt.LEAST`` is the first whose parser takes our graphs as they are, then the first that takes
# them written out, and the first that nothing here was written for.
LEAST_WRITTEN_OUT, BEYOND = "10.3", "12"


@dataclass(frozen=True)
class Flavour:
    """One of the two.

    target: our name of it. module: Python's. title: NVIDIA's. distributions: those that bring the module, ours first.
    polygraphy: its POLYGRAPHY_USE_TENSORRT_RTX. sms: GPUs (as 89) that it builds for from afar; () where it builds for
    the GPU that is here and no other. head_widths: what a narrow attention's head width must divide by.
    """

    target: str
    module: str
    title: str
    distributions: tuple[str, ...]
    polygraphy: str
    sms: tuple[int, ...] = ()
    head_widths: int = 1

    @property
    def extra(self) -> str:
        """What to give pip."""
        return extras_of(self.distributions[0])

    def version(self) -> str | None:
        """The installed version, None where there is none: by its distribution, else as the module itself says."""
        for name in self.distributions:
            if found := installed_version(name):
                return found
        if not find_spec(self.module):
            return None
        from plugins.trt import imported

        try:
            return str(imported(self.module).__version__)
        except BackendMissing:
            return None


RTX = Flavour(
    "rtx",
    "tensorrt_rtx",
    "TensorRT-RTX",
    ("tensorrt-rtx",),
    "1",
    # 7.5 is left out although the builder takes it: its fp32 matrix products there can silently be zeros.
    sms=(80, 86, 89, 120, 121),
    head_widths=8,
)
# On a Jetson the module comes with JetPack, whose distribution pip may not know.
FULL = Flavour("tensorrt", "tensorrt", "TensorRT", ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "0")
FLAVOURS = {flavour.target: flavour for flavour in (FULL, RTX)}


def out_of_range(installed: str, parser: str) -> str:
    """Why a version of full TensorRT does not serve files for a parser, '' where it does."""
    from plugins.trt import LEAST

    least = LEAST_WRITTEN_OUT if parser == LEAST_WRITTEN_OUT else LEAST
    if Version(least) <= Version(installed) < Version(BEYOND):
        return ""
    return f"tensorrt {installed} is installed, and {least} or newer, but older than {BEYOND}, is needed"
