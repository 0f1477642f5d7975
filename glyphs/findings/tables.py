"""The tables of README.md and docs/findings.md, made from benchmarks/results/findings.json alone.

`python -m glyphs.findings.tables` writes each between its marks: `<!-- findings NAME -->`, `<!-- end of findings -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from glyphs.findings import tables_guidance, tables_rest, tables_short
from glyphs.findings.cells import Document
from graphs.errors import UsageError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "findings.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md")
BLOCK = re.compile(r"<!-- findings (\w+) -->\n.*?<!-- end of findings -->\n", re.DOTALL)
TABLES: dict[str, Callable[[Document], list[str]]] = {
    f.__name__: f
    for f in (
        tables_short.sources_short,
        tables_short.overlap_short,
        tables_short.exits_short,
        tables_short.star_short,
        tables_guidance.claims_short,
        tables_guidance.all_sources,
        tables_guidance.single_layers,
        tables_guidance.best_layers,
        tables_guidance.paired_tests,
        tables_guidance.sgl_cuts,
        tables_rest.overlap,
        tables_rest.areas,
        tables_rest.area_tests,
        tables_rest.above_random,
        tables_rest.curves,
        tables_rest.star,
        tables_rest.star_tests,
        tables_rest.models,
    )
}


def filled(text: str, document: Document) -> str:
    """The page with every block made anew."""

    def block(found: re.Match[str]) -> str:
        body = "\n".join(TABLES[found[1]](document))
        return f"<!-- findings {found[1]} -->\n\n{body}\n\n<!-- end of findings -->\n"

    return BLOCK.sub(block, text)


def publish_tables() -> None:
    """Write the blocks of every page from the committed results."""
    if missing := [page.name for page in PAGES if not page.is_file()]:
        raise UsageError(f"{missing[0]} is not beside this package, and the tables are its; run this in a source tree")
    document = json.loads(RESULTS.read_text("utf-8"))
    for page in PAGES:
        partial = page.with_suffix(".partial")
        partial.write_text(filled(page.read_text("utf-8"), document), "utf-8")
        partial.replace(page)


if __name__ == "__main__":
    publish_tables()
