"""What a stage's file says of how it was packed for the CPU, read without a library for graphs."""

from __future__ import annotations

import re

PACKED = "saccade.packed"  # metadata of a file that was lowered at build; its value is the precision
# ModelProto.metadata_props as it is serialised: a key, then the length of a short value, then the value.
ENTRY = re.compile(rb"\x0a\x0e" + re.escape(PACKED.encode()) + rb"\x12([\x01-\x7f])")


def packed_as(graph: bytes) -> str | None:
    """The precision that a serialised graph was packed in, None for a canonical one."""
    found = ENTRY.search(graph)
    return graph[found.end() : found.end() + found[1][0]].decode("ascii", "replace") if found else None
