"""What the tables of the findings share: numbers as text, and how to find them in the document.

Numbers are percent; in round brackets stands the range over the runs of the small model (or the draws), in square
brackets a 95 % interval.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
SIGNIFICANT = 0.05
ROWS = {"both": "both rows", "prompt": "prompt rows", "last": "last prompt row", "generated": "generated rows"}


def percent(share: float) -> str:
    """One decimal."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Percentage points with a sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def heads(document: Document) -> list[str]:
    """The retentions, as columns."""
    return [f"{cut['retention']:.0%}" for cut in document["guidance"]["cuts"]]


def runs(document: Document) -> list[str]:
    """The small models' names, the shipped one first."""
    return [name for name in document["models"] if name != "large"]


def depth(document: Document, model: str) -> int:
    """How many layers a model has."""
    return max(len(s.get("layers", ())) for s in document["guidance"]["sources"] if s["model"] == model)


def at(document: Document, model: str, layers: Sequence[int], rows: str = "both") -> list[dict[str, Any]]:
    """A source's results, one per retention."""
    for source in document["guidance"]["sources"]:
        if (source["model"], source.get("layers"), source.get("rows")) == (model, list(layers), rows):
            found: list[dict[str, Any]] = source["at"]
            return found
    raise KeyError((model, layers, rows))


def ranged(column: Sequence[dict[str, Any]]) -> str:
    """`a (b–c)`: the first, and the range of all."""
    shares = [cell["share"] for cell in column]
    return percent(shares[0]) + (f" ({percent(min(shares))}–{percent(max(shares))})" if len(shares) > 1 else "")


def plain(cell: str) -> str:
    """Without the layers' numbers."""
    return re.sub(r" \(l\. \d+\)", "", cell)


def by(document: Document, model: str) -> list[dict[str, Any]]:
    """The sources of one model."""
    return [s for s in document["guidance"]["sources"] if s["model"] == model]


def interval_cells(cells: Sequence[dict[str, Any]]) -> list[str]:
    """`a [low–high]` each."""
    return [f"{percent(c['share'])} [{percent(c['low'])}–{percent(c['high'])}]" for c in cells]
