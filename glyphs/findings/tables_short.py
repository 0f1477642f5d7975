"""README's tables of the findings: one for each of SGL's four, and one for STAR's stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glyphs.findings.cells import Document, at, depth, heads, percent, plain, ranged, runs, table
from glyphs.findings.tables_guidance import drawn, singles
from glyphs.findings.tables_rest import areas_of

EXITS = ("S", "S_confidence", "S_consistency", "entropy", "quantile 0", "random", "best possible")
WAYS = ("stage 1 alone", "stage 2 alone", "both stages", "both stages, random")


def over_runs(document: Document, layers: Sequence[int], rows: str = "both") -> list[str]:
    """The shipped small model's share and the range over all of them, one cell per retention."""
    every = [at(document, name, layers, rows) for name in runs(document)]
    return [ranged(column) for column in zip(*every, strict=True)]


def sources_short(document: Document) -> list[str]:
    """Findings i and ii: who says which tokens stay."""
    small, large = (list(range(depth(document, name))) for name in ("small", "large"))
    half = len(small) // 2
    rows = [
        ["small model, all layers", *over_runs(document, small)],
        ["… the first half of them", *over_runs(document, small[:half])],
        ["… the last half of them", *over_runs(document, small[half:])],
        ["… one layer: best / mean / worst", *map(plain, singles(document, "small"))],
        ["… all layers, rows of the prompt only", *over_runs(document, small, "prompt")],
        ["… the prompt's last row only", *over_runs(document, small, "last")],
        ["… generated rows only", *over_runs(document, small, "generated")],
        ["large model itself, all layers (oracle)", *(percent(c["share"]) for c in at(document, "large", large))],
        ["… one layer: best / mean / worst", *map(plain, singles(document, "large"))],
        ["random tokens, three draws", *drawn(document)],
    ]
    return table(["tokens chosen by", *heads(document)], rows)


def overlap_short(document: Document) -> list[str]:
    """Finding iii: shared tokens, all layers of each model."""
    found, names = document["overlap"], runs(document)
    rows = {row["maps"]: [cell["mean"] for cell in row["at"]] for row in found["rows"]}
    small = [rows[f"{name}: all"] for name in names]
    among = [rows[key] for key in rows if " and " in key]
    kinds: list[tuple[str, Any]] = [("small and large model", small), ("small models of two seeds", among)]
    lines = [
        [title, *(ranged([{"share": mean} for mean in column]) for column in zip(*every, strict=True))]
        for title, every in kinds
        if every
    ]
    lines += [["random tokens and large model", *map(percent, rows["random"])]]
    return table(["tokens in common", *(f"best {count}" for count in found["counts"])], lines)


def exits_short(document: Document) -> list[str]:
    """Finding iv: accuracy over the share of large-model calls."""
    columns, every = areas_of(document)
    return table(
        ["mean accuracy over all shares of calls", *(f"large at {c}" for c in columns)],
        [[score, *every[score]] for score in EXITS],
    )


def star_short(document: Document) -> list[str]:
    """STAR's stages at equal budgets."""
    found = {(way["way"], way["budget"]): way["share"] for way in document["star"]["ways"]}
    budgets = list(dict.fromkeys(budget for _, budget in found))
    rows = [[way, *(percent(found[way, budget]) for budget in budgets)] for way in WAYS]
    return table(["large model alone", *(f"{budget:.0%}" for budget in budgets)], rows)
