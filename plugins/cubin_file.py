"""Compiled kernels as bytes inside an engine: packed at build, unpacked at run, where there is no Triton."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from graphs.errors import BadArtefact
from plugins.table import Variant

MAGIC = b"saccade.cubins/1\n"


@dataclass(frozen=True)
class Cubin:
    """One kernel variant compiled for one SM.

    sm: as 89 for 8.9. shared: bytes of dynamic shared memory per program. arch_specific: runs on exactly this SM.
    The function in the image has the kernel's name.
    """

    variant: Variant
    sm: int
    shared: int
    arch_specific: bool
    image: bytes


def pack(cubins: Iterable[Cubin]) -> bytes:
    """Cubins → bytes: a line of magic, zlib of a JSON line and the images behind each other."""
    cubins = list(cubins)
    table = [
        {"variant": asdict(c.variant), "sm": c.sm, "shared": c.shared, "arch_specific": c.arch_specific}
        | {"bytes": len(c.image)}
        for c in cubins
    ]
    return MAGIC + zlib.compress(json.dumps(table).encode() + b"\n" + b"".join(c.image for c in cubins), 9)


def unpack(packed: bytes) -> tuple[Cubin, ...]:
    """What ``pack`` packed; BadArtefact for anything else."""
    if not packed.startswith(MAGIC):
        raise BadArtefact("the plugin's kernels are not of format saccade.cubins/1: build the engine again")
    try:
        table, _, images = zlib.decompress(packed[len(MAGIC) :]).partition(b"\n")
        cubins, at = [], 0
        for entry in json.loads(table):
            size, fixed = entry.pop("bytes"), entry.pop("variant")
            fixed["constants"] = tuple((name, value) for name, value in fixed["constants"])
            cubins.append(Cubin(Variant(**fixed), **entry, image=images[at : at + size]))
            at += size
    except (zlib.error, ValueError, TypeError, KeyError, RecursionError) as e:
        raise BadArtefact(f"the plugin's kernels are damaged ({e}): build the engine again") from e
    if at != len(images):
        raise BadArtefact(f"the plugin's kernels hold {len(images)} bytes instead of {at}: build the engine again")
    return tuple(cubins)


def serving(cubins: Iterable[Cubin], variant: Variant, sm: int) -> Cubin | None:
    """The cubin of a variant that runs on a device: its own SM's, else the highest older one of the same major number.

    An architecture-specific image (9.0 and newer, as Triton compiles them) and Jetson's 8.7 run on their own SM alone.
    """
    mine = {c.sm: c for c in cubins if c.variant == variant}
    if sm in mine:
        return mine[sm]
    older = [c for c in mine.values() if c.sm // 10 == sm // 10 and c.sm < sm and not c.arch_specific]
    return max((c for c in older if 87 not in (c.sm, sm)), key=lambda c: c.sm, default=None)
