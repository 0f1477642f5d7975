"""The README's table out of a results file: ``python -m benchmarks.peers.table FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    ("vision_ms", "vision ms"),
    ("prefill_ms", "prefill ms"),
    ("first_token_ms", "first token ms"),
    ("decode_ms_per_token", "ms a token"),
    ("open_ms", "open ms"),
)


def table_of(document: dict[str, Any]) -> list[str]:
    """Lines of Markdown: medians with their range, peak memory, bytes on disk; then what was skipped."""
    lines = [
        "| system | " + " | ".join(title for _, title in COLUMNS) + " | peak GB | disk GB |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for row in document["systems"]:
        cells = [cell(row.get(key)) for key, _ in COLUMNS]
        sizes = [f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "disk_bytes")]
        lines.append(f"| {row['name']} | " + " | ".join([*cells, *sizes]) + " |")
    lines += [f"- {name}: not measured ({why})" for name, why in document["skipped"].items()]
    return lines


def cell(spread: list[float] | None) -> str:
    """Median (minimum–maximum)."""
    if not spread:
        return ""
    digits = 0 if spread[0] >= 100 else 1
    return f"{spread[0]:,.{digits}f} ({spread[1]:,.{digits}f}–{spread[2]:,.{digits}f})"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table_of(json.loads(Path(sys.argv[1]).read_text("utf-8")))) + "\n")
